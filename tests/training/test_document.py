"""The code in docs runs: training.md's from top to bottom, other blocks by themselves; named tests exist."""

from __future__ import annotations

import pathlib
import re

import pytest
import torch

TESTS = pathlib.Path(__file__).resolve().parents[1]


def _text(name: str) -> str:
    return (TESTS.parent / "docs" / f"{name}.md").read_text()


def _blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", _text(name), re.DOTALL | re.MULTILINE)


def test_code_runs() -> None:
    blocks = _blocks("training")
    assert len(blocks) >= 7
    exec("\n".join(blocks), {})


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
@pytest.mark.parametrize(
    ("name", "block"), [("monitor", 0), ("monitor", 1), ("distributed", 0), ("distributed", 1)]
)
def test_block_runs_by_itself(
    name: str, block: int, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """The blocks of several processes in one, which torchrun would start like this."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    for variable, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(variable, str(value))
    blocks = _blocks(name)
    assert len(blocks) == 2
    exec(blocks[block], {})


def test_named_tests_exist() -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", _text("training"))
    assert len(named) >= 40
    for file, test in named:
        assert f"def {test}(" in (TESTS / file).read_text(), (file, test)

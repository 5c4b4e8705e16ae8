"""docs/training.md: its code runs from top to bottom, and the tests that it names exist."""

from __future__ import annotations

import pathlib
import re

TESTS = pathlib.Path(__file__).resolve().parents[1]
TEXT = (TESTS.parent / "docs" / "training.md").read_text()


def test_code_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 7
    exec("\n".join(blocks), {})


def test_named_tests_exist() -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", TEXT)
    assert len(named) >= 40
    for file, test in named:
        assert f"def {test}(" in (TESTS / file).read_text(), (file, test)

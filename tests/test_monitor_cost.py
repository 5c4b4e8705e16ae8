"""bench.monitor_cost on steps of one image: it runs, observes what it says, and prints shares of a step."""

from __future__ import annotations

import re

import pytest

from bench import monitor_cost


@pytest.mark.parametrize("method", ["GHL softmax", "GHL winners=0.02, gate_at=step"])
def test_it_prints_what_a_step_costs(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--network", "ResNet-20", "--method", method, "--batch", "1", "--rounds", "2"]
    monitor_cost.main([*command, "--threads", "1"])
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if f"ResNet-20, {method}" in line)
    unobserved, observed, average = (float(share) / 100 for share in re.findall(r"([\d.]+)%", line))
    assert 0.0 < unobserved < observed
    expected = (unobserved * (monitor_cost.EVERY - 1) + observed) / monitor_cost.EVERY
    assert average == pytest.approx(expected, rel=0.05)
    assert "threads: 1" in out


def test_it_refuses_no_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        monitor_cost.main(["--rounds", "0"])
    assert "at least 1" in capsys.readouterr().err

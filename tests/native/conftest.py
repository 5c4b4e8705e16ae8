"""The instruction sets: every kernel test runs on each that was built and that this processor has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ghl_kernels._native import NativeNotBuilt, load_cpu

try:
    ISAS = list(load_cpu().build_info()["isas"])
except NativeNotBuilt:
    ISAS = []  # the modules skip themselves, with the reason


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the kernels with this instruction set."""
    cpu = load_cpu()
    if ISAS.index(request.param) > ISAS.index(cpu.detected_isa()):
        pytest.skip(f"this processor has no {request.param}")
    before = cpu.selected_isa()
    cpu.select_isa(request.param)
    yield request.param
    cpu.select_isa(before)

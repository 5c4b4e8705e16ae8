"""Tests of the kernels themselves, in Triton's interpreter (see the conftest above)."""

from __future__ import annotations

import importlib.util

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


@pytest.fixture(autouse=True)
def _poisoned(poison: None) -> None:
    """Every kernel must write all that it allocates."""

"""What a baseline says of itself."""

from __future__ import annotations

from typing import NamedTuple


class Baseline(NamedTuple):
    """One rival: its code ("B4c"), name, source and formula, as reports and command lines show them."""

    code: str
    name: str
    source: str
    formula: str

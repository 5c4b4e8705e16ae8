"""Values that the examples' command lines take."""

from __future__ import annotations

import argparse


def natural(text: str) -> int:
    """A whole number of at least 0, as an argument's ``type``.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text!r}")
    return value

"""Values that a command line takes."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A whole number of at least 1, as an argument's ``type``.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value

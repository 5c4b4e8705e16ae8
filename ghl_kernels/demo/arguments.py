"""Values that a command line takes."""

from __future__ import annotations

import argparse
import math


def positive(text: str) -> int:
    """A whole number of at least 1, as an argument's ``type``.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    return _whole(text, 1)


def natural(text: str) -> int:
    """A whole number of at least 0, as an argument's ``type``.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    return _whole(text, 0)


def positive_number(text: str) -> float:
    """A finite number above 0, as an argument's ``type``.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    value = _number(text)
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text!r}")
    return value


def nonnegative_number(text: str) -> float:
    """A finite number of at least 0, as an argument's ``type``.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    value = _number(text)
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number of at least 0, got {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
    return value

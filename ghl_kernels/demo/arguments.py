"""Values that a command line takes."""

from __future__ import annotations

import argparse
import math
import os

_LARGEST_SEED = 2**64 - 1  # that torch's generators take
_MOST_THREADS = max(1024, os.cpu_count() or 1)  # OpenMP aborts where the system refuses one


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


def torch_seed(text: str) -> int:
    """A whole number that torch takes as a seed, from 0 to 2**64 - 1, as an argument's ``type``.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    return _whole(text, 0, _LARGEST_SEED)


def thread_count(text: str) -> int:
    """A number of threads, from 1 to 1024, or to the processors if these are more, as an argument's ``type``.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    return _whole(text, 1, _MOST_THREADS)


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


def _whole(text: str, least: int, most: int | None = None) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least or (most is not None and value > most):
        allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise argparse.ArgumentTypeError(f"must be a whole number {allowed}, got {text!r}")
    return value

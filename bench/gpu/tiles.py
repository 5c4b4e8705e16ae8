"""Which tiles a call may run with, and running it with one of them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from unittest import mock

from ghl_kernels._tape import bypassed
from ghl_kernels.backends.triton import config
from ghl_kernels.backends.triton.arch import Arch
from ghl_kernels.backends.triton.config import Problem, Tile
from ghl_kernels.backends.triton.launch import recording


def problem_of(call: Callable[[], object]) -> Problem | None:
    """The correlation that a call poses, None where it poses none or several."""
    asked: list[Problem] = []
    real = config.tile

    def spy(problem: Problem, arch: Arch) -> Tile:
        asked.append(problem)
        return real(problem, arch)

    with recording(), mock.patch.object(config, "tile", spy):
        call()
    distinct = list(dict.fromkeys(asked))
    return distinct[0] if len(distinct) == 1 else None


@contextlib.contextmanager
def forced(tile: Tile) -> Iterator[None]:
    """Every correlation inside runs with this tile."""
    with bypassed(), mock.patch.object(config, "tile", return_value=tile):
        yield


@contextlib.contextmanager
def candidate(index: int) -> Iterator[list[int]]:
    """Every correlation inside runs with its candidate of this number, or its last one.

    Yields a list that fills with the numbers of candidates there were.
    """
    counts: list[int] = []

    def choose(problem: Problem, arch: Arch) -> Tile:
        tiles = list(config.candidates(problem, arch))
        counts.append(len(tiles))
        return tiles[min(index, len(tiles) - 1)]

    with bypassed(), mock.patch.object(config, "tile", choose):
        yield counts


@contextlib.contextmanager
def library(used: bool) -> Iterator[None]:
    """Every product inside is the library's where it can be, or never."""
    with library_grad(False), mock.patch.object(config, "prefers_library", return_value=used):
        yield


@contextlib.contextmanager
def library_grad(used: bool) -> Iterator[None]:
    """Of every pair of a convolution inside, G is the library's, or none is."""
    with bypassed(), mock.patch.object(config, "leaves_grad_to_library", return_value=used):
        yield


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Every float32 product inside takes one pass of tf32, or as many as float32 needs."""
    with bypassed(), mock.patch.object(config, "allows_tf32", return_value=allowed):
        yield


def every_candidate(call: Callable[[], object]) -> Iterator[contextlib.AbstractContextManager[object]]:
    """Contexts in which to make a call, so that together they use the configured tile and all candidates."""
    yield contextlib.nullcontext()
    most = 0
    for index in itertools.count():
        with recording(), candidate(index) as counts:
            call()
        most = max(counts, default=0)
        if index >= most:
            return
        yield candidate(index)

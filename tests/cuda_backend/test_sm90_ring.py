"""The ring of stages of the Hopper pair kernel, explored exhaustively: every interleaving of its agents.

Agents are the producer of each block, the copies under way, which arrive in any order, and the consumers: one
that waits for the next stage before it releases this one, as both warpgroups do, and one that does not, as
where a tile has no units. Parities and arrival counts are the kernel's own functions.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pytest
from sm90_build import layout_library


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return layout_library(tmp_path_factory.mktemp("sm90"))


class RingError(Exception):
    """What the exploration found."""


@dataclass(frozen=True)
class Ring:
    """The protocol; fields are functions so that an error can be planted."""

    stages: int
    steps: int
    blocks: int
    stage: Callable[[int], int]
    full_parity: Callable[[int], int]
    empty_parity: Callable[[int], int]
    full_arrivals: int
    empty_arrivals: int
    release_to: Callable[[int], tuple[int, ...]]  # blocks told by a consumer of a block

    @property
    def programs(self) -> tuple[tuple[tuple[str, int, int], ...], ...]:
        """Of each consumer of each block: waits for, and releases of, steps."""
        return tuple(
            program
            for block in range(self.blocks)
            for program in (self._program(block, ahead=1), self._program(block, ahead=0))
        )

    def _program(self, block: int, ahead: int) -> tuple[tuple[str, int, int], ...]:
        program: list[tuple[str, int, int]] = []
        for step in range(self.steps + ahead):
            if step < self.steps:
                program.append(("wait", block, step))
            if step >= ahead:
                program += [("release", target, step - ahead) for target in self.release_to(block)]
        return tuple(program)


CONSUMERS = 2  # of a block


class Barrier(NamedTuple):
    pending: int
    bytes: int  # copies announced and not yet arrived
    phases: int  # that are over

    def settled(self, expected: int) -> Barrier:
        done = self.pending == 0 and self.bytes == 0
        return Barrier(expected, 0, self.phases + 1) if done else self

    def over(self, parity: int) -> bool:
        return self.phases % 2 != parity


class State(NamedTuple):
    producers: tuple[tuple[int, bool], ...]  # step, and whether its stage is announced
    consumers: tuple[int, ...]  # place in the program
    full: tuple[Barrier, ...]  # of block, stage
    empty: tuple[Barrier, ...]
    held: tuple[int, ...]  # step whose copy lies there: of block, stage, source block
    copies: frozenset[tuple[int, int, int]]  # source, target, step


def put(items: tuple, at: int, value: object) -> tuple:
    return (*items[:at], value, *items[at + 1 :])


def start(ring: Ring) -> State:
    count = ring.blocks * ring.stages
    return State(
        ((0, False),) * ring.blocks,
        (0,) * (ring.blocks * CONSUMERS),
        (Barrier(ring.full_arrivals, 0, 0),) * count,
        (Barrier(ring.empty_arrivals, 0, 0),) * count,
        (-1,) * (count * ring.blocks),
        frozenset(),
    )


def announced(ring: Ring, state: State, block: int) -> Iterator[State]:
    step, _ = state.producers[block]
    at = block * ring.stages + ring.stage(step)
    if not state.empty[at].over(ring.empty_parity(step)):
        return
    if state.empty[at].phases != step // ring.stages:
        raise RingError("the producer's wait is a lap off")
    full = state.full[at]
    if full.pending == 0:
        raise RingError("more arrivals than a phase has")
    full = full._replace(pending=full.pending - 1, bytes=full.bytes + ring.blocks).settled(ring.full_arrivals)
    yield state._replace(producers=put(state.producers, block, (step, True)), full=put(state.full, at, full))


def copying(ring: Ring, state: State, block: int) -> Iterator[State]:
    step, _ = state.producers[block]
    copies = state.copies | {(block, target, step) for target in range(ring.blocks)}
    yield state._replace(producers=put(state.producers, block, (step + 1, False)), copies=copies)


def released(ring: Ring, state: State, consumer: int) -> int:
    """Steps that a consumer no longer reads."""
    done = ring.programs[consumer][: state.consumers[consumer]]
    return len({step for kind, _, step in done if kind == "release"})


def delivered(ring: Ring, state: State, copy: tuple[int, int, int]) -> State:
    source, target, step = copy
    for consumer in range(target * CONSUMERS, (target + 1) * CONSUMERS):
        if released(ring, state, consumer) <= step - ring.stages:
            raise RingError("a copy overwrites a stage that is read")
    at = target * ring.stages + ring.stage(step)
    full = state.full[at]._replace(bytes=state.full[at].bytes - 1).settled(ring.full_arrivals)
    return state._replace(
        full=put(state.full, at, full),
        held=put(state.held, at * ring.blocks + source, step),
        copies=state.copies - {copy},
    )


def consumed(ring: Ring, state: State, consumer: int) -> Iterator[State]:
    kind, block, step = ring.programs[consumer][state.consumers[consumer]]
    after = state._replace(consumers=put(state.consumers, consumer, state.consumers[consumer] + 1))
    at = block * ring.stages + ring.stage(step)
    if kind == "release":
        empty = state.empty[at]
        if empty.pending == 0:
            raise RingError("more arrivals than a phase has")
        empty = empty._replace(pending=empty.pending - 1).settled(ring.empty_arrivals)
        yield after._replace(empty=put(state.empty, at, empty))
    elif state.full[at].over(ring.full_parity(step)):
        if state.full[at].phases != step // ring.stages + 1:
            raise RingError("a consumer's wait is a lap off")
        if any(held != step for held in state.held[at * ring.blocks : (at + 1) * ring.blocks]):
            raise RingError("a consumer reads a stage that is not there")
        yield after


def successors(ring: Ring, state: State) -> Iterator[State]:
    for block, (step, is_announced) in enumerate(state.producers):
        if is_announced:
            yield from copying(ring, state, block)
        elif step < ring.steps:
            yield from announced(ring, state, block)
    for copy in state.copies:
        yield delivered(ring, state, copy)
    for consumer, place in enumerate(state.consumers):
        if place < len(ring.programs[consumer]):
            yield from consumed(ring, state, consumer)


def is_over(ring: Ring, state: State) -> bool:
    ended = all(place == len(p) for place, p in zip(state.consumers, ring.programs, strict=True))
    return ended and not state.copies and all(step == ring.steps for step, _ in state.producers)


def explore(ring: Ring) -> int:
    """Every reachable state, counted; raises RingError at the first that must not be."""
    seen = {start(ring)}
    open_states = list(seen)
    while open_states:
        state = open_states.pop()
        following = set(successors(ring, state))
        if not following and not is_over(ring, state):
            raise RingError("deadlock")
        open_states += following - seen
        seen |= following
    return len(seen)


def ring_of(layout: ctypes.CDLL, stages: int, steps: int, blocks: int, **planted: object) -> Ring:
    return Ring(
        **{
            "stages": stages,
            "steps": steps,
            "blocks": blocks,
            "stage": lambda step: layout.ring_stage(step, stages),
            "full_parity": lambda step: layout.ring_full_parity(step, stages),
            "empty_parity": lambda step: layout.ring_empty_parity(step, stages),
            "full_arrivals": layout.ring_full_arrivals(),
            "empty_arrivals": layout.ring_empty_arrivals(blocks, CONSUMERS),
            "release_to": lambda block: tuple(range(blocks)),
            **planted,
        }
    )


@pytest.mark.parametrize("stages", [2, 3, 4, 9])
def test_a_jump_leads_where_its_steps_do(layout: ctypes.CDLL, stages: int) -> None:
    for step, further in itertools.product(range(3 * stages), range(3 * stages)):
        assert layout.ring_jumps(step, further, stages)


@pytest.mark.parametrize(("stages", "steps", "blocks"), [(2, 7, 1), (3, 10, 1), (4, 13, 1), (2, 5, 2)])
def test_no_interleaving_goes_wrong(layout: ctypes.CDLL, stages: int, steps: int, blocks: int) -> None:
    count = explore(ring_of(layout, stages, steps, blocks))
    assert count > steps


PLANTED = {
    "waits for one consumer only": ("overwrites", {"empty_arrivals": 1}),
    "waits for the own block's consumers only": (
        "overwrites",
        {"empty_arrivals": CONSUMERS, "release_to": lambda block: (block,)},
    ),
    "the first wait is for a release": ("deadlock", {"empty_parity": lambda step: step // 2 & 1}),
    "a consumer does not wait the first time": (
        "not there|a lap off",
        {"full_parity": lambda step: (step // 2 & 1) ^ 1},
    ),
    "waits for more consumers than there are": ("deadlock", {"empty_arrivals": 2 * CONSUMERS + 1}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_found(layout: ctypes.CDLL, name: str) -> None:
    message, planted = PLANTED[name]
    with pytest.raises(RingError, match=message):
        explore(ring_of(layout, 2, 5, 2, **planted))

"""What an operation does on the device, noted at its first call and repeated for tensors of the same layout.

Around its kernels an operation has guards, geometry, tiles and the specialization of every launch to settle,
in more time than a GPU takes for a small layer. All of it depends on layouts and options, not on values. A
tape is what is left once it is known: torch's operators and the launches, in order, with places for tensors.

Only a backend with ``tape_settings`` is taped: a hashable of all that its choices depend on besides the
arguments. What a tape cannot see it has to be told: launches by ``note``, all else by ``refuse``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

_MOST_TAPES = 1024  # of all operations; a batch of another size needs others

# The operators that are called most, as functions that take the same and cost the host a third of them.
_aten = torch.ops.aten
_FASTER: dict[Any, Callable[..., Any]] = {
    _aten.empty.memory_format: torch.empty,
    _aten.new_empty.default: Tensor.new_empty,
    _aten.full.default: torch.full,
    _aten.view.default: Tensor.view,
    _aten.reshape.default: Tensor.reshape,
    _aten.select.int: Tensor.select,
    _aten.sort.stable: Tensor.sort,
    _aten.add_.Tensor: Tensor.add_,
}


class _Step(NamedTuple):
    """One call: ``places`` of ``arguments`` are filled with the tensors of these slots."""

    function: Callable[..., Any]
    arguments: list[Any]
    places: list[tuple[int, int]]  # (index, slot)
    options: dict[str, Any]
    makes: slice  # slots of its results
    ends: list[int]  # slots that nobody reads after it


class Tape:
    """The calls of one operation for one layout of its tensors; plays in any thread."""

    def __init__(self, steps: list[_Step], slots: int, result: list[int], is_tuple: bool) -> None:
        self._steps, self._slots, self._result, self._is_tuple = steps, slots, result, is_tuple

    def play(self, tensors: Sequence[Tensor]) -> Any:
        """The operation's result for these tensors."""
        slots: list[Any] = [*tensors, *(None,) * (self._slots - len(tensors))]
        for function, template, places, options, makes, ends in self._steps:
            arguments = template.copy()
            for index, slot in places:
                arguments[index] = slots[slot]
            made = function(*arguments, **options)
            if makes.stop > makes.start:
                slots[makes] = (made,) if isinstance(made, Tensor) else made
            for slot in ends:
                slots[slot] = None  # memory is free for the next step, as in the operation itself
            del arguments, made
        found = [slots[slot] for slot in self._result]
        return tuple(found) if self._is_tuple else found[0] if found else None


class _Recorder(TorchDispatchMode):
    """Notes the torch operators of a thread; below autograd, whose views are other tensors than it sees."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._steps: list[_Step] = []
        self._slot_of = WeakTensorKeyDictionary()  # memory is freed as it would be without a recorder
        self._slots = 0
        self._new_slots(tensors)
        self._inputs = len(tensors)
        self.refused = False

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        made = function(*arguments, **(options or {}))
        results = made if isinstance(made, (tuple, list)) else (made,)
        if function is _aten.detach.default:  # torch.empty and its kin detach what they made from itself
            self._slot_of[made] = self._slot_of.get(arguments[0], -1)
        elif function.namespace == "aten" and all(isinstance(result, Tensor) for result in results):
            self.note(_FASTER.get(function, function), arguments, options or {}, results)
        else:
            self.refused = True  # what follows may depend on a value; our own operators note what they do too
        return made

    def note(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        options: dict[str, Any],
        made: Sequence[Any] = (),
    ) -> None:
        places = []
        for index, value in enumerate(arguments):
            if isinstance(value, Tensor):
                places.append((index, self._slot_of.get(value, -1)))
            elif isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
                self.refused = True
        self.refused |= any(slot < 0 for _, slot in places)
        self.refused |= any(isinstance(value, Tensor) for value in options.values())
        template = [None if isinstance(value, Tensor) else value for value in arguments]
        is_new = all(tensor not in self._slot_of for tensor in made)
        # an operator in place returns what it was given
        makes = self._new_slots(made) if is_new else slice(0, 0)
        self._steps.append(_Step(function, template, places, options, makes, []))

    def tape(self, result: Any) -> Tape | None:
        """What was noted; None where it could not be repeated."""
        is_tuple = isinstance(result, tuple)
        results = result if is_tuple else () if result is None else (result,)
        slots = [self._slot_of.get(tensor, -1) for tensor in results]
        if self.refused or min(slots, default=self._inputs) < self._inputs:
            return None
        seen = set(slots)
        for step in reversed(self._steps):
            mentioned = {*range(step.makes.start, step.makes.stop), *(slot for _, slot in step.places)}
            step.ends.extend(mentioned - seen)
            seen |= mentioned
        return Tape(self._steps, self._slots, slots, is_tuple)

    def _new_slots(self, tensors: Sequence[Tensor]) -> slice:
        first = self._slots
        for tensor in tensors:
            self._slot_of[tensor] = self._slots
            self._slots += 1
        return slice(first, self._slots)


class _Thread(threading.local):
    recorder: _Recorder | None = None


_thread = _Thread()
_tapes: dict[tuple[Any, ...], Tape | None] = {}
_bypasses = 0


@contextlib.contextmanager
def bypassed() -> Iterator[None]:
    """All operations make their choices anew inside, for whoever replaces what those depend on."""
    global _bypasses
    _bypasses += 1
    try:
        yield
    finally:
        _bypasses -= 1


def note(function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Tell the tape of this thread, if one is being made, of a call that returns nothing."""
    if _thread.recorder is not None:
        _thread.recorder.note(function, arguments, {})


def refuse() -> None:
    """Tell it of work that depends on more than layouts, or that it cannot see, as by a tensor's address."""
    if _thread.recorder is not None:
        _thread.recorder.refused = True


def run(name: str, settings: Any, body: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """``body(*arguments)``, by its tape where there is one.

    Args:
        name: the operation.
        settings: what its choices depend on besides the arguments, hashable.
        body: a function that returns a new tensor or a tuple of them, and changes none; or that returns
            nothing and changes its arguments, once it has allocated all that it needs.
        arguments: tensors, numbers, strings and lists of numbers.
    """
    if _bypasses or _thread.recorder is not None:
        return body(*arguments)
    key: list[Any] = [name, settings]
    tensors = []
    for value in arguments:
        if isinstance(value, Tensor):
            tensors.append(value)
            # the address as far as a launch is specialized on it
            key += (value.dtype, value.device, value.shape, value.stride(), value.data_ptr() % 16)
        else:
            key.append(tuple(value) if isinstance(value, list) else value)
    hashed = tuple(key)
    found = _tapes.get(hashed)
    if found is not None:
        # without memory the operation itself says for what
        with torch._C._AutoDispatchBelowAutograd(), contextlib.suppress(torch.OutOfMemoryError):
            return found.play(tensors)
    if hashed in _tapes:  # cannot be repeated, or has no memory
        return body(*arguments)
    if len({id(tensor) for tensor in tensors}) < len(tensors):
        return body(*arguments)  # one tensor twice: which of the two a call is given cannot be told
    _thread.recorder = recorder = _Recorder(tensors)
    try:
        with torch._C._AutoDispatchBelowAutograd(), recorder:
            result = body(*arguments)
    finally:
        _thread.recorder = None
    if len(_tapes) >= _MOST_TAPES:
        _tapes.clear()
    _tapes[hashed] = recorder.tape(result)
    return result

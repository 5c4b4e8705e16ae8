"""Checkpoints from which a run goes on bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from examples.batches import Share
from examples.data import short
from ghl_kernels.demo.errors import UserError
from ghl_kernels.demo.output import replacing


def save(
    path: Path, state: dict[str, Any], own: dict[str, Any], settings: dict[str, Any], share: Share
) -> None:
    """Write ``state`` of the first process, and of each its ``own`` with its random number generators.

    Every process has to call it. An interrupted write leaves the old file.

    Args:
        path: the file.
        state: tensors, numbers, strings and containers of them.
        own: likewise, what differs between processes.
        settings: what decides the run; ``load`` refuses others.
        share: which process this is.
    """
    mine = own | {"generators": _generators()}
    by_rank = [mine] * share.world
    if share.world > 1:
        torch.distributed.all_gather_object(by_rank, mine)
    if share.rank == 0:
        content = {"state": state, "by_rank": by_rank, "settings": _complete(settings, share)}
        with replacing(path) as unfinished:
            torch.save(content, unfinished)


def load(path: Path, settings: dict[str, Any], share: Share) -> dict[str, Any] | None:
    """State and this process's own in ``path``, the generators set to where they were; None without a file.

    Raises:
        UserError: the file cannot be read, is damaged, or is of a run with other settings or processes.
    """
    if not path.exists():
        return None
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    with file:
        try:
            # on the CPU: load_state_dict copies to where each tensor belongs
            content = torch.load(file, map_location="cpu", weights_only=True)
            kept, state, by_rank = content["settings"], content["state"], content["by_rank"]
        # a damaged file raises nearly anything, and torch's text for it advises to run what is in the file
        except Exception:
            raise UserError(
                f"{path} is damaged, or no checkpoint of these examples; "
                "give another --out, or delete it to start anew."
            ) from None
    now = _complete(settings, share)
    other = sorted(key for key in kept.keys() | now.keys() if kept.get(key) != now.get(key))
    if other:
        found = ", ".join(f"{key}={short(kept.get(key))!r} (now {short(now.get(key))!r})" for key in other)
        raise UserError(f"{path} is of a run with {found}; give another --out, or delete it to start anew.")
    own = by_rank[share.rank]
    _set_generators(own["generators"])
    return state | own


def _complete(settings: dict[str, Any], share: Share) -> dict[str, Any]:
    return settings | {"processes": share.world}


def _generators() -> dict[str, torch.Tensor]:
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda.get_rng_state()
    return generators


def _set_generators(generators: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(generators["cpu"])
    if "cuda" in generators and torch.cuda.is_available():
        torch.cuda.set_rng_state(generators["cuda"])

"""Checkpoints from which a run goes on bit for bit."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from ghl_kernels.demo.errors import UserError


def save(path: Path, state: dict[str, Any], settings: dict[str, Any]) -> None:
    """Write ``state`` with the random number generators; an interrupted write leaves the old file.

    Args:
        path: the file; its folder is made.
        state: tensors, numbers, strings and containers of them.
        settings: what decides the run; ``load`` refuses others.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda.get_rng_state()
    unfinished = path.with_suffix(".unfinished")
    torch.save({"state": state, "settings": settings, "generators": generators}, unfinished)
    os.replace(unfinished, path)


def load(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The state in ``path``, with the generators set to where they were; None where there is no file.

    Raises:
        UserError: the file is damaged, or a run with other settings wrote it.
    """
    if not path.exists():
        return None
    try:
        # on the CPU: load_state_dict copies to where each tensor belongs
        content = torch.load(path, map_location="cpu", weights_only=True)
        kept, state, generators = content["settings"], content["state"], content["generators"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is not a checkpoint of these examples: {error}.") from None
    other = sorted(key for key in kept.keys() | settings.keys() if kept.get(key) != settings.get(key))
    if other:
        found = ", ".join(f"{key}={kept.get(key)!r} (now {settings.get(key)!r})" for key in other)
        raise UserError(f"{path} is of a run with {found}; give another --out, or delete it to start anew.")
    torch.set_rng_state(generators["cpu"])
    if "cuda" in generators and torch.cuda.is_available():
        torch.cuda.set_rng_state(generators["cuda"])
    return state

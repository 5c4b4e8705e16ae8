"""The folder that receives results, and files that are there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError


def make_folder(folder: Path) -> None:
    """Make a folder, if it is not there, and make sure that files can be written into it.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        file = next(filter(os.path.isfile, (folder, *folder.parents)), None)
        reason = f"{file} is a file" if file else error.strerror or error
        raise UserError(f"The folder {folder} cannot be made: {reason}.") from None
    try:
        try_to_write(folder)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be written to: {error.strerror or error}.") from None


def try_to_write(folder: Path) -> None:
    """Make a file in a folder, and remove it: OSError where that cannot be done."""
    # permissions alone say little: of root, of a file system that is mounted read-only
    tempfile.TemporaryFile(dir=folder).close()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The path to write to in place of ``path``, which it replaces at the end.

    A write that is broken off leaves the old file, or none.
    """
    unfinished = path.with_name(f"{path.name}.unfinished")
    yield unfinished
    unfinished.replace(path)

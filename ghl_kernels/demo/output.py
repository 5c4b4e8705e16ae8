"""The folder that receives results."""

from __future__ import annotations

import os
import tempfile
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
        # permissions alone say little: of root, of a file system that is mounted read-only
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be written to: {error.strerror or error}.") from None

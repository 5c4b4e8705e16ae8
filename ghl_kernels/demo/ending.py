"""How a command ends: its exit code, and one line on stderr for what its user can mend."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

from ghl_kernels.demo.errors import UserError

MENDABLE = 2  # argparse's, too
INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def exit_code(work: Callable[[], int | None]) -> int:
    """Do the work of a command and write out what it printed.

    Returns:
        What ``work`` returns, 0 for None; 0 where the reader of stdout, such as head, has enough; 2 after a
        `UserError` and where there is no room for the output; 130 after Ctrl-C. The last two leave one line
        on stderr, with the message of the exception if it has one.

    Raises:
        SystemExit: of argparse.
    """
    try:
        code = _attempt(work)
    except SystemExit:  # its help, too, may find no room
        if unwritten := _attempt(_flush):
            return unwritten
        raise
    return _attempt(_flush) or code


def _attempt(work: Callable[[], int | None]) -> int:
    try:
        return work() or 0
    except UserError as error:
        return _say(f"error: {error}", MENDABLE)
    except KeyboardInterrupt as stopped:
        return _say(f"interrupted: {stopped}" if stopped.args else "interrupted", INTERRUPTED)
    except SystemExit as stopped:
        if not isinstance(stopped.__context__, BrokenPipeError):  # of rich, which ends the process for it
            raise
    except BrokenPipeError:
        _drop()
    except OSError as error:
        if error.errno not in _FULL:
            raise
        _drop()
        return _say(f"error: {error.filename or 'The output'} cannot be written: {error.strerror}.", MENDABLE)
    return 0


def _say(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code


def _flush() -> None:
    if sys.stdout is not None:  # a shell's >&- leaves none
        sys.stdout.flush()


def _drop() -> None:
    """Forget what stdout does not take: the interpreter would try again at its end, and complain."""
    try:
        _flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

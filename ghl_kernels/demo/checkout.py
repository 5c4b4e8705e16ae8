"""The commit of this package's code, if it runs from a git checkout."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def describe() -> dict[str, str | bool | None]:
    """``commit``, and ``uncommitted_changes`` of tracked files; None where there is no checkout or no git."""
    commit, _, top = _git("rev-parse", "HEAD", "--show-toplevel").partition("\n")
    # a package that was installed below another project's checkout is not that project's code
    if not top or Path(top) != ROOT:
        return {"commit": None, "uncommitted_changes": None}
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "uncommitted_changes": bool(changed)}


def _git(*arguments: str) -> str:
    """What git prints, "" where it fails."""
    command = ["git", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()

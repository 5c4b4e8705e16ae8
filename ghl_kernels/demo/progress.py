"""Progress of long work: a bar on a terminal, a line per finished part elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import TextIO

import rich.console
import rich.progress


class Progress:
    """A context manager; ``total`` is in the units of `advance`.

    Args:
        total: units of work.
        stream: where to show it. If it is no terminal, only notes are written.
    """

    def __init__(self, total: float, stream: TextIO) -> None:
        console = rich.console.Console(file=stream)
        self._console = console
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description:<28}"),
            rich.progress.BarColumn(bar_width=None),
            rich.progress.TaskProgressColumn(),
            rich.progress.TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def describe(self, text: str) -> None:
        """Say what is being done now."""
        self._bar.update(self._task, description=text)

    def advance(self, amount: float = 1.0) -> None:
        """Count work as done."""
        self._bar.advance(self._task, amount)

    def note(self, text: str) -> None:
        """Leave a line where no bar is shown."""
        if not self._console.is_terminal:
            print(text, file=self._console.file, flush=True)

"""Compiles kernels in processes of its own, while the caller goes on finding more of them."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.pool import AsyncResult

from bench.aot.compilation import Compilation, compile_


class Compiler:
    """Compiles each kernel once, the first one submitted first.

    What is compiled lands in Triton's cache under the key that a launch looks up.
    """

    def __init__(self, processes: int) -> None:
        # a Pool and no executor: a compiler that crashes costs one kernel and not all that follow
        self._pool = multiprocessing.get_context("spawn").Pool(processes)
        self._results: dict[str, AsyncResult[str]] = {}

    def submit(self, compilation: Compilation) -> None:
        """Queue a kernel, unless it is there already."""
        if compilation.key not in self._results:
            self._results[compilation.key] = self._pool.apply_async(_compile, (compilation,))

    @property
    def submitted(self) -> int:
        return len(self._results)

    def finish(self, seconds: float) -> tuple[int, list[str]]:
        """Wait so long at most, end the processes; how many kernels are compiled, and the problems."""
        end = time.monotonic() + seconds
        for result in self._results.values():
            result.wait(max(0.0, end - time.monotonic()))
        ready = [result.get() for result in self._results.values() if result.ready()]
        self._pool.terminate()
        return len(ready), [problem for problem in ready if problem]


def _compile(compilation: Compilation) -> str:
    try:
        compile_(compilation)
    except Exception as error:  # the stage that launches it will show the same error in full
        return f"{compilation.kernel} {compilation.constexprs}: {type(error).__name__}: {str(error)[:200]}"
    return ""

"""Which form of its pair kernel the CUDA backend takes."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

from ghl_kernels._tape import bypassed
from ghl_kernels.backends.cuda.kernels import correlate

VARIABLE = "GHL_GPU_CHECK_FORM"


@contextlib.contextmanager
def forced(form: str) -> Iterator[None]:
    """Every correlation of the CUDA backend inside takes this form of the kernel, never the library."""
    real = correlate.correlate
    with (
        bypassed(),
        mock.patch.object(correlate, "correlate", functools.partial(real, form=form)),
        _few_columns(form),
        mock.patch.object(correlate, "prefers_library", return_value=False),
    ):
        yield


@contextlib.contextmanager
def sound() -> Iterator[None]:
    """No correlation inside takes a form that was found broken; the environment names the one to take."""
    form, real = os.environ.get(VARIABLE), correlate.correlate

    def choose(*args: Any, **options: Any) -> Any:
        return real(*args, **(options | {"form": form}))

    if not form:
        yield
        return
    with mock.patch.object(correlate, "correlate", choose), _few_columns(form):
        yield


@contextlib.contextmanager
def _few_columns(form: str) -> Iterator[None]:
    """The other forms get an input of few channels as if there were none for it: padded, and no lists."""
    with contextlib.ExitStack() as replaced:
        if form not in ("automatic", "narrow"):
            for asked in ("takes_few_columns", "takes_winners", "pairs_lists"):
                replaced.enter_context(mock.patch.object(correlate, asked, return_value=False))
        yield

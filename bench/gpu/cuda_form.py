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
        mock.patch.object(correlate, "prefers_library", return_value=False),
    ):
        yield


@contextlib.contextmanager
def sound() -> Iterator[None]:
    """No correlation inside takes a form that was found broken; the environment names the one to take."""
    form, real = os.environ.get(VARIABLE), correlate.correlate

    def choose(*args: Any, **options: Any) -> Any:
        return real(*args, **(options | {"form": form}))

    with mock.patch.object(correlate, "correlate", choose) if form else contextlib.nullcontext():
        yield

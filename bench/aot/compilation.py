"""Recorded launches compiled ahead of time, for any architecture and without a GPU.

Arguments are specialized by Triton's own code, the way a launch specializes them, so that what is compiled
is what a GPU would run, down to the key in Triton's cache: compiled here, a later launch only loads it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from typing import Any, NamedTuple

from ghl_kernels.backends.triton.arch import Arch
from ghl_kernels.backends.triton.launch import Launch


class Compilation(NamedTuple):
    """What one compilation is made from; the kernel by its name, so that it can travel to a process."""

    module: str
    kernel: str
    arch: Arch
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Equal for launches that run the same machine code."""
        return repr((*self[:3], *(sorted(part.items(), key=repr) for part in self[3:])))

    @property
    def constexprs(self) -> dict[str, Any]:
        """Compile-time constants by parameter name: tile sizes, choices, and integers that are 1."""
        names = list(self.signature)
        return {names[path[0]]: value for path, value in self.constants.items()}


def specialize(launch: Launch, arch: Arch) -> Compilation:
    """The compilation that this launch asks for on an architecture."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel = launch.kernel
    backend = make_backend(_target(arch))
    asked = {**launch.arguments, **launch.options, "debug": False}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = binder(**asked)
    options, signature, constants, attributes = kernel._pack_args(
        backend, asked, bound, specialization, asked
    )
    return Compilation(
        kernel.fn.__module__,
        kernel.fn.__name__,
        arch,
        signature,
        constants,
        attributes,
        dict(options.__dict__),
    )


def compile_(compilation: Compilation, *, again: bool = False) -> tuple[Any, str]:
    """(Triton's compiled kernel, what ptxas said about it).

    ``again`` compiles even what the cache holds: only a compilation has ptxas speak.
    """
    import triton
    from triton import knobs
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(compilation.module), compilation.kernel)
    source = ASTSource(kernel, compilation.signature, compilation.constants, compilation.attributes)
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        knobs.compilation.always_compile = again
        knobs.nvidia.dump_ptxas_log = again
        compiled = triton.compile(source, target=_target(compilation.arch), options=compilation.options)
    return compiled, log.getvalue()


def _target(arch: Arch) -> Any:
    from triton.backends.compiler import GPUTarget

    if arch.is_amd:
        return GPUTarget("hip", arch.name, arch.warp)
    return GPUTarget("cuda", int(arch.name.removeprefix("sm_")), arch.warp)

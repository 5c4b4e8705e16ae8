"""What a compiled kernel asks of the hardware, read from the compiler's own output; and its budgets."""

from __future__ import annotations

import collections
import dataclasses
import functools
import multiprocessing
import pathlib
import re
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from bench.aot.compilation import Compilation, compile_

# ptxas: "wgmma.mma_async instructions are serialized due to ...", one number for each cause
_SERIALIZED = re.compile(r"\bC751[0-6]\b")
_TENSOR_CORE = re.compile(r"^(HGMMA|HMMA|UTC[A-Z]*MMA)$")
_WGMMA_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Measured:
    """One kernel on one architecture; bytes, and registers per thread."""

    kernel: str
    arch: str
    constants: str
    dtypes: str
    warps: int
    stages: int
    registers: int
    spill: int
    shared: int
    shared_limit: int
    serialized: tuple[str, ...]
    dot_rows: int  # of the largest product of 16-bit operands, 0 without one
    matrix: dict[str, int]
    loads: int
    wide_loads: int  # of 16 bytes a thread
    seconds: float
    problems: tuple[str, ...] = ()


def measure(compilation: Compilation) -> Measured:
    """Compile and read, in a process that the compiler may crash; a failure is the problem reported."""
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as apart:
            return apart.submit(_measure, compilation).result()
    except BrokenProcessPool:
        return _failed(compilation, "the compiler crashes (its message is on standard error)")


def _about(compilation: Compilation) -> dict[str, Any]:
    return {
        "kernel": compilation.kernel,
        "arch": compilation.arch.name,
        "constants": _choices(compilation),
        "dtypes": " ".join(sorted({t for t in compilation.signature.values() if t.startswith("*")})),
        "warps": compilation.options["num_warps"],
        "stages": compilation.options["num_stages"],
        "shared_limit": compilation.arch.shared_memory,
    }


def _failed(compilation: Compilation, problem: str) -> Measured:
    nothing = dict.fromkeys(("registers", "spill", "shared", "dot_rows", "loads", "wide_loads"), 0)
    return Measured(
        **_about(compilation), **nothing, serialized=(), matrix={}, seconds=0.0, problems=(problem,)
    )


def _measure(compilation: Compilation) -> Measured:
    start = time.perf_counter()
    try:
        compiled, log = compile_(compilation, again=True)
    except Exception as error:  # whatever the compiler raises is the finding
        return _failed(compilation, f"does not compile: {type(error).__name__}: {str(error).strip()[:300]}")
    read = _read_amd if compilation.arch.is_amd else _read_nvidia
    measured = Measured(
        **_about(compilation),
        **read(compiled, log),
        shared=compiled.metadata.shared,
        dot_rows=_dot_rows(compiled.asm["ttir"]),
        seconds=time.perf_counter() - start,
    )
    return dataclasses.replace(measured, problems=tuple(_problems(measured)))


def _problems(m: Measured) -> list[str]:
    """The budgets a kernel breaks."""
    problems = []
    if m.spill:
        problems.append(f"spills {m.spill} bytes a thread ({m.registers} registers)")
    if m.shared > m.shared_limit:
        problems.append(f"asks for {m.shared} bytes of shared memory, the limit is {m.shared_limit}")
    if m.serialized and m.dot_rows:
        problems.append(f"serialized wgmma ({', '.join(m.serialized)})")
    if m.dot_rows and not m.matrix:
        problems.append("multiplies 16-bit operands without tensor cores")
    wide = m.dot_rows >= _WGMMA_ROWS and m.warps >= 4
    if wide and m.arch == "sm_90" and "HGMMA" not in m.matrix:
        problems.append(f"a product of {m.dot_rows} rows that does not use wgmma")
    return problems


def _choices(compilation: Compilation) -> str:
    """The constants that were chosen, tersely: what is False is left out, absent pointers come last."""
    chosen, absent = [], []
    for name, value in compilation.constexprs.items():
        if name.endswith("_ptr") and value is None:
            absent.append(f"-{name.removesuffix('_ptr')}")
        elif name.isupper() and value is True:
            chosen.append(name)
        elif name.isupper() and value is not False:
            chosen.append(f"{name}={value}")
    return " ".join([*chosen, *absent])


def _dot_rows(ttir: str) -> int:
    rows = [int(m) for m in re.findall(r"tt\.dot [^\n]*-> tensor<(\d+)x", _sixteen_bit_dots(ttir))]
    return max(rows, default=0)


def _sixteen_bit_dots(ttir: str) -> str:
    return "\n".join(re.findall(r"tt\.dot [^\n]*tensor<\d+x\d+xb?f16>[^\n]*", ttir))


def _read_nvidia(compiled: Any, log: str) -> dict[str, Any]:
    """Registers, spills and warnings as ptxas reports them; instructions from the machine code."""
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    opcodes = _sass_opcodes(compiled.asm["cubin"])
    names = collections.Counter(opcode.split(".")[0] for opcode in opcodes)
    global_loads = [o for o in opcodes if o.startswith(("LDG", "LDGSTS"))]
    return {
        "registers": max((int(n) for n in re.findall(r"Used (\d+) registers", log)), default=0),
        "spill": sum(int(stored) + int(loaded) for stored, loaded in spills),
        "serialized": tuple(sorted(set(_SERIALIZED.findall(log)))),
        "matrix": {name: count for name, count in sorted(names.items()) if _TENSOR_CORE.match(name)},
        "loads": len(global_loads),
        "wide_loads": sum(".128" in opcode for opcode in global_loads),
    }


def _sass_opcodes(cubin: bytes) -> list[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_nvidia_tools() / "nvdisasm", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instruction = r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)"
    return re.findall(instruction, text, re.MULTILINE)


@functools.cache
def _nvidia_tools() -> pathlib.Path:
    import triton

    return pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _read_amd(compiled: Any, log: str) -> dict[str, Any]:
    """Everything from the assembler's metadata and text; scratch is memory that spilled registers go to."""
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return max((int(n) for n in re.findall(rf"\.{name}:\s+(\d+)", text)), default=0)

    loads = re.findall(r"^\s+(?:global|buffer|flat)_load_\w+", text, re.MULTILINE)
    mfma = collections.Counter(re.findall(r"^\s+(v_mfma_\w+)", text, re.MULTILINE))
    return {
        "registers": field("vgpr_count"),
        "spill": max(4 * field("vgpr_spill_count"), field("private_segment_fixed_size")),
        "serialized": (),
        "matrix": dict(sorted(mfma.items())),
        "loads": len(loads),
        "wide_loads": sum(load.endswith("dwordx4") for load in loads),
    }

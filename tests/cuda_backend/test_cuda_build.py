"""The CUDA module as pip builds it for GPUs: what it links, that it loads without a driver, what it uses."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ALLOWED_LIBRARIES = r"(libstdc\+\+|libgcc_s|libm|libc|libpthread|libdl|librt|ld-linux-[\w-]+)\.so\.\d+"
# Of a block of 256 threads a multiprocessor of any supported GPU holds 65536 / 255 registers a thread.
MOST_REGISTERS = 255
# What every block may have without asking, of static shared memory.
MOST_STATIC_SHARED = 48 << 10


def built_module() -> Path:
    """The module for GPUs, which the host's build must not stand in for."""
    spec = importlib.util.find_spec("ghl_kernels")
    assert spec is not None
    assert spec.origin is not None
    modules = list(Path(spec.origin).parent.glob("_cuda*.so"))
    if not modules:
        pytest.skip("the CUDA module is not built for GPUs here (no nvcc, or GHL_BUILD_CUDA=0)")
    return modules[0]


def tool(name: str) -> str:
    """A program of the CUDA toolkit, from PATH or from Triton's wheel."""
    found = shutil.which(name)
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        found = shutil.which(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name))
    if found is None:
        pytest.skip(f"{name} is neither on PATH nor in Triton's wheel")
    return found


def output(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def test_loads_without_a_driver_and_says_what_there_is() -> None:
    built_module()
    script = """
from ghl_kernels import _native
from ghl_kernels.backends import cuda
module = _native.load_cuda()
print(module.build_info()["on_host"], module.device_count()[0])
print(cuda.status())
"""
    environment = {name: value for name, value in os.environ.items() if name != "GHL_NATIVE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    facts, status = done.stdout.splitlines()
    on_host, count = facts.split()
    assert on_host == "False"
    if count == "0":
        assert status.startswith("(False")
        assert "but there is no GPU" in status


def test_needs_only_the_compiler_s_libraries() -> None:
    dynamic = output(tool("readelf"), "-d", built_module())
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert needed
    assert [name for name in needed if not re.fullmatch(ALLOWED_LIBRARIES, name)] == []
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_has_no_torch_symbols_and_exports_only_its_entry() -> None:
    symbols = output(tool("nm"), "-D", "--demangle", built_module())
    assert not re.search(r"\b(at|c10|torch|caffe2)::|THP", symbols)
    assert re.findall(r"^[0-9a-f]+ T (\S+)", symbols, re.MULTILINE) == ["PyInit__cuda"]


@pytest.fixture(scope="module")
def kernels() -> dict[str, dict[str, tuple[int, int, int]]]:
    """By architecture and kernel: registers a thread, bytes of stack and spills a thread, shared bytes."""
    text = output(tool("cuobjdump"), "--dump-resource-usage", built_module())
    found: dict[str, dict[str, tuple[int, int, int]]] = {}
    architecture = ""
    for line in text.splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            memory = usage["STACK"] + usage["LOCAL"]
            found.setdefault(architecture, {})[name] = (usage["REG"], memory, usage["SHARED"])
    return found


def test_every_kernel_is_there_for_every_architecture(
    kernels: dict[str, dict[str, tuple[int, int, int]]],
) -> None:
    if os.environ.get("GHL_CUDA_ARCHS"):
        pytest.skip("GHL_CUDA_ARCHS chooses other architectures")
    assert set(kernels) >= {"sm_80", "sm_90a", "sm_100"}
    names = {architecture: set(of) for architecture, of in kernels.items()}
    # what is written for Hopper alone has an empty body elsewhere
    assert names["sm_80"] == names["sm_90a"] == names["sm_100"]
    assert any("compete" in name for name in names["sm_80"])


def test_kernels_keep_their_budgets(kernels: dict[str, dict[str, tuple[int, int, int]]]) -> None:
    broken = [
        f"{architecture} {name}: {registers} registers, {memory} bytes of stack, {shared} bytes shared"
        for architecture, of in kernels.items()
        for name, (registers, memory, shared) in of.items()
        if registers > MOST_REGISTERS or memory or shared > MOST_STATIC_SHARED
    ]
    assert broken == []


@functools.cache
def disassembly(architecture: str) -> str:
    return output(tool("cuobjdump"), "-sass", "-arch", architecture, built_module())


def test_hopper_has_its_own_instructions() -> None:
    sass = disassembly("sm_90a")
    for instruction in (
        r"HGMMA\.64x256x16\.F32\.BF16",
        r"UTMALDG\.\dD\.IM2COL",
        r"UTMALDG.*MULTICAST",
        "USETMAXREG",
    ):
        assert re.search(instruction, sass), instruction


@pytest.mark.parametrize(
    "instruction", ["HMMA.16816.F32.BF16", "HMMA.16816.F32 ", "HMMA.1688.F32.TF32", "LDGSTS", "LDSM"]
)
def test_ampere_uses_tensor_cores_and_asynchronous_copies(instruction: str) -> None:
    assert instruction in disassembly("sm_80")

"""The CUDA module as pip builds it for GPUs: what it links, that it loads without a driver, what it uses."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ALLOWED_LIBRARIES = r"(libstdc\+\+|libgcc_s|libm|libc|libpthread|libdl|librt|ld-linux-[\w-]+)\.so\.\d+"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
# Of registers: what another release of nvcc may make of the same source. They are dealt out eight at a time.
SLACK = 8
# What the system takes of each block's shared memory, from sm_90 on, where a block has any.
RESERVED_SHARED = 1024
# The rows of docs/cuda.md's table of registers, and the mangled names of their kernels.
KERNELS = {
    "pair, sm_80 form: 16 bits, wide": r"11pair_kernelI.*6Config.*(4Bf16|3F16)ELb1",
    "pair, sm_80 form: 16 bits, narrow": r"11pair_kernelI.*6Config.*(4Bf16|3F16)ELb0",
    "pair, sm_80 form: tf32, wide": r"11pair_kernelI.*6Config.*4Tf32ELb1",
    "pair, sm_80 form: tf32, narrow": r"11pair_kernelI.*6Config.*4Tf32ELb0",
    "pair, sm_80 form: float32, wide": r"11pair_kernelI.*6Config.*6Tf32x3ELb1",
    "pair, sm_80 form: float32, narrow": r"11pair_kernelI.*6Config.*6Tf32x3ELb0",
    "pair, narrow form: 32 x 32 a warp": r"13narrow_kernelI.*6Config.*Li2ELi4E",
    "pair, narrow form: 48 x 40 a warp": r"13narrow_kernelI.*6Config.*Li3ELi5E",
    "pair, narrow form: 64 x 40 a warp": r"13narrow_kernelI.*6Config.*Li4ELi5E",
    "pair, sm_90 form": r"4sm9011pair_kernel",
    "pair, sums of the parts": r"10sum_kernel|12sum_partials",
    "depthwise, vectors, both results": r"16depthwise_kernelI.*Li4ELi2E",
    "depthwise, vectors, one result": r"16depthwise_kernelI.*Li4ELi1E",
    "depthwise, elements": r"16depthwise_kernelI.*Li1ELi[12]E",
    "depthwise, sums of the slices": r"17sum_slices_kernel",
    "competition, rows up to 128: 16 bits": r"15few_rows_kernelIN.*4?(bf16|f16)E",
    "competition, rows up to 128: float32": r"15few_rows_kernelIf",
    "competition, planes up to 128": r"17few_planes_kernel",
    "competition, rows up to 384: 16 bits": r"11rows_kernelIN.*4?(bf16|f16)ELi12E",
    "competition, rows up to 512: 16 bits": r"11rows_kernelIN.*4?(bf16|f16)ELi16E",
    "competition, rows up to 512: float32": r"11rows_kernelIfLi16E",
    "competition, rows up to 1024: 16 bits": r"11rows_kernelIN.*4?(bf16|f16)ELi32E",
    "competition, rows up to 1024: float32": r"11rows_kernelIfLi32E",
    "competition, rows up to 1536: 16 bits": r"11rows_kernelIN.*4?(bf16|f16)ELi48E",
    "competition, planes up to 384": r"13planes_kernelI.*Li12E",
    "competition, planes up to 512": r"13planes_kernelI.*Li16E",
    "competition, planes up to 1024": r"13planes_kernelI.*Li32E",
    "competition, planes up to 1536": r"13planes_kernelI.*Li48E",
    "competition, more units": r"11long_kernel",
    "sums of activities": r"19partial_sums_kernel|17add_splits_kernel",
    "sparse, gather": r"13gather_kernel",
    "sparse, sort": r"12count_kernel|12place_kernel|16scan_bins_kernel|18scan_slices_kernel",
    "sparse, sums of the segments": r"14combine_kernel",
    "epilogue": r"(6reduce|5apply)I",
    "check of a device": r"7nothing",
}


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
    assert set(kernels) >= set(ARCHITECTURES)
    names = {architecture: set(of) for architecture, of in kernels.items()}
    # what is written for Hopper alone has an empty body elsewhere
    assert names["sm_80"] == names["sm_90a"] == names["sm_100"]
    assert any("compete" in name for name in names["sm_80"])


def documented() -> dict[str, list[int]]:
    """docs/cuda.md's table: registers on each architecture, then bytes of static shared memory."""
    rows = [line.strip("|").split("|") for line in (ROOT / "docs/cuda.md").read_text().splitlines()]
    return {row[0].strip(): [int(n) for n in row[1:]] for row in rows if row[0].strip() in KERNELS}


def test_no_kernel_spills(kernels: dict[str, dict[str, tuple[int, int, int]]]) -> None:
    assert [name for of in kernels.values() for name, (_, memory, _) in of.items() if memory] == []


@pytest.mark.parametrize("label", KERNELS)
def test_kernels_keep_their_documented_budgets(
    kernels: dict[str, dict[str, tuple[int, int, int]]], label: str
) -> None:
    *registers, shared = documented()[label]
    for architecture, expected in zip(ARCHITECTURES, registers, strict=True):
        if architecture not in kernels:
            continue
        of = [usage for name, usage in kernels[architecture].items() if re.search(KERNELS[label], name)]
        most = max(usage[0] for usage in of)
        assert expected - SLACK <= most <= expected + SLACK, f"{most} registers on {architecture}"
        reserved = 0 if architecture == "sm_80" else RESERVED_SHARED
        assert max(usage[2] for usage in of) <= shared + reserved, architecture


def test_every_kernel_is_documented(kernels: dict[str, dict[str, tuple[int, int, int]]]) -> None:
    for name in {name for of in kernels.values() for name in of}:
        labels = [label for label, pattern in KERNELS.items() if re.search(pattern, name)]
        assert len(labels) == 1, (name, labels)


def options_of_the_build(**environment: str) -> list[str]:
    """What setup.py tells CMake of the CUDA module."""
    script = "import runpy, setuptools\nsetuptools.setup = lambda **_: None\n"
    script += 'print(*runpy.run_path("setup.py")["cuda_options"](), sep="\\n")'
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GHL_")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=inherited | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_build_keeps_no_option_of_an_earlier_one() -> None:
    """CMake remembers what it was told once, in a folder that the next build uses too."""
    chosen = options_of_the_build(GHL_CUDA_ARCHS="90a-real", GHL_DEBUG_WAITS="1", GHL_BUILD_NATIVE="0")
    assert {"-DGHL_CUDA_ARCHS=90a-real", "-DGHL_DEBUG_WAITS=ON"} <= set(chosen)
    unset = options_of_the_build(GHL_BUILD_NATIVE="0")
    assert {"-UGHL_CUDA_ARCHS", "-DGHL_DEBUG_WAITS=OFF"} <= set(unset)


def configured(folder: Path, *options: str) -> str:
    """How the kernels would be compiled with these options of CMake."""
    tools = [tool("cmake"), "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    tools += [f"-Dpybind11_DIR={importlib.import_module('pybind11').get_cmake_dir()}"]
    tool("nvcc")
    output(*tools, f"-DPython_EXECUTABLE={sys.executable}", "-DGHL_CPU=OFF", "-DGHL_CUDA=ON", *options)
    commands = json.loads((folder / "compile_commands.json").read_text())
    return "\n".join(entry["command"] for entry in commands if entry["file"].endswith(".cu"))


@pytest.mark.slow
def test_options_reach_the_compiler(tmp_path: Path) -> None:
    """A warning of a compiler that we do not know must not keep anybody from installing."""
    assert not re.search("Werror|GHL_DEBUG_WAITS", configured(tmp_path))
    flags = configured(tmp_path, "-DGHL_WARNINGS_AS_ERRORS=ON", "-DGHL_DEBUG_WAITS=ON")
    assert "-Werror=all-warnings" in flags
    assert "-DGHL_DEBUG_WAITS" in flags


@pytest.mark.slow
def test_no_kernel_makes_a_compiler_warn(tmp_path: Path) -> None:
    configured(tmp_path, "-DGHL_WARNINGS_AS_ERRORS=ON")
    command = [tool("cmake"), "--build", str(tmp_path), "--target", "cuda_kernels"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


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

"""The Hopper pair kernel as nvcc compiles it: budgets, and the instructions that it is about."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DTYPES = {"bf16": "F32.BF16", "f16": "F32"}
TILES = ((64, 4), (64, 3), (64, 2), (64, 1), (32, 8), (32, 7))  # channels of a chunk, chunks
KERNELS = [(dtype, chunk, chunks) for dtype in DTYPES for chunk, chunks in TILES]
REGISTERS = 65536 // 384 // 8 * 8  # of a thread, as the block starts
CONSUMER_REGISTERS = 224  # after setmaxnreg
Kernel = tuple[str, int, int]
Hopper = tuple[str, dict[Kernel, list[str]]]


def tool(name: str, *folders: Path) -> Path:
    found = shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")]))
    if found is None:
        pytest.skip(f"needs {name}")
    return Path(found)


def cuobjdump() -> Path:
    triton = find_spec("triton")
    folders = [Path(p) / "backends/nvidia/bin" for p in (triton and triton.submodule_search_locations) or []]
    return tool("cuobjdump", *folders)


def compiled(target: Path, *flags: str) -> str:
    """What ptxas says of the file, compiled with warnings as errors."""
    nvcc = tool("nvcc", Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin")
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}"]
    options = ["-std=c++20", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", "-c", *include, *flags]
    command = [nvcc, *options, ROOT / "csrc/cuda/pair_sm90.cu", "-o", target]
    # a sanitizer that is loaded into Python would be loaded into the compiler too
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def for_archs(*archs: str) -> list[str]:
    return [flag for arch in archs for flag in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> Hopper:
    """ptxas's report, and the instructions of each kernel."""
    target = tmp_path_factory.mktemp("sm90") / "pair_sm90.o"
    report = compiled(target, *for_archs("90a"))
    dump = subprocess.run([cuobjdump(), "-sass", target], capture_output=True, text=True, check=True).stdout
    kernels: dict[Kernel, list[str]] = {}
    for function in dump.split("Function : ")[1:]:
        name, _, body = function.partition("\n")
        if found := re.search(r"pair_kernel.*?\d(bf16|f16)E.*?4TileILi(\d+)ELi(\d+)E", name):
            kernel = (found[1], int(found[2]), int(found[3]))
            kernels[kernel] = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", body, re.M)
    assert sorted(kernels) == sorted(KERNELS)
    return report, kernels


def test_budgets(hopper: Hopper) -> None:
    report, _ = hopper
    used = [int(number) for number in re.findall(r"Used (\d+) registers", report)]
    # the kernels, and the one that sums their parts
    assert len(used) == len(KERNELS) + 1
    # setmaxnreg deals out what the block starts with: fewer, and a consumer would wait for more forever
    assert set(sorted(used)[1:]) == {REGISTERS}
    spilled = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
    )
    assert set(spilled) == {("0", "0", "0")}


def test_ptxas_serializes_nothing(hopper: Hopper) -> None:
    report, _ = hopper
    assert "C75" not in report
    assert "serializ" not in report.lower()


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_instructions(hopper: Hopper, kernel: Kernel) -> None:
    dtype, chunk, chunks = kernel
    lines = hopper[1][kernel]
    count = Counter(word for line in lines for word in line.split() if "." in word)
    # softmax and any activity, of the first, odd and even stages, and the gradient: two steps of a stage each
    assert count[f"HGMMA.64x{chunk * chunks}x16.{DTYPES[dtype]}"] == 14
    for copy in ("UTMALDG.2D", "UTMALDG.4D.IM2COL", "UTMALDG.5D.IM2COL"):
        assert count[copy] > 0
        assert count[f"{copy}.MULTICAST"] > 0
    assert sum(word.startswith("USETMAXREG") for word in count) == 2
    highest = max(int(number) for line in lines for number in re.findall(r"\bR(\d+)\b", line))
    assert highest < CONSUMER_REGISTERS


def registers(operand: str, count: int) -> set[int]:
    first = re.fullmatch(r"R(\d+)", operand)
    return set(range(int(first[1]), int(first[1]) + count)) if first else set()


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_nothing_touches_registers_that_wgmma_uses(hopper: Hopper, kernel: Kernel) -> None:
    _, chunk, chunks = kernel
    sums: set[int] = set()
    groups: list[set[int]] = [set()]  # the left operands of those under way, and of the one that is queued
    waits = 0
    for line in hopper[1][kernel]:
        if "HGMMA" in line:
            target, left = re.search(r"HGMMA\S+ (R\d+), ([^,]+),", line).groups()  # type: ignore[union-attr]
            sums |= registers(target, chunk * chunks // 2)
            groups[-1] |= registers(left, 4)
            if "gsb0" in line:
                groups.append(set())
        elif waited := re.search(r"WARPGROUP.DEPBAR.LE gsb0, 0x(\d)", line):
            waits += 1
            pending = int(waited[1])
            groups = groups[-1 - pending :]
            sums = sums if pending else set()
        else:
            touched = [int(number) for number in re.findall(r"\bR(\d+)\b", line)]
            assert not sums & set(touched), line
            # a left operand may be copied while it is read
            assert not set().union(*groups) & set(touched[:1]), line
    assert waits == 8


@pytest.mark.slow
def test_compiles_for_others(tmp_path: Path) -> None:
    report = compiled(tmp_path / "others.o", *for_archs("80", "90", "100"))
    used = [int(number) for number in re.findall(r"Used (\d+) registers", report)]
    # by which a launcher tells that the kernel has no body there
    assert max(used) < REGISTERS


@pytest.mark.slow
def test_compiles_with_bounded_waits(tmp_path: Path) -> None:
    compiled(tmp_path / "debug.o", *for_archs("90a"), "-DGHL_DEBUG_WAITS")

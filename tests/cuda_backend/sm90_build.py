"""Building what the tests of the Hopper pair kernel run on a CPU."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = Path(__file__).parent / "sm90"
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def runs_sanitized() -> bool:
    """Whether the runtime of AddressSanitizer is loaded, as tools/cuda_on_host --sanitize does."""
    return "libasan" in os.environ.get("LD_PRELOAD", "")


def compile_cpp(target: Path, *arguments: str | Path) -> Path:
    """Compiles with g++ and the project's headers, warnings as errors; skips where there is no g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}"]
    options = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi"]
    # the compiler itself needs no sanitizer
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    # the caller's folders first
    command = [compiler, *options, *map(str, arguments), *include, "-o", str(target)]
    subprocess.run(command, check=True, env=environment)
    return target


def layout_library(folder: Path) -> ctypes.CDLL:
    """The arithmetic of pair_sm90_layout.h."""
    library = ctypes.CDLL(
        str(compile_cpp(folder / "layout.so", "-O1", "-shared", "-fPIC", SOURCES / "layout.cpp"))
    )
    library.partial_index.restype = library.block_workspace.restype = ctypes.c_int64
    return library


def kernel_library(folder: Path, csrc: Path = ROOT / "csrc", *, sanitize: bool = False) -> ctypes.CDLL:
    """The kernel, its host code, and twins of its instructions; `csrc` replaces the project's sources."""
    if not (CUDA / "cuda.h").exists():
        pytest.skip(f"needs cuda.h, which is not in {CUDA} (CUDA_HOME)")
    sources = [SOURCES / "on_host.cpp", csrc / "cuda/host/runtime.cpp"]
    options = [
        *(SANITIZE if sanitize else ["-O2"]),
        "-shared",
        "-fPIC",
        "-DGHL_CUDA_ON_HOST",
        f"-I{csrc}",
        f"-I{csrc / 'include'}",
        f"-I{CUDA}",
    ]
    library = ctypes.CDLL(str(compile_cpp(folder / "pair.so", *options, *sources)))
    library.pair.restype = ctypes.c_char_p
    library.takes.restype = ctypes.c_bool
    return library


def cute_headers() -> list[str]:
    """Include flags for CuTe (pip install --no-deps nvidia-cutlass); skips where it is not installed."""
    folder = os.environ.get("CUTLASS_INCLUDE")
    if folder is None:
        spec = importlib.util.find_spec("cutlass_library")
        if spec is None or not spec.submodule_search_locations:
            pytest.skip(
                "needs CuTe's headers: pip install --no-deps nvidia-cutlass==4.2.0.0, or CUTLASS_INCLUDE"
            )
        folder = str(Path(spec.submodule_search_locations[0]) / "source/include")
    if not (CUDA / "cccl/cuda/std/utility").exists():
        pytest.skip(f"needs CUDA 13's libcu++ headers, which are not in {CUDA} (CUDA_HOME)")
    return ["-isystem", folder, "-isystem", str(CUDA / "cccl"), "-isystem", str(CUDA)]

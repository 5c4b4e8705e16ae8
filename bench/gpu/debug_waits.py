"""Builds the CUDA module once more, so that a wait of the Hopper kernel that does not end says which it was.

``python -m bench.gpu.debug_waits FOLDER`` builds FOLDER/debug-waits, where the stage "forms" finds it.
Without it a kernel that hangs would be ended with no word; others have to time the code that is installed.
"""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pybind11

from bench.gpu.native_probes import ROOT, nvcc

FAMILIES = "compete;pair"  # what the cases need


def folder(cache: pathlib.Path) -> pathlib.Path | None:
    """Where the module is, for GHL_NATIVE_DIR; None where it has not been built."""
    built = cache / "debug-waits"
    return built if any(built.glob("_cuda*.so")) else None


def build(cache: pathlib.Path) -> None:
    """Compile what has changed.

    Raises:
        CalledProcessError: it does not compile.
    """
    target = cache / "debug-waits"
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CUDA_COMPILER": nvcc(),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "GHL_OUTPUT_DIR": target,
        "GHL_CPU": "OFF",
        "GHL_CUDA": "ON",
        "GHL_CUDA_ARCHS": "90a-real",
        "GHL_CUDA_FAMILIES": FAMILIES,
        "GHL_DEBUG_WAITS": "ON",
    }
    configure = ["cmake", "-S", ROOT, "-B", target, "-G", "Ninja"]
    subprocess.run([*configure, *(f"-D{name}={value}" for name, value in options.items())], check=True)
    subprocess.run(["cmake", "--build", target], check=True)


if __name__ == "__main__":
    build(pathlib.Path(sys.argv[1]))

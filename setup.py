"""Builds the native modules with CMake and ninja; everything else is in pyproject.toml.

GHL_BUILD_NATIVE, GHL_BUILD_CUDA: unset = build if the compiler is there, say in one line if not;
1 = its absence is an error; 0 = off. GHL_CUDA_ARCHS names other GPUs, as CMAKE_CUDA_ARCHITECTURES does;
GHL_DEBUG_WAITS=1 bounds the waits of Hopper's kernels. CMAKE_ARGS and MAX_JOBS are honored. torch is not
needed.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
PACKAGE = "ghl_kernels"
BUILD_INFO = "_build_info.json"
OLDEST_CUDA = 12


def choice(variable: str) -> bool | None:
    """True (must), False (off) or None (if possible) from an environment variable."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{variable} must be 0, 1 or unset, got {value!r}")
    return None if value == "" else value == "1"


def find_tool(name: str) -> str | None:
    """The tool of the Python package of that name (as build isolation installs it), else the one on PATH."""
    scripts = Path(sysconfig.get_path("scripts")) / name
    if importlib.util.find_spec(name) and scripts.exists():
        return str(scripts)
    return shutil.which(name)


def missing_for_native() -> str:
    """What is missing for a native build, or an empty string."""
    wanted = os.environ.get("CXX")
    compilers = [wanted.split()[0]] if wanted else ["c++", "g++", "clang++"]
    if not any(shutil.which(compiler) for compiler in compilers):
        return f"no C++ compiler was found (looked for {', '.join(compilers)})"
    for tool in ("cmake", "ninja"):
        if find_tool(tool) is None:
            return f"{tool} was not found"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return ""


def reason_not_native() -> str:
    """Why the native CPU module is not built, or an empty string when it is."""
    return reason_not_built("GHL_BUILD_NATIVE", missing_for_native())


def find_nvcc() -> str | None:
    """The CUDA compiler: CUDACXX, that of CUDA_HOME, or the one on PATH or in the usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    wanted = os.environ.get("CUDACXX")
    return shutil.which(wanted) if wanted else shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")


def missing_for_cuda() -> str:
    """What is missing for a build with CUDA, or an empty string."""
    nvcc = find_nvcc()
    if nvcc is None:
        return "nvcc was not found (looked at CUDACXX, PATH and CUDA_HOME)"
    if missing := missing_for_native():
        return missing
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.(\d+)", told)
    if release is None:
        return f"{nvcc} --version does not say its release"
    if int(release[1]) < OLDEST_CUDA:
        return f"it needs CUDA {OLDEST_CUDA} or newer, {nvcc} is {release[1]}.{release[2]}"
    return ""


def reason_not_cuda() -> str:
    """Why the CUDA module is not built, or an empty string when it is."""
    return reason_not_built("GHL_BUILD_CUDA", missing_for_cuda())


def reason_not_built(variable: str, missing: str) -> str:
    wanted = choice(variable)
    if wanted is False:
        return f"it was switched off by {variable}=0"
    if missing and wanted:
        raise SystemExit(f"{variable}=1, but {missing}")
    return missing


class BuildPackage(build_py):
    """Also records which native modules there are not, and why."""

    def run(self) -> None:
        super().run()
        folder = ROOT / PACKAGE if self.editable_mode else Path(self.build_lib) / PACKAGE
        for name, reason in (("_cpu", NOT_NATIVE), ("_cuda", NOT_CUDA)):
            for stale in folder.glob(f"{name}*.so") if reason else ():
                stale.unlink()
        record = {"_cpu": NOT_NATIVE, "_cuda": NOT_CUDA}
        (folder / BUILD_INFO).write_text(json.dumps(record) + "\n")


def cuda_options() -> list[str]:
    """CMake's arguments for the CUDA module. All are given every time, or an earlier build's would stay."""
    architectures = os.environ.get("GHL_CUDA_ARCHS")
    return [
        f"-DCMAKE_CUDA_COMPILER={find_nvcc()}",
        f"-DGHL_CUDA_ARCHS={architectures}" if architectures else "-UGHL_CUDA_ARCHS",
        f"-DGHL_DEBUG_WAITS={'ON' if choice('GHL_DEBUG_WAITS') else 'OFF'}",
    ]


class BuildNative(build_ext):
    """Runs CMake and ninja once for all modules, in a folder under build/ that later builds reuse."""

    def build_extensions(self) -> None:
        folder = Path(self.get_ext_fullpath(self.extensions[0].name)).parent.resolve()
        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        cmake = find_tool("cmake")
        # Named one by one, since under build isolation each lies in a new temporary folder every time.
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": self.pybind11_folder(),
            "GHL_OUTPUT_DIR": folder,
            "GHL_CPU": "OFF" if NOT_NATIVE else "ON",
            "GHL_CUDA": "OFF" if NOT_CUDA else "ON",
        }
        configure = [cmake, "-S", ROOT, "-B", build, "-G", "Ninja"]
        configure += [f"-D{name}={value}" for name, value in options.items()]
        if not NOT_CUDA:
            configure += cuda_options()
        configure += os.environ.get("CMAKE_ARGS", "").split()
        jobs = os.environ.get("MAX_JOBS")
        self.call(configure)
        self.call([cmake, "--build", build, *(["--parallel", jobs] if jobs else [])])

    @staticmethod
    def call(command: list[object]) -> None:
        if subprocess.run([str(part) for part in command], check=False).returncode != 0:
            raise SystemExit(
                "the native build failed (see above); GHL_BUILD_CUDA=0 installs without CUDA kernels,"
                " GHL_BUILD_NATIVE=0 without those for CPUs"
            )

    @staticmethod
    def pybind11_folder() -> str:
        import pybind11

        return pybind11.get_cmake_dir()


NOT_NATIVE, NOT_CUDA = reason_not_native(), reason_not_cuda()
for kernels, reason in (("native CPU", NOT_NATIVE), ("CUDA", NOT_CUDA)):
    if reason:
        print(f"{PACKAGE}: installing without the {kernels} kernels, because {reason}", file=sys.stderr)

setup(
    ext_modules=[
        Extension(f"{PACKAGE}.{name}", sources=[])
        for name, reason in (("_cpu", NOT_NATIVE), ("_cuda", NOT_CUDA))
        if not reason
    ],
    cmdclass={"build_py": BuildPackage, "build_ext": BuildNative},
)

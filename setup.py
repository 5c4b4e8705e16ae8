"""Builds the native modules with CMake and ninja; everything else is in pyproject.toml.

GHL_BUILD_NATIVE, GHL_BUILD_CUDA: unset = build if the compiler is there, say in one line if not;
1 = its absence is an error; 0 = off. CMAKE_ARGS and MAX_JOBS are honored. torch is not needed.
"""

import importlib.util
import json
import os
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
    wanted = choice("GHL_BUILD_NATIVE")
    if wanted is False:
        return "it was switched off by GHL_BUILD_NATIVE=0"
    missing = missing_for_native()
    if missing and wanted:
        raise SystemExit(f"GHL_BUILD_NATIVE=1, but {missing}")
    return missing


def refuse_cuda() -> None:
    if choice("GHL_BUILD_CUDA"):
        raise SystemExit("GHL_BUILD_CUDA=1, but this version has no CUDA module; unset it or set it to 0")


class BuildPackage(build_py):
    """Also records why there is no native module; what was built is recorded by BuildNative."""

    def run(self) -> None:
        super().run()
        if not self.distribution.ext_modules:
            folder = ROOT / PACKAGE if self.editable_mode else Path(self.build_lib) / PACKAGE
            for stale in folder.glob("_cpu*.so"):
                stale.unlink()
            record = {"native": False, "reason": NOT_NATIVE}
            (folder / BUILD_INFO).write_text(json.dumps(record) + "\n")


class BuildNative(build_ext):
    """Runs CMake and ninja in a folder of its own under build/, which later builds reuse."""

    def build_extension(self, ext: Extension) -> None:
        folder = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
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
        }
        configure = [cmake, "-S", ROOT, "-B", build, "-G", "Ninja"]
        configure += [f"-D{name}={value}" for name, value in options.items()]
        configure += os.environ.get("CMAKE_ARGS", "").split()
        jobs = os.environ.get("MAX_JOBS")
        self.call(configure)
        self.call([cmake, "--build", build, *(["--parallel", jobs] if jobs else [])])
        shutil.copy(build / BUILD_INFO, (ROOT / PACKAGE if self.editable_mode else folder) / BUILD_INFO)

    @staticmethod
    def call(command: list[object]) -> None:
        if subprocess.run([str(part) for part in command], check=False).returncode != 0:
            raise SystemExit(
                "the native build failed (see above); GHL_BUILD_NATIVE=0 installs without native kernels"
            )

    @staticmethod
    def pybind11_folder() -> str:
        import pybind11

        return pybind11.get_cmake_dir()


refuse_cuda()
NOT_NATIVE = reason_not_native()
if NOT_NATIVE:
    print(f"{PACKAGE}: installing without the native CPU kernels, because {NOT_NATIVE}", file=sys.stderr)

setup(
    ext_modules=[] if NOT_NATIVE else [Extension(f"{PACKAGE}._cpu", sources=[])],
    cmdclass={"build_py": BuildPackage, "build_ext": BuildNative},
)

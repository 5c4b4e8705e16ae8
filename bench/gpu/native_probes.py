"""Builds the probes written in CUDA C++ and runs each in a process of its own.

    python -m bench.gpu.native_probes NAME FOLDER         build FOLDER/NAME.so
    python -m bench.gpu.native_probes NAME FOLDER INDEX   run one of its probes

A probe that traps or hangs takes its context with it, so that those after it would fail for its reason. This
module needs no torch: a process is there in a fraction of a second.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import importlib.util
import pathlib
import subprocess
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]
# By name of the source beside this file: the virtual architectures that it is for.
SOURCES = {"probes_sm80": ("80", "90a"), "probes_sm90": ("90a",)}
BUILD_SECONDS = 120.0
SECONDS = 20.0  # that one probe may take
_AT_ONCE = 4


def build(name: str, folder: pathlib.Path, seconds: float = BUILD_SECONDS) -> pathlib.Path:
    """Compile the probes within so long, unless the folder has them, newer than their source.

    Raises:
        RuntimeError: there is no nvcc, or it says what is wrong.
    """
    source, library = pathlib.Path(__file__).with_name(f"{name}.cu"), folder / f"{name}.so"
    if library.exists() and library.stat().st_mtime > source.stat().st_mtime:
        return library
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("nvcc was not found (looked at CUDACXX, PATH and CUDA_HOME)")
    folder.mkdir(parents=True, exist_ok=True)
    options = ["-std=c++20", "-O3", "-shared", "-Xcompiler=-fPIC", "-cudart=static"]
    options += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
    for arch in SOURCES[name]:
        options += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    partial = library.with_suffix(".partial")
    command = [compiler, *options, str(source), "-o", str(partial)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}.cu does not compile: {(done.stdout + done.stderr).strip()[-1000:]}")
    partial.replace(library)
    return library


def run(name: str, folder: pathlib.Path, seconds: float = BUILD_SECONDS) -> Iterator[tuple[str, str]]:
    """(name, problem or "") of every probe.

    Raises:
        RuntimeError: as for ``build``.
    """
    library = build(name, folder, seconds)
    names = list(_names(library))
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        yield from zip(names, pool.map(lambda i: _apart(name, folder, i), range(len(names))), strict=True)


def _apart(name: str, folder: pathlib.Path, index: int) -> str:
    command = [sys.executable, "-m", "bench.gpu.native_probes", name, str(folder), str(index)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer in {SECONDS:.0f} s"
    said = done.stdout.strip()
    return said if done.returncode == 0 else f"status {done.returncode}: {said or done.stderr.strip()[-300:]}"


def load(library: pathlib.Path) -> ctypes.CDLL:
    """The probes of a library, by number."""
    probes = ctypes.CDLL(str(library))
    probes.probe_name.restype = probes.probe_run.restype = ctypes.c_char_p
    return probes


def _names(library: pathlib.Path) -> Iterator[str]:
    probes = load(library)
    for i in range(probes.probe_count()):
        yield probes.probe_name(i).decode()


def nvcc() -> str | None:
    """The compiler that an installation would take, as setup.py finds it."""
    import setuptools

    spec = importlib.util.spec_from_file_location("ghl_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    real, setuptools.setup = setuptools.setup, lambda **_: None
    try:
        spec.loader.exec_module(module)
    finally:
        setuptools.setup = real
    found: str | None = module.find_nvcc()
    return found


def main(name: str, folder: pathlib.Path, index: int | None) -> int:
    """Build or run; what is wrong on standard output."""
    if index is None:
        print(build(name, folder))
        return 0
    problem = load(folder / f"{name}.so").probe_run(index)
    print(problem.decode() if problem else "", end="")
    return 0


if __name__ == "__main__":
    _, asked, where, *rest = sys.argv
    sys.exit(main(asked, pathlib.Path(where), int(rest[0]) if rest else None))

"""What the native module needs, how its absence is reported, and that the build asks for no torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from ghl_kernels import _native

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "csrc",
    "python",
    "cmake",
    "ghl_kernels",
    "setup.py",
    "pyproject.toml",
    "CMakeLists.txt",
    "MANIFEST.in",
)
BUILT = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")
ALLOWED_LIBRARIES = r"(libstdc\+\+|libgcc_s|libgomp|libm|libc|ld-linux-[\w-]+)\.so\.\d+"

needs_native = pytest.mark.skipif(not _native.cpu_status()[0], reason=_native.cpu_status()[1])
needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the sources are not here")


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def output(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    parts = [str(part) for part in command]
    return subprocess.run(parts, capture_output=True, text=True, env=os.environ | environment, check=False)


def is_sanitized() -> bool:
    return bool(_native.load_cpu().build_info()["sanitize"])


@needs_native
def test_needs_only_the_compiler_s_libraries() -> None:
    module = _native.load_cpu()
    if is_sanitized():
        pytest.skip("a sanitized module needs the sanitizers' libraries")
    assert module.__file__ is not None
    dynamic = output(tool("readelf"), "-d", module.__file__).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert "libc.so.6" in needed or any(name.startswith("libc.") for name in needed)
    assert [name for name in needed if not re.fullmatch(ALLOWED_LIBRARIES, name)] == []
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


@needs_native
def test_has_no_torch_symbols_and_exports_only_its_entry() -> None:
    module = _native.load_cpu()
    assert module.__file__ is not None
    symbols = output(tool("nm"), "-D", "--demangle", module.__file__).stdout
    assert not re.search(r"\b(at|c10|torch|caffe2)::|THP", symbols)
    exported = re.findall(r"^[0-9a-f]+ T (\S+)", symbols, re.MULTILINE)
    assert exported == ["PyInit__cpu"]


@needs_native
def test_build_info_names_flags_that_keep_nan_and_old_processors() -> None:
    info = _native.load_cpu().build_info()
    assert info["isas"][0] == "baseline"
    assert "fast-math" not in info["flags"]
    assert "-march" not in info["flags"]


@needs_native
def test_instruction_set_can_be_lowered_by_environment_and_by_call() -> None:
    script = "from ghl_kernels._native import load_cpu as l; print(l().detected_isa(), l().selected_isa())"
    detected, selected = output(sys.executable, "-c", script, GHL_CPU_ISA="baseline").stdout.split()
    assert selected == "baseline"
    assert output(sys.executable, "-c", script, GHL_CPU_ISA="nonsense").stdout.split() == [detected, detected]
    module = _native.load_cpu()
    before = module.selected_isa()
    module.select_isa("baseline")
    assert module.selected_isa() == "baseline"
    module.select_isa(before)
    with pytest.raises(ValueError, match="unknown instruction set 'sse9'"):
        module.select_isa("sse9")


# An editable installation answers for every ghl_kernels.<name> that a copy of the package lacks.
WITHOUT_EDITABLE_INSTALL = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
"""


def run_in(folder: Path, script: str) -> str:
    """What a script prints that imports the package lying in a folder."""
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_EDITABLE_INSTALL + script], capture_output=True, text=True, cwd=folder,
        env={key: value for key, value in os.environ.items() if key != "GHL_NATIVE_DIR"}, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def load_in_a_copy(tmp_path: Path, prepare: str) -> str:
    """What load_cpu raises in a copy of the package without native modules, after some preparation."""
    package = tmp_path / "ghl_kernels"
    shutil.copytree(ROOT / "ghl_kernels", package, ignore=BUILT)
    script = f"""
import pathlib
package = pathlib.Path({str(package)!r})
{prepare}
from ghl_kernels import _native
assert not _native.cpu_status()[0]
for _ in range(2):
    try:
        _native.load_cpu()
    except RuntimeError as error:
        print(type(error).__name__, error, type(error.__cause__).__name__)
"""
    first, second = run_in(tmp_path, script).splitlines()
    assert first == second
    return first


def test_not_built_says_why(tmp_path: Path) -> None:
    record = json.dumps({"_cpu": "no C++ compiler was found"})
    message = load_in_a_copy(tmp_path, f"(package / '_build_info.json').write_text({record!r})")
    assert message == "NativeNotBuilt ghl_kernels._cpu was not built: no C++ compiler was found NoneType"


def test_not_installed_says_so(tmp_path: Path) -> None:
    message = load_in_a_copy(tmp_path, "")
    assert message.startswith("NativeNotBuilt")
    assert "not installed" in message


def test_lost_module_says_so(tmp_path: Path) -> None:
    record = json.dumps({"_cpu": ""})
    message = load_in_a_copy(tmp_path, f"(package / '_build_info.json').write_text({record!r})")
    assert message.startswith("NativeNotBuilt")
    assert "install the package again" in message


@pytest.mark.parametrize(("name", "content", "cause"), [
    ("_cpu.py", "raise ImportError('undefined symbol: gone')", "ImportError"),
    ("_cpu.py", "import a_module_that_is_not_there", "ModuleNotFoundError"),
    ("_cpu.abi3.so", "this is no shared object", "ImportError"),
])  # fmt: skip
def test_broken_is_not_taken_for_not_built(tmp_path: Path, name: str, content: str, cause: str) -> None:
    message = load_in_a_copy(tmp_path, f"(package / {name!r}).write_text({content!r})")
    assert message.startswith("NativeBroken ghl_kernels._cpu")
    assert message.endswith(cause)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A clean copy of what a build needs."""
    copy = tmp_path / "sources"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=BUILT)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


def build_wheel(sources: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return output(
        sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-v",
        "--disable-pip-version-check", "-w", sources / "wheels", sources, **environment,
    )  # fmt: skip


@needs_sources
def test_a_source_distribution_has_all_that_is_compiled(sources: Path, tmp_path: Path) -> None:
    command = (
        f"import os; os.chdir({str(sources)!r}); import setuptools.build_meta as b; b.build_sdist('out')"
    )
    built = output(sys.executable, "-c", command)
    assert built.returncode == 0, built.stdout + built.stderr
    (archive,) = (sources / "out").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        present = {name.partition("/")[2] for name in files.getnames()}
    compiled = {
        str(path.relative_to(sources))
        for folder in ("csrc", "cmake", "python")
        for path in (sources / folder).rglob("*")
        if path.is_file()
    }
    assert present >= {*compiled, "CMakeLists.txt", "setup.py", "pyproject.toml"}


@needs_sources
def test_switched_off_gives_a_pure_wheel_that_says_so(sources: Path, tmp_path: Path) -> None:
    built = build_wheel(sources, GHL_BUILD_NATIVE="0", GHL_BUILD_CUDA="0")
    assert built.returncode == 0, built.stdout + built.stderr
    assert "installing without the native CPU kernels" in built.stdout + built.stderr
    (wheel,) = (sources / "wheels").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    assert not list(unpacked.rglob("*.so"))
    assert (unpacked / "ghl_kernels" / "py.typed").exists()
    script = "from ghl_kernels import _native; print(_native.cpu_status())"
    status = run_in(unpacked, script)
    assert status.startswith("(False")
    assert "GHL_BUILD_NATIVE=0" in status


@needs_sources
@pytest.mark.parametrize(("environment", "message"), [
    ({"GHL_BUILD_CUDA": "1", "CUDACXX": "no-such-nvcc"}, "GHL_BUILD_CUDA=1, but nvcc was not found"),
    ({"GHL_BUILD_CUDA": "2"}, "GHL_BUILD_CUDA must be 0, 1 or unset, got '2'"),
    ({"GHL_BUILD_NATIVE": "yes"}, "GHL_BUILD_NATIVE must be 0, 1 or unset, got 'yes'"),
    ({"GHL_BUILD_NATIVE": "1", "CXX": "no-such-compiler"}, "GHL_BUILD_NATIVE=1, but no C++ compiler was"),
])  # fmt: skip
def test_refused_builds_say_why(sources: Path, environment: dict[str, str], message: str) -> None:
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=sources, capture_output=True, text=True,
        env=os.environ | environment, check=False,
    )  # fmt: skip
    assert result.returncode != 0
    assert message in result.stderr


@needs_sources
def test_without_a_compiler_one_line_says_so(sources: Path) -> None:
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=sources, capture_output=True, text=True,
        env=os.environ | {"CXX": "no-such-compiler", "GHL_BUILD_NATIVE": "", "GHL_BUILD_CUDA": ""},
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("ghl_kernels:")]
    assert len(said) == 2
    assert "no C++ compiler was found (looked for no-such-compiler)" in said[0]
    assert "installing without the CUDA kernels, because" in said[1]


@needs_sources
def test_build_does_not_import_torch(sources: Path) -> None:
    """A torch that cannot be imported stands in the way, and the build's metadata step does not notice."""
    (sources / "torch.py").write_text("raise SystemExit('setup.py imported torch')")
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=sources, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(sources)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"\d+\.\d+\.\d+", result.stdout.split()[-1])


@needs_sources
def test_weak_symbols_stop_the_build(tmp_path: Path) -> None:
    """The check that keeps AVX-512 copies of shared inline functions out of the baseline path."""
    compiler, nm, cmake = tool("c++"), tool("nm"), tool("cmake")
    script = ROOT / "cmake" / "no_weak_symbols.cmake"
    for name, linkage, accepted in (("weak", "inline", False), ("strong", "static", True)):
        source = tmp_path / f"{name}.cpp"
        source.write_text(
            f"{linkage} int twice(int a) {{ return 2 * a; }} int f(int a) {{ return twice(a); }}"
        )
        compiled = output(compiler, "-c", "-O0", source, "-o", tmp_path / f"{name}.o")
        assert compiled.returncode == 0, compiled.stderr
        check = output(cmake, f"-DNM={nm}", f"-DOBJECTS={tmp_path / name}.o", "-P", script)
        assert (check.returncode == 0) is accepted, check.stderr
        assert accepted or "twice" in check.stderr

"""What the launchers ask of CUDA's runtime, and what they do with its answers; the runtime is a fake."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = Path(__file__).parent / "runtime"
LAUNCHERS = ("pair_sm90.cu", "epilogue.cu", "check_device.cu", "compete.cu")
REGISTERS = 168  # of the kernel for Hopper
OPT_IN = 227 << 10


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The launchers with the fake. Their kernels are compiled to PTX alone, which nobody will run."""
    nvcc = shutil.which("nvcc") or shutil.which(
        str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin/nvcc")
    )
    if nvcc is None:
        pytest.skip("needs nvcc")
    target = tmp_path_factory.mktemp("runtime") / "launchers.so"
    options = ["-std=c++20", "-O1", "-cudart", "none", "-shared", "-Xcompiler=-fPIC", "-Werror=all-warnings"]
    options += [
        "-gencode=arch=compute_80,code=compute_80",
        f"-I{ROOT / 'csrc'}",
        f"-I{ROOT / 'csrc/include'}",
    ]
    entries = (SOURCES / name for name in ("fake.cpp", "entry.cu", "compete.cu"))
    sources = [*entries, *(ROOT / "csrc/cuda" / name for name in LAUNCHERS)]
    # a sanitizer that is loaded into Python would be loaded into the compiler too
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [nvcc, *options, *map(str, sources), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


class Runtime:
    """Launchers that have asked nothing yet, on devices as a test describes them."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.sm90_takes.restype = self.library.fake_has_context.restype = ctypes.c_bool
        for name in ("fake_calls", "sm90_pair", "check_device", "launch_kernel", "compete", "learn"):
            getattr(self.library, name).restype = ctypes.c_char_p
        self.set(registers=REGISTERS, attribute=OPT_IN)

    def set(self, **values: int) -> None:
        for name, value in values.items():
            self.library.fake_set(name.encode(), value)

    def error(self, name: str, *arguments: int) -> str:
        """What a launcher says; empty where it succeeds."""
        return str(getattr(self.library, name)(*arguments).decode())

    @property
    def calls(self) -> list[str]:
        return self.library.fake_calls().decode().splitlines()

    def has_context(self, device: int) -> bool:
        return bool(self.library.fake_has_context(device))


@pytest.fixture
def runtime(built: Path, tmp_path: Path) -> Runtime:
    # a copy is another library, with answers of its own
    return Runtime(shutil.copy(built, tmp_path / "launchers.so"))


def test_hopper_form_is_taken_where_its_kernel_has_a_body(runtime: Runtime) -> None:
    assert runtime.library.sm90_takes(3)
    assert runtime.calls == ["attributes on 3"]
    assert runtime.library.sm90_takes(3)
    assert len(runtime.calls) == 1, "asked once for each device"
    runtime.set(registers=4)
    assert not runtime.library.sm90_takes(1)
    assert runtime.library.fake_current() == 0


@pytest.mark.parametrize(
    "broken",
    [{"registers": 4}, {"registers": REGISTERS - 8}, {"function_error": 98}, {"no_encoders": 1}],
    ids=["empty", "too few registers", "no kernel", "no encoders"],
)
def test_hopper_form_is_refused_otherwise(runtime: Runtime, broken: dict[str, int]) -> None:
    runtime.set(**broken)
    assert not runtime.library.sm90_takes(0)


def test_tensor_maps_are_encoded_in_the_device_s_context(runtime: Runtime) -> None:
    for device in (0, 2):
        assert runtime.error("sm90_pair", device) == ""
    encoded = [call for call in runtime.calls if call.startswith("tiled")]
    assert encoded == ["tiled on 0"] * 4 + ["tiled on 2"] * 4
    assert runtime.library.fake_current() == 0


def test_a_map_that_is_refused_says_so_in_the_driver_s_words(runtime: Runtime) -> None:
    runtime.set(encode_error=1)
    error = runtime.error("sm90_pair", 0)
    assert error.startswith("pair of 64 units, 64 channels, 1 taps and 32 positions (sm_90): ")
    assert error.endswith("no tensor map: the driver's error 1: the driver's text")


def test_the_device_before_gets_no_context(runtime: Runtime) -> None:
    runtime.library.cudaSetDevice(5)
    assert runtime.error("launch_kernel", 5, 0) == ""
    assert not runtime.has_context(0)
    assert runtime.error("launch_kernel", 1, 0) == ""
    assert runtime.library.fake_current() == 5


def test_the_limit_of_shared_memory_does_not_depend_on_the_launch(runtime: Runtime) -> None:
    runtime.set(static_shared=1000)
    limit, shared = f"shared {OPT_IN - 1000}", (50 << 10, 90 << 10)
    assert [runtime.error("launch_kernel", 0, size) for size in shared] == ["", ""]
    launches = [f"launch on 0 with {size}" for size in shared]
    assert runtime.calls == ["attributes on 0", limit, *launches], "set once for each device"
    assert runtime.error("launch_kernel", 3, shared[0]) == ""
    assert runtime.calls[-2] == limit


FLOAT32, BFLOAT16 = 0, 1


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "planes"])
def test_competition_by_the_number_of_units(runtime: Runtime, rows: bool) -> None:
    def kernels(device: int, dtype: int, units: int) -> str:
        return str(runtime.library.compete(device, dtype, units, rows).decode())

    taken = [kernels(0, BFLOAT16, units) for units in (128, 129, 1024, 1025, 1536, 1537)]
    assert taken == ["few", "short", "short", "wide", "wide", "long"]
    assert kernels(0, FLOAT32, 1025) == "long"
    # as of sm_86, which has no room for the tile of planes
    runtime.set(attribute=99 << 10)
    assert kernels(1, BFLOAT16, 1025) == ("wide" if rows else "long")


def test_a_device_that_runs_no_kernel(runtime: Runtime) -> None:
    assert runtime.error("check_device", 1) == ""
    runtime.set(function_error=209)
    assert runtime.error("check_device", 1) == "device 1: cudaErrorFake: the runtime's text"
    runtime.set(function_error=0, set_device_error=35)
    assert runtime.error("check_device", 1) == "device 1: cudaErrorFake: the runtime's text"


def test_a_failed_epilogue_names_the_layers_of_its_launch(runtime: Runtime) -> None:
    assert runtime.error("learn", 3, 3) == ""
    runtime.set(launch_error=1)
    failure = "cudaErrorFake: the runtime's text"
    assert runtime.error("learn", 3, 3) == f"learn_ of [1, 8], [2, 8], [3, 8]: {failure}"
    assert runtime.error("learn", 3, 1) == f"learn_ of [1, 8]: {failure}"

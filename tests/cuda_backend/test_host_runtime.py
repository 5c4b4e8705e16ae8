"""CUDA's execution model on a CPU (csrc/cuda/host), by small kernels; and that planted bugs are reported."""

from __future__ import annotations

import fcntl
import itertools
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
KERNELS = Path(__file__).parent / "host_kernels"
RUNTIME = ROOT / "csrc/cuda/host/runtime.cpp"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
SCHEDULES = [("forward",), ("reverse",), ("random", "1"), ("random", "2")]

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="fibers are written for x86-64"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]

# A sanitizer loaded for Python's sake would be in the way of the programs' own.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"} | {
    "ASAN_OPTIONS": "detect_leaks=0",
    "TSAN_OPTIONS": "atexit_sleep_ms=0",
}

Rows = dict[str, np.ndarray]


@dataclass
class Program:
    command: list[str]

    def start(self, *words: str, numbers: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*self.command, *words], input=numbers, capture_output=True, env=ENVIRONMENT, timeout=60
        )

    def rows(self, *words: str) -> Rows:
        """The rows that a case prints."""
        done = self.start(*words)
        assert done.returncode == 0, done.stderr.decode()
        lines = [line.split(":") for line in done.stdout.decode().splitlines()]
        return {name: np.array([float(number) for number in row.split()]) for name, row in lines}

    def report(self, *words: str) -> str:
        """What a case that must not succeed says."""
        done = self.start(*words)
        assert done.returncode != 0, f"{words} succeeded: {done.stdout.decode()}"
        return done.stderr.decode()

    def convert(self, case: str, numbers: np.ndarray) -> np.ndarray:
        done = self.start(case, numbers=numbers.tobytes())
        assert done.returncode == 0, done.stderr.decode()
        return np.frombuffer(done.stdout, np.uint32)


def compile_program(target: Path, sources: list[str], sanitize: list[str], runtime: list[str]) -> None:
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}", "-DGHL_CUDA_ON_HOST"]
    warnings = ["-Wall", "-Wextra", "-Wshadow", "-Werror", "-Wno-unknown-pragmas"]
    flags = ["-std=c++20", "-O1", "-g", "-fno-strict-aliasing", *warnings, *include]

    def compile_one(source: Path) -> Path:
        result = target.with_name(f"{target.name}-{source.stem}.o")
        own = runtime if source == RUNTIME else sanitize
        command = [str(COMPILER), *flags, *own, "-x", "c++", "-c", str(source), "-o", str(result)]
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr
        return result

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*(KERNELS / name for name in sources), RUNTIME]))
    command = [str(COMPILER), *sanitize, *map(str, objects), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    if "cannot find" in done.stderr:
        pytest.skip(f"the sanitizer's library is not installed: {done.stderr}")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Program]:
    """Compiles a program once, also where several processes share the tests."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    def program(name: str, sources: list[str], sanitize: list[str], runtime: list[str]) -> Program:
        target = folder / f"host_kernels_{name}"
        with (folder / f"{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                compile_program(target, ["program.cpp", *sources], sanitize, runtime)
        return Program([str(target)])

    return program


@pytest.fixture(scope="session")
def plain(build: Callable[..., Program]) -> Program:
    return build("plain", ["execution.cu", "warp.cu", "instructions.cu", "planted.cu"], [], [])


@pytest.fixture(scope="session")
def address(build: Callable[..., Program]) -> Program:
    """Under AddressSanitizer and UndefinedBehaviorSanitizer."""
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    return build("address", ["execution.cu", "planted.cu"], sanitize, sanitize)


@pytest.fixture(scope="session")
def thread(build: Callable[..., Program]) -> Program:
    """Under ThreadSanitizer, which some kernels' address space layout keeps from starting."""
    program = build("thread", ["execution.cu", "planted.cu"], ["-fsanitize=thread"], ["-DGHL_TSAN_FIBERS"])
    for prefix in [], ["setarch", "-R"]:
        started = Program([*prefix, *program.command])
        reply = started.start("reduce").stderr.decode()
        if "FATAL: ThreadSanitizer" not in reply and "setarch:" not in reply:
            return started
    pytest.skip(f"ThreadSanitizer does not start here: {reply}")


# --- blocks and threads -----------------------------------------------------------------------------


def test_every_thread_of_every_block_runs_once(plain: Program) -> None:
    np.testing.assert_array_equal(plain.rows("geometry")["seen"], np.arange(2 * 3 * 2 * 24))
    for schedule in SCHEDULES:
        assert sorted(plain.rows("geometry", *schedule)["seen"]) == list(range(2 * 3 * 2 * 24))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=" ".join)
def test_barriers(plain: Program, schedule: tuple[str, ...]) -> None:
    np.testing.assert_array_equal(plain.rows("rotate", *schedule)["out"], (np.arange(96) + 5) % 96)
    np.testing.assert_array_equal(plain.rows("exits", *schedule)["out"], [39])
    votes = plain.rows("barrier_votes", *schedule)["out"].reshape(40, 4)
    np.testing.assert_array_equal(votes, np.tile([14, 1, 0, 2], (40, 1)))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=" ".join)
def test_a_thread_that_sleeps_lets_others_run(plain: Program, schedule: tuple[str, ...]) -> None:
    np.testing.assert_array_equal(plain.rows("spin", *schedule)["out"], [7])


def test_dynamic_shared_memory_is_new_for_every_block(plain: Program) -> None:
    np.testing.assert_array_equal(plain.rows("unwritten_shared")["out"], [np.nan, np.nan, 0, 0])


def test_every_instance_of_a_kernel_has_its_own_static_shared_memory(plain: Program) -> None:
    rows = plain.rows("instances")
    np.testing.assert_array_equal(rows["one"][:32], np.full(32, 1))
    np.testing.assert_array_equal(rows["two"][:32], np.full(32, 2))
    assert rows["one"][32] != rows["two"][32]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=" ".join)
def test_atomics(plain: Program, schedule: tuple[str, ...]) -> None:
    i = np.arange(192)
    rows = plain.rows("atomics", *schedule)
    expected = [
        i.sum(),
        -i.sum(),
        (i ^ 5).max(),
        -(i ^ 9).max(),
        127,
        0xE0,
        np.bitwise_xor.reduce(i),
        11,
        384,
    ]
    np.testing.assert_array_equal(rows["ints"], expected)
    np.testing.assert_array_equal(rows["wide"], [192 * 2.0**40, 191 * 2.0**33])


def test_schedules(plain: Program) -> None:
    forward = plain.rows("order")["out"]
    np.testing.assert_array_equal(forward[:64], np.arange(64))
    np.testing.assert_array_equal(forward[128:192], np.arange(64, 128))
    reverse = plain.rows("order", "reverse")["out"]
    np.testing.assert_array_equal(reverse[:64], 191 - np.arange(64))
    one, again, two = (plain.rows("order", "random", seed)["out"] for seed in ("1", "1", "2"))
    np.testing.assert_array_equal(one, again)
    assert (one != two).any()
    assert (one != forward).any()
    for order in one, two, reverse:
        np.testing.assert_array_equal(np.sort(order), np.sort(forward))


BROKEN = {
    "divergent_barrier": r"deadlock in block (0, 0, 0): of 32 threads 8 wait at the block's barrier; "
    "of warp 0 lanes 0xffffff00 wait for the mask 0xffffffff",
    "divergent_masks": "of warp 0 lanes 0xffff0000 wait for the mask 0xffffffff",
    "foreign_mask": "a lane is not in the mask that it names",
    "source_outside": "a shuffle reads a lane that is not in its mask",
    "bad_width": "the width of a shuffle is not a power of two",
    "trap": "the kernel trapped",
    "partial_warp": "the mask names a lane that has exited or never was",
    "too_many_threads": "invalid configuration: 1 blocks of 1056 threads",
    "too_much_shared": "167936 bytes of dynamic shared memory",
    "no_blocks": "invalid configuration: 0 blocks",
    "too_many_blocks": "2147483648 blocks are more than a grid can have",
    "misaligned_copy": "cp.async of a misaligned address",
    "misaligned_matrix": "ldmatrix of a misaligned row",
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_rules_are_reported(plain: Program, case: str) -> None:
    for schedule in SCHEDULES:
        report = plain.report(case, *schedule)
        assert BROKEN[case].split(": ")[-1] in report if schedule != ("forward",) else BROKEN[case] in report


@pytest.mark.parametrize("schedule", SCHEDULES, ids=" ".join)
def test_an_exited_lane_in_a_mask_is_reported(plain: Program, schedule: tuple[str, ...]) -> None:
    assert "exited" in plain.report("exited_lane", *schedule)


def test_a_failed_launch_leaves_nothing_behind(plain: Program, address: Program, thread: Program) -> None:
    for program in plain, address, thread:
        np.testing.assert_array_equal(program.rows("recovery")["out"], (np.arange(96) + 5) % 96)


# --- warps ------------------------------------------------------------------------------------------

LANE = np.arange(32)


def shuffle_source(kind: str, width: int, argument: int) -> np.ndarray:
    """Which lane each lane reads, by the table of the PTX manual."""
    first = LANE - LANE % width
    last = first + width - 1
    if kind == "idx":
        return first + argument % width
    source = {"up": LANE - argument, "down": LANE + argument, "xor": LANE ^ argument}[kind]
    inside = source >= first if kind == "up" else source <= last
    return np.where(inside, source, LANE)


def test_shuffles_of_all_kinds_and_widths(plain: Program) -> None:
    rows = plain.rows("shuffles")
    cases = list(itertools.product(["idx", "xor", "up", "down"], [1, 2, 4, 8, 16, 32], range(32)))
    assert len(rows) == len(cases)
    for kind, width, argument in cases:
        expected = 100 + shuffle_source(kind, width, argument)
        np.testing.assert_array_equal(
            rows[f"{kind} {width} {argument}"], expected, f"{kind} {width} {argument}"
        )


def test_shuffled_types(plain: Program) -> None:
    rows = plain.rows("types")
    neighbour = 100 + (LANE ^ 1)
    np.testing.assert_array_equal(rows["float"], neighbour + 0.5)
    np.testing.assert_array_equal(rows["double"], neighbour)
    np.testing.assert_array_equal(rows["wide"], neighbour + 2.0**40)
    np.testing.assert_array_equal(rows["own source"], 100 + (3 * LANE + 40) % 32)


def mask_of(lanes: np.ndarray) -> int:
    return sum(1 << int(lane) for lane in np.flatnonzero(lanes))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=" ".join)
def test_votes(plain: Program, schedule: tuple[str, ...]) -> None:
    rows = plain.rows("votes", *schedule)
    odd = LANE % 2 == 1
    key = LANE * LANE % 7
    np.testing.assert_array_equal(rows["ballot"], np.full(32, mask_of(LANE % 3 > 0)))
    np.testing.assert_array_equal(rows["odd ballot"], odd * mask_of(odd & (LANE < 6)))
    np.testing.assert_array_equal(rows["any"], np.full(32, 1))
    np.testing.assert_array_equal(rows["all"], np.full(32, 2))
    np.testing.assert_array_equal(rows["match any"], [mask_of(key == own) for own in key])
    np.testing.assert_array_equal(rows["match all"], np.full(32, 2.0**32))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=" ".join)
def test_reductions(plain: Program, schedule: tuple[str, ...]) -> None:
    rows = plain.rows("reductions", *schedule)
    some = (0x00FF0FF0 >> LANE & 1) == 1
    np.testing.assert_array_equal(rows["add"], some * (100 + LANE[some]).sum())
    np.testing.assert_array_equal(rows["min"], some * (10 - LANE[some]).min())
    np.testing.assert_array_equal(rows["max"], some * (10 - LANE[some]).max())
    np.testing.assert_array_equal(rows["wrap"], np.full(32, -32))
    np.testing.assert_array_equal(rows["or"], np.full(32, 31))
    np.testing.assert_array_equal(rows["and"], np.full(32, 0xFFFFFF00))
    np.testing.assert_array_equal(rows["xor"], np.full(32, np.bitwise_xor.reduce(LANE * LANE)))
    np.testing.assert_array_equal(rows["warp_sum"], np.full(32, (100 + LANE).sum()))
    np.testing.assert_array_equal(rows["warp_max"], np.full(32, -100))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=" ".join)
def test_parts_of_a_warp_meet_on_their_own(plain: Program, schedule: tuple[str, ...]) -> None:
    rows = plain.rows("divergence", *schedule)
    halves = 100 + LANE
    for rounds in range(8):
        exchanged = halves + halves[LANE ^ 1]
        halves = np.where((LANE >= 16) | (rounds < 3), exchanged, halves)
    np.testing.assert_array_equal(rows["halves"], halves[LANE ^ 16])
    np.testing.assert_array_equal(rows["overtaking"], 131 - LANE - np.where(LANE < 2, 201, 0))
    np.testing.assert_array_equal(rows["chain"], np.cumsum(100 + LANE))


# --- instructions -----------------------------------------------------------------------------------


def words(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts).astype(np.uint32)


def hard_words(dropped: int) -> np.ndarray:
    """Bits of floats: random, special, and around the middle between two that have `dropped` bits less."""
    random = np.random.default_rng(dropped).integers(0, 2**32, 200_000)
    tops = np.arange(0, 2**32, max(2**dropped, 2**15)) if dropped < 16 else np.arange(2**16) << 16
    around = [tops + (1 << (dropped - 1)) + shift for shift in (-1, 0, 1)]
    special = np.array(
        [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x7FC00000, 0x7F800001, 1, 0x007FFFFF]
    )
    return words(random, special, tops, *around)


def rounded(bits: np.ndarray, dropped: int, ties: str) -> np.ndarray:
    """The nearest float whose last `dropped` bits are 0, found by comparing distances in float64."""
    low = bits >> dropped << dropped
    high = low + np.uint32(1 << dropped)

    def number(word: np.ndarray) -> np.ndarray:
        magnitude = word & np.uint32(0x7FFFFFFF)
        # past the largest number comes 2^128, which is called infinity
        finite = magnitude.view(np.float32).astype(np.float64)
        return np.where(magnitude == 0x7F800000, 2.0**128, finite)

    with np.errstate(invalid="ignore"):
        below, above = number(bits) - number(low), number(high) - number(bits)
    even = (low >> dropped & 1) == 0
    up = (above < below) | ((above == below) & (~even if ties == "even" else True))
    return np.where(up & ((bits & 0x7FFFFFFF) < 0x7F800000), high, low)


def assert_same_floats(actual: np.ndarray, expected: np.ndarray) -> None:
    """By bits, but any NaN for a NaN."""
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    number = ~np.isnan(expected)
    word = {2: np.uint16, 4: np.uint32}[actual.dtype.itemsize]
    np.testing.assert_array_equal(actual[number].view(word), expected[number].view(word))


def test_all_halves_to_float(plain: Program) -> None:
    halves = np.arange(2**16, dtype=np.uint32)
    expected = halves.astype(np.uint16).view(np.float16).astype(np.float32)
    assert_same_floats(plain.convert("from_f16", halves).view(np.float32), expected)


@pytest.mark.parametrize("case", ["f16", "f16x2"])
def test_float_to_half(plain: Program, case: str) -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        middle = ((every[:-1].astype(np.float64) + every[1:]) / 2).astype(np.float32)
        near = [np.nextafter(middle, np.float32(side)) for side in (-np.inf, np.inf)]
        numbers = np.concatenate([every, middle, *near, hard_words(13).view(np.float32)]).astype(np.float32)
        expected = numbers.astype(np.float16)
    actual = plain.convert(case, numbers).astype(np.uint16)
    assert_same_floats(actual.view(np.float16), expected)


@pytest.mark.parametrize("case", ["bf16", "bf16x2"])
def test_float_to_bfloat16(plain: Program, case: str) -> None:
    bits = hard_words(16)
    actual = (plain.convert(case, bits) << 16).astype(np.uint32)
    nan = np.isnan(bits.view(np.float32))
    assert_same_floats(actual[~nan].view(np.float32), rounded(bits[~nan], 16, "even").view(np.float32))
    assert np.isnan(actual[nan].view(np.float32)).all()


@pytest.mark.parametrize(("case", "shift"), [("bf16_trip", 16), ("f16_trip", 0)])
def test_every_16_bit_number_survives_float(plain: Program, case: str, shift: int) -> None:
    patterns = np.arange(2**16, dtype=np.uint32)
    values = patterns.astype(np.uint16).view(np.float16).astype(np.float32) if shift == 0 else None
    numbers = (patterns << 16).view(np.float32) if values is None else values
    number = ~np.isnan(numbers)
    np.testing.assert_array_equal(plain.convert(case, numbers)[number], patterns[number])


def test_float_to_tf32(plain: Program) -> None:
    bits = hard_words(13)
    nan = np.isnan(bits.view(np.float32))
    actual = plain.convert("tf32", bits)
    np.testing.assert_array_equal(actual[~nan], rounded(bits[~nan], 13, "away"))
    # also as the tensor core reads it, without the last 13 bits
    assert np.isnan((actual[nan] & ~np.uint32(0x1FFF)).view(np.float32)).all()


def test_ex2(plain: Program) -> None:
    numbers = np.linspace(-160, 140, 100_001, dtype=np.float32)
    actual = plain.convert("ex2", numbers).view(np.float32)
    exact = np.exp2(numbers.astype(np.float64))
    normal = (exact >= 2.0**-126) & (exact < 2.0**128)
    assert np.abs(actual[normal] / exact[normal] - 1).max() < 2.0**-22
    assert (actual[exact < 2.0**-126] == 0).all()
    assert np.isinf(actual[exact >= 2.0**128]).all()


@pytest.mark.parametrize(
    ("case", "rounding", "dtype"),
    [
        ("int_rn", np.rint, np.int32),
        ("int_rz", np.trunc, np.int32),
        ("int_rd", np.floor, np.int32),
        ("int_ru", np.ceil, np.int32),
        ("uint_rn", np.rint, np.uint32),
    ],
)
def test_float_to_integer(
    plain: Program, case: str, rounding: Callable[[np.ndarray], np.ndarray], dtype: type[np.integer]
) -> None:
    halves = np.arange(-20, 20, 0.25, dtype=np.float32)
    numbers = np.concatenate(
        [halves, np.float32([np.nan, np.inf, -np.inf, 2**31, -(2**31), 2**32, 3e9, 1e20])]
    )
    info = np.iinfo(dtype)
    wide = np.nan_to_num(np.clip(rounding(numbers.astype(np.float64)), info.min, info.max), nan=0.0)
    np.testing.assert_array_equal(
        plain.convert(case, numbers).view(dtype), wide.astype(np.int64).astype(dtype)
    )


def test_functions_of_bits(plain: Program) -> None:
    rows = plain.rows("bits")
    expected = {
        "brev": [5, 0x48000000],
        "clz": [32, 31, 0, 63, 64],
        "ffs": [0, 4, 41],
        "popc": [12, 64],
        "perm": [0x77553311, 0x80FF00FF],
        "funnel": [5, 0x30000001],
        "high": [2**32 - 2, -1, 3],
        "max": [1, 1, 3, np.nan],
        # -0 below 0 but not less; NaN; a subnormal
        "pairs": [0x00007FFF, 0x4000BC00, 0xFFFF0000, 0xFFFF, 0xFFFF, 0xFFFF],
    }
    for name, row in expected.items():
        np.testing.assert_array_equal(rows[name], row, name)


def test_copies_arrive_when_they_are_waited_for(plain: Program) -> None:
    rows = plain.rows("copies")
    unknown = [np.nan] * 4
    np.testing.assert_array_equal(rows["row0"], unknown * 3)
    np.testing.assert_array_equal(rows["row1"], [1, 2, 3, 4, *unknown, *unknown])
    np.testing.assert_array_equal(rows["row2"], [1, 2, 3, 4, 5, 6, 0, 0, *unknown])
    np.testing.assert_array_equal(rows["row3"], [1, 2, 3, 4, 5, 6, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(rows["row4"], [2, 0, 0, 4, 5, 6, 0, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=" ".join)
def test_ldmatrix(plain: Program, schedule: tuple[str, ...]) -> None:
    rows = plain.rows("matrices", *schedule)
    matrices = np.arange(256).reshape(4, 8, 8)
    np.testing.assert_array_equal(rows["straight"], matrices.reshape(-1))
    np.testing.assert_array_equal(rows["transposed"], matrices.transpose(0, 2, 1).reshape(-1))


@pytest.mark.parametrize(("case", "depth"), [("mma_bf16", 16), ("mma_f16", 16), ("mma_tf32", 8)])
def test_matrix_products(plain: Program, case: str, depth: int) -> None:
    random = np.random.default_rng(3)
    a, b, d = (random.integers(-30, 31, shape) for shape in ((16, depth), (depth, 8), (16, 8)))
    bits = [matrix.astype(np.float32).view(np.uint32) for matrix in (a, b, d)]
    if case == "mma_tf32":
        # what the tensor core does not read
        bits[0] |= random.integers(0, 2**13, a.shape, dtype=np.uint32)
    actual = plain.start(case, numbers=b"".join(matrix.tobytes() for matrix in bits)).stdout
    np.testing.assert_array_equal(np.frombuffer(actual, np.float32).reshape(16, 8), d + a @ b)


# --- planted bugs -----------------------------------------------------------------------------------

SUMS = np.arange(256).reshape(4, 64).sum(1)
CORRECT = {"reduce": SUMS, "stage": SUMS, "pipeline": SUMS.sum(keepdims=True)}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=" ".join)
@pytest.mark.parametrize("case", CORRECT)
def test_correct_kernels_pass(
    plain: Program, address: Program, thread: Program, case: str, schedule: tuple[str, ...]
) -> None:
    for program in plain, address, thread:
        np.testing.assert_array_equal(program.rows(case, *schedule)["sums"], CORRECT[case])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=" ".join)
@pytest.mark.parametrize("case", ["reduce_missing_barrier", "pipeline_missing_reuse", "stage_late_wait"])
def test_races_are_reported_under_every_schedule(
    thread: Program, case: str, schedule: tuple[str, ...]
) -> None:
    report = thread.report(case, *schedule)
    assert "data race" in report
    assert "planted.cu" in report


@pytest.mark.parametrize(
    "case", ["reduce_missing_barrier", "pipeline_missing_reuse", "stage_late_wait", "stage_missing_wait"]
)
def test_races_change_results_under_some_schedule(plain: Program, case: str) -> None:
    expected = CORRECT[case.split("_")[0]]
    assert any((plain.rows(case, *schedule)["sums"] != expected).any() for schedule in SCHEDULES)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=" ".join)
def test_without_a_wait_nothing_arrives(plain: Program, schedule: tuple[str, ...]) -> None:
    assert np.isnan(plain.rows("stage_missing_wait", *schedule)["sums"]).all()


@pytest.mark.parametrize(
    ("case", "report"),
    [
        ("reduce_load_past_end", "heap-buffer-overflow"),
        ("stage_copy_past_end", "heap-buffer-overflow"),
        ("reduce_store_past_static", "index 64 out of bounds"),
        ("stage_store_past_dynamic", "use-after-poison"),
    ],
)
def test_accesses_out_of_bounds_are_reported(address: Program, case: str, report: str) -> None:
    said = address.report(case)
    assert report in said
    assert "planted.cu" in said

"""The epilogue kernels (decay, norm, then store, gate or learn, over many layers) against float64."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from epilogue_jobs import DECAYS, DTYPES, NORMS, OPERATIONS, RATE, expected, floor_of, random_job
from oracle import LAYOUTS, assert_as_good, embed, guards_intact

from ghl_kernels.backends.gpu.jobs import Job
from ghl_kernels.backends.triton.kernels import epilogue
from ghl_kernels.backends.triton.launch import recording

# numpy's, from the interpreter, where infinities meet
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

# Narrow, narrow with an odd number of rows, aligned, not aligned with several pieces of a row.
SHAPES = ((4, 2, 2, 1), (3, 5), (4, 16), (3, 3, 7))


@pytest.fixture
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of a layer, rows of a block, and pieces of a row, at sizes that are quick here."""
    for name, value in (("NARROW_ROWS", 2), ("NARROW_COLUMNS", 8), ("WIDE_COLUMNS", 16), ("MAX_BLOCKS", 2)):
        monkeypatch.setattr(epilogue, name, value)


def run(operation: str, jobs: Sequence[Job]) -> None:
    if operation == "learn":
        epilogue.learn_(jobs, RATE)
    else:
        {"delta": epilogue.delta, "gate": epilogue.gate_}[operation](jobs)


def assert_right(operation: str, jobs: Sequence[Job]) -> None:
    """Runs all jobs in one call and judges each."""
    wanted = [
        (
            expected(operation, job, torch.float32),
            expected(operation, job, torch.float64),
            floor_of(operation, job),
        )
        for job in jobs
    ]
    run(operation, jobs)
    for job, (baseline, exact, floor) in zip(jobs, wanted, strict=True):
        assert_as_good(job.out, baseline, exact, floor)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("normalize", NORMS)
@pytest.mark.parametrize("decay", DECAYS)
def test_every_rule_over_mixed_shapes(decay: str, normalize: str, operation: str) -> None:
    assert_right(operation, [random_job(operation, shape, decay, normalize) for shape in SHAPES])


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_mixed_rules_and_dtypes_in_one_call(operation: str) -> None:
    rules = [("oja", "layer"), ("instar", "filter"), ("sanger", "mean"), ("none", "none")]
    jobs = [
        random_job(operation, shape, decay, normalize, dtype=dtype, groups=2 if shape[0] % 2 == 0 else 1)
        for dtype in DTYPES
        for shape, (decay, normalize) in zip(SHAPES, rules, strict=True)
    ]
    assert_right(operation, jobs)


@pytest.mark.parametrize("columns", [9, 128, 129, 512, 1100])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_real_tiles(operation: str, columns: int) -> None:
    assert_right(operation, [random_job(operation, (11, columns))])


def test_rows_longer_than_sixteen_bits_count() -> None:
    assert_right("delta", [random_job("delta", (3, 65_600))])


def test_more_rows_than_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epilogue, "MAX_BLOCKS", 4)
    for shape in ((67, 9), (13, 150)):
        assert_right("gate", [random_job("gate", shape), random_job("gate", shape, normalize="filter")])


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_layer_alone_and_among_others_is_the_same(operation: str) -> None:
    together = [random_job(operation, shape) for shape in SHAPES]
    alone = [job._replace(out=job.out.clone()) for job in together]
    if operation == "learn":
        alone = [job._replace(weight=job.out) for job in alone]
    run(operation, together)
    for job in reversed(alone):
        run(operation, [job])
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.out, other.out)


def test_alignment_does_not_change_the_result() -> None:
    job = random_job("delta", (5, 264))
    run("delta", [job])
    buffer = torch.empty(5 * 264 + 1)
    buffer[1:] = job.A.view(-1)
    moved = job._replace(A=buffer[1:].view(5, 264), out=torch.empty(5, 264))
    run("delta", [moved])
    assert torch.equal(moved.out, job.out)


def test_two_launches_for_any_number_of_layers() -> None:
    with recording() as launches:
        epilogue.gate_([random_job("gate", shape) for shape in SHAPES * 3])
    assert [one.kernel for one in launches] == [epilogue.reduce_kernel, epilogue.apply_kernel]
    with recording() as launches:
        epilogue.gate_([random_job("gate", (4, 4), dtype=dtype) for dtype in DTYPES * 2])
    assert len(launches) == 2 * len(DTYPES)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, operation: str) -> None:
    """Each operand in a layout of its own, inside a buffer of NaN that must stay as it is."""
    jobs, views = [], []
    for names in (("A",), ("weight",), ("out",), ("A", "weight", "out")):
        job = random_job(operation, (3, 4, 2, 3), dtype=torch.bfloat16)
        moved = {name: embed(getattr(job, name), layout) for name in names}
        job = job._replace(**moved)
        jobs.append(job._replace(weight=job.out) if operation == "learn" else job)
        views += [getattr(jobs[-1], name) for name in names]
    assert_right(operation, jobs)
    if layout in ("slice", "step"):
        assert all(guards_intact(view) for view in views if view._base is not None)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["A", "weight"])
def test_a_scale_that_is_not_finite_makes_its_scope_nan(where: str, value: float) -> None:
    """In the first, a middle and the last piece of a row; the layer beside it stays as it is."""
    for operation, positions in (("delta", (0, 8, 18)), ("gate", (17,)), ("learn", (3,))):
        layers = [random_job(operation, (5, 19)) for _ in positions]
        filters = [random_job(operation, (5, 19), normalize="filter") for _ in positions]
        for job, position in zip(layers + filters, positions * 2, strict=True):
            getattr(job, where)[2, position] = value
        other = random_job(operation, (5, 19))
        run(operation, [*layers, other, *filters])
        assert all(bool(job.out.isnan().all()) for job in layers)
        assert all(bool(job.out[2].isnan().all()) for job in filters)
        assert not any(bool(job.out[[0, 1, 3, 4]].isnan().any()) for job in filters)
        assert not bool(other.out.isnan().any())


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("normalize", ["mean", "none"])
def test_constant_norms_keep_elements_that_are_not_finite_to_themselves(normalize: str) -> None:
    job = random_job("delta", (5, 19), "none", normalize)
    job.A[1, 3], job.A[4, 18] = math.inf, math.nan
    run("delta", [job])
    assert job.out[1, 3] == math.inf
    assert bool(job.out[4, 18].isnan())
    assert int(job.out.isfinite().sum()) == job.out.numel() - 2


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_that_are_not_finite_become_nan(dtype: torch.dtype) -> None:
    job = random_job("gate", (5, 19), dtype=dtype)
    job.out[1, 3], job.out[2, 17], job.out[4, 18] = math.inf, -math.inf, math.nan
    run("gate", [job])
    assert job.out.isnan().nonzero().tolist() == [[1, 3], [2, 17], [4, 18]]


@pytest.mark.usefixtures("_small_tiles")
def test_a_gradient_of_zero_stays_zero() -> None:
    job = random_job("gate", (5, 19))
    run("gate", [job])
    assert job.out.view(-1)[:2].tolist() == [0.0, 0.0]
    assert int((job.out == 0).sum()) == 2


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("operation", ["delta", "gate"])
def test_without_decay_the_weight_is_not_looked_at(operation: str) -> None:
    job = random_job(operation, (5, 19), "none")
    ignored = job._replace(out=job.out.clone(), weight=torch.full_like(job.weight, math.nan))
    run(operation, [job, ignored])
    assert torch.equal(job.out, ignored.out)


@pytest.mark.usefixtures("_small_tiles")
def test_an_infinite_weight_learns_as_the_formula_says() -> None:
    job = random_job("learn", (5, 19), "none")
    job.weight[2, 3] = math.inf
    run("learn", [job])
    assert job.weight[2, 3] == math.inf
    assert int(job.weight.isfinite().sum()) == job.weight.numel() - 1


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("normalize", ["layer", "filter"])
@pytest.mark.parametrize("size", [3e38, 1e-38, 1e-42])
def test_huge_and_subnormal_updates(size: float, normalize: str) -> None:
    job = random_job("delta", (5, 19), "none", normalize)
    job.A.uniform_(-1, 1).mul_(size)
    assert_right("delta", [job])


@pytest.mark.usefixtures("_small_tiles")
def test_the_largest_update_is_exactly_one() -> None:
    jobs = [random_job("delta", (5, 19)), random_job("delta", (5, 19), normalize="filter")]
    run("delta", jobs)
    assert jobs[0].out.abs().amax() == 1
    assert bool((jobs[1].out.abs().amax(1) == 1).all())


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("normalize", NORMS)
@pytest.mark.parametrize("decay", DECAYS)
def test_no_positions_give_no_update(decay: str, normalize: str) -> None:
    job = random_job("delta", (5, 19), decay, normalize)
    job.A.zero_()
    job.moments.zero_()
    run("delta", [job])
    assert bool((job.out == 0).all())


def test_empty_layers_and_empty_lists() -> None:
    full = random_job("gate", (4, 4))
    jobs = [random_job("gate", (4, 4))._replace(out=torch.empty(0, 4)), full]
    run("gate", jobs)
    assert not bool(full.out.isnan().any())
    with recording() as launches:
        run("gate", [])
        run("learn", [job._replace(A=job.A[:0], weight=job.weight[:0], out=job.out[:0]) for job in jobs])
    assert launches == []


def test_table_is_made_again_only_when_something_moved() -> None:
    job, other = (random_job("gate", (4, 4)) for _ in range(2))
    run("gate", [job, other])
    before = epilogue._upload.cache_info()
    run("gate", [job, other])
    assert epilogue._upload.cache_info().hits == before.hits + 1
    run("gate", [job, other._replace(out=other.out.clone())])
    assert epilogue._upload.cache_info().misses == before.misses + 1


def test_the_table_of_a_single_layer_is_made_on_the_device() -> None:
    before = epilogue._upload.cache_info()
    run("gate", [random_job("gate", (4, 4))])
    assert epilogue._upload.cache_info() == before


def test_the_device_of_the_tensors_is_asked_whether_it_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one may be the current device."""
    current = [0]

    @contextlib.contextmanager
    def entered(device: torch.device) -> Iterator[None]:
        previous, current[0] = current[0], device.index
        yield
        current[0] = previous

    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] == 1)
    assert epilogue._is_capturing(torch.device("cuda", 1))
    assert not epilogue._is_capturing(torch.device("cuda", 0))


@pytest.mark.parametrize("rows", [1, 7, 8, 1023, 8192, 8193, 65_536, 1_000_003])
@pytest.mark.parametrize("tile_rows", [2, 8])
def test_blocks_cover_the_rows(tile_rows: int, rows: int) -> None:
    per_block = epilogue.rows_per_block(rows, tile_rows)
    assert per_block % tile_rows == 0
    assert math.ceil(rows / per_block) <= epilogue.MAX_BLOCKS


@pytest.mark.parametrize("shape", [(2, 5), (7, 3, 343), (5, 1024), (3, 1, 1), (8, 5), (33, 129)])
def test_sum_splits_adds_in_order(shape: tuple[int, ...]) -> None:
    parts = torch.randn(shape)
    total = torch.zeros(shape[1:])
    for part in parts:
        total += part
    assert torch.equal(epilogue.sum_splits(parts), total)


def test_sum_of_one_split_is_no_copy() -> None:
    parts = torch.randn(1, 3, 4)
    assert epilogue.sum_splits(parts).data_ptr() == parts.data_ptr()


@pytest.mark.parametrize("splits", [1, 3, 8, 17])
@pytest.mark.parametrize(
    ("units", "taps", "padded", "channels"), [(5, 9, 8, 3), (70, 1, 24, 19), (3, 25, 16, 16)]
)
def test_sum_filters_orders_as_a_weight(
    splits: int, units: int, taps: int, padded: int, channels: int
) -> None:
    """What a weight has no place for is not read: it may be anything."""
    parts = torch.randn(splits, units, taps, padded)
    parts[..., channels:] = math.nan
    total = torch.zeros(units, taps, padded)
    for part in parts:
        total += part
    expected = total[..., :channels].movedim(-1, 1)
    result = epilogue.sum_filters(parts, channels)
    assert result.is_contiguous()
    assert torch.equal(result, expected)


def test_a_weight_whose_order_is_the_sum_s_is_no_copy() -> None:
    parts = torch.randn(1, 4, 1, 16)
    assert epilogue.sum_filters(parts, 16).data_ptr() == parts.data_ptr()


def test_a_wrong_decay_would_be_seen() -> None:
    job = random_job("delta", (5, 19))
    run("delta", [job])
    wrong = expected("delta", job._replace(weight=-1.1 * job.weight), torch.float64)
    with pytest.raises(AssertionError, match="too far"):
        assert_as_good(job.out, wrong.float(), wrong, floor_of("delta", job))

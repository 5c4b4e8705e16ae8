"""The epilogue in CUDA (decay, norm, then store, gate, learn or step, over many layers) against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from epilogue_jobs import DECAYS, DTYPES, NORMS, OPERATIONS, RATE, expected, floor_of, random_job
from oracle import EPS32, LAYOUTS, assert_as_good, embed, guards_intact
from torch import Tensor

from ghl_kernels.backends import eager
from ghl_kernels.backends.cuda.kernels import epilogue
from ghl_kernels.backends.eager import SGDOptions, Stepped
from ghl_kernels.backends.gpu.jobs import Job

pytestmark = pytest.mark.usefixtures("cuda")

# Teams of one thread, of a few, of a warp, of several warps and of a block, with whole chunks and without; a
# block with a part of its rows, several blocks; rows of several rounds of a block.
SHAPES = (
    (4, 2, 2, 1),
    (300, 5),
    (67, 16),
    (3, 3, 7),
    (19, 160),
    (5, 600),
    (3, 1100),
    (2, 2304),
    (1, 9),
    (70, 1),
)
SCHEDULES: tuple[tuple[Any, ...], ...] = (("reverse",), ("random", 1), ("random", 2))
LAYERS_PER_LAUNCH = 24


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


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("normalize", NORMS)
@pytest.mark.parametrize("decay", DECAYS)
def test_every_rule_over_mixed_shapes(decay: str, normalize: str, operation: str) -> None:
    assert_right(operation, [random_job(operation, shape, decay, normalize) for shape in SHAPES])


@pytest.mark.races
@pytest.mark.parametrize("operation", OPERATIONS)
def test_mixed_rules_and_dtypes_in_one_call(operation: str) -> None:
    rules = [("oja", "layer"), ("instar", "filter"), ("sanger", "mean"), ("none", "none")]
    jobs = [
        random_job(operation, shape, decay, normalize, dtype=dtype, groups=2 if shape[0] % 2 == 0 else 1)
        for dtype in DTYPES
        for shape in SHAPES
        for decay, normalize in rules
    ]
    assert_right(operation, jobs)


def test_a_row_longer_than_sixteen_bits_count() -> None:
    assert_right("delta", [random_job("delta", (2, 65_601))])


@pytest.mark.parametrize("columns", [3, 2052])
def test_more_rows_than_the_blocks_of_a_layer_hold_at_a_time(columns: int) -> None:
    rows = 1025 * (256 if columns == 3 else 1)
    assert_right("gate", [random_job("gate", (rows, columns)), random_job("gate", (3, 3))])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_more_layers_than_a_launch_takes(operation: str) -> None:
    for count in (LAYERS_PER_LAUNCH - 1, LAYERS_PER_LAUNCH, LAYERS_PER_LAUNCH + 1, 3 * LAYERS_PER_LAUNCH):
        assert_right(operation, [random_job(operation, SHAPES[i % len(SHAPES)]) for i in range(count)])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_layer_alone_and_among_others_is_the_same(operation: str) -> None:
    together = [random_job(operation, shape) for shape in SHAPES]
    alone = [copy_of(job) for job in together]
    run(operation, together)
    for job in reversed(alone):
        run(operation, [job])
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.out, other.out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_bits_do_not_depend_on_the_order_of_threads(
    operation: str, dtype: torch.dtype, cuda: ModuleType
) -> None:
    rules = [("oja", "layer"), ("oja", "filter")]
    jobs = [random_job(operation, shape, *rule, dtype=dtype) for shape in SHAPES for rule in rules]
    others = [[copy_of(job) for job in jobs] for _ in SCHEDULES]
    run(operation, jobs)
    for schedule, copies in zip(SCHEDULES, others, strict=True):
        cuda.schedule(*schedule)
        run(operation, copies)
        assert all(torch.equal(a.out, b.out) for a, b in zip(jobs, copies, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_bits_do_not_depend_on_alignment(operation: str, dtype: torch.dtype) -> None:
    """Chunks of 16 bytes, and the same elements one by one."""
    for shape in ((67, 16), (3, 2304)):
        job = random_job(operation, shape, dtype=dtype)
        moved = job._replace(**{name: misaligned(getattr(job, name)) for name in ("A", "weight", "out")})
        moved = moved._replace(weight=moved.out) if operation == "learn" else moved
        run(operation, [job])
        run(operation, [moved])
        assert moved.out.data_ptr() % 16
        assert torch.equal(job.out, moved.out)


def test_gradient_of_another_dtype_than_the_weight() -> None:
    for dtype, other in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        job = random_job("gate", (67, 16), dtype=dtype)
        assert_right("gate", [job._replace(out=job.out.to(other))])


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, operation: str) -> None:
    """Each operand in a layout of its own, inside a buffer of NaN that must stay as it is."""
    jobs, views = [], []
    for names in (("A",), ("weight",), ("out",), ("A", "weight", "out")):
        job = random_job(operation, (3, 8, 3, 3), dtype=torch.bfloat16)
        moved = {name: embed(getattr(job, name), layout) for name in names}
        job = job._replace(**moved)
        jobs.append(job._replace(weight=job.out) if operation == "learn" else job)
        views += [getattr(jobs[-1], name) for name in names]
    assert_right(operation, jobs)
    if layout in ("slice", "step"):
        assert all(guards_intact(view) for view in views if view._base is not None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["A", "weight"])
@pytest.mark.parametrize("columns", [19, 1100])
def test_a_scale_that_is_not_finite_makes_its_scope_nan(columns: int, where: str, value: float) -> None:
    """In the first, a middle and the last chunk of a row; the layer beside it stays as it is."""
    for operation, positions in (("delta", (0, 8, columns - 1)), ("gate", (17,)), ("learn", (3,))):
        layers = [random_job(operation, (5, columns)) for _ in positions]
        filters = [random_job(operation, (5, columns), normalize="filter") for _ in positions]
        for job, position in zip(layers + filters, positions * 2, strict=True):
            getattr(job, where)[2, position] = value
        other = random_job(operation, (5, columns))
        run(operation, [*layers, other, *filters])
        assert all(bool(job.out.isnan().all()) for job in layers)
        assert all(bool(job.out[2].isnan().all()) for job in filters)
        assert not any(bool(job.out[[0, 1, 3, 4]].isnan().any()) for job in filters)
        assert not bool(other.out.isnan().any())


@pytest.mark.parametrize("normalize", ["mean", "none"])
def test_constant_norms_keep_elements_that_are_not_finite_to_themselves(normalize: str) -> None:
    job = random_job("delta", (5, 19), "none", normalize)
    job.A[1, 3], job.A[4, 18] = math.inf, math.nan
    run("delta", [job])
    assert job.out[1, 3] == math.inf
    assert bool(job.out[4, 18].isnan())
    assert int(job.out.isfinite().sum()) == job.out.numel() - 2


def test_a_number_of_positions_that_is_nan_is_not_hidden() -> None:
    job = random_job("delta", (5, 19), "oja", "mean")
    job.moments[-1] = math.nan
    run("delta", [job])
    assert bool(job.out.isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_that_are_not_finite_become_nan(dtype: torch.dtype) -> None:
    job = random_job("gate", (5, 19), dtype=dtype)
    job.out[1, 3], job.out[2, 17], job.out[4, 18] = math.inf, -math.inf, math.nan
    run("gate", [job])
    assert job.out.isnan().nonzero().tolist() == [[1, 3], [2, 17], [4, 18]]


def test_a_gradient_of_zero_stays_zero() -> None:
    job = random_job("gate", (5, 19))
    run("gate", [job])
    assert job.out.view(-1)[:2].tolist() == [0.0, 0.0]
    assert int((job.out == 0).sum()) == 2


@pytest.mark.parametrize("operation", ["delta", "gate"])
def test_without_decay_the_weight_is_not_looked_at(operation: str) -> None:
    job = random_job(operation, (5, 19), "none")
    ignored = job._replace(out=job.out.clone(), weight=torch.full_like(job.weight, math.nan))
    run(operation, [job, ignored])
    assert torch.equal(job.out, ignored.out)


def test_an_infinite_weight_learns_as_the_formula_says() -> None:
    job = random_job("learn", (5, 19), "none")
    job.weight[2, 3] = math.inf
    run("learn", [job])
    assert job.weight[2, 3] == math.inf
    assert int(job.weight.isfinite().sum()) == job.weight.numel() - 1


@pytest.mark.parametrize("normalize", ["layer", "filter"])
@pytest.mark.parametrize("size", [3e38, 1e-38, 1e-42])
def test_huge_and_subnormal_updates(size: float, normalize: str) -> None:
    job = random_job("delta", (5, 19), "none", normalize)
    job.A.uniform_(-1, 1).mul_(size)
    assert_right("delta", [job])


def test_the_largest_update_is_exactly_one() -> None:
    jobs = [random_job("delta", (5, 1100)), random_job("delta", (5, 1100), normalize="filter")]
    run("delta", jobs)
    assert jobs[0].out.abs().amax() == 1
    assert bool((jobs[1].out.abs().amax(1) == 1).all())


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
    empty = [random_job("gate", shape) for shape in ((0, 4), (4, 0))]
    run("gate", [empty[0], full, empty[1]])
    assert not bool(full.out.isnan().any())
    run("gate", [])
    run("learn", [job._replace(out=job.weight) for job in empty])


def test_the_module_itself_skips_empty_layers(cuda: ModuleType) -> None:
    """First, last, and alone."""
    job = random_job("delta", (5, 19))
    want = job._replace(out=job.out.clone())
    run("delta", [want])
    layer = epilogue._layer(job)
    none = layer._replace(rows=0, A=0, weight=0, out=0)
    workspace = torch.empty(20)
    arguments = {
        "dtype": 0,
        "target": 1,
        "rate": 0.0,
        "workspace": workspace.data_ptr(),
        "device": 0,
        "stream": 0,
    }
    cuda.foreach_epilogue(layers=[none, layer, none._replace(rows=5, columns=0)], **arguments)
    assert torch.equal(job.out, want.out)
    cuda.foreach_epilogue(layers=[none, none], **arguments)


def test_a_missing_workspace_is_refused(cuda: ModuleType) -> None:
    layers = [epilogue._layer(random_job("delta", shape, normalize="layer")) for shape in ((5, 19), (7, 3))]
    with pytest.raises(RuntimeError, match=r"delta of \[5, 19\], \[7, 3\]: no workspace"):
        cuda.foreach_epilogue(layers=layers, dtype=0, target=1, rate=0.0, workspace=0, device=0, stream=0)


@pytest.mark.parametrize(("field", "value"), [("decay", 3), ("normalize", -1)])
def test_codes_that_do_not_exist(field: str, value: int, cuda: ModuleType) -> None:
    layer = epilogue._layer(random_job("delta", (5, 19)))._replace(**{field: value})
    with pytest.raises(ValueError, match=f"{field} must lie between"):
        cuda.foreach_epilogue(layers=[layer], dtype=0, target=1, rate=0.0, workspace=0, device=0, stream=0)


def test_a_wrong_decay_would_be_seen() -> None:
    job = random_job("delta", (5, 19))
    run("delta", [job])
    wrong = expected("delta", job._replace(weight=-1.1 * job.weight), torch.float64)
    with pytest.raises(AssertionError, match="too far"):
        assert_as_good(job.out, wrong.float(), wrong, floor_of("delta", job))


# --- the step of SGD ----------------------------------------------------------------------------

OPTIONS = {
    "plain": SGDOptions(0.1, 0.0, 0.0, 0.0, False, False),
    "decay": SGDOptions(0.1, 0.0, 0.0, 0.2, False, False),
    "momentum": SGDOptions(0.1, 0.9, 0.0, 0.0, False, False),
    "dampening": SGDOptions(0.1, 0.9, 0.3, 0.2, False, False),
    "nesterov": SGDOptions(0.1, 0.9, 0.0, 0.2, True, False),
    "maximize": SGDOptions(0.1, 0.9, 0.3, 0.2, False, True),
}


def random_step(
    shape: Sequence[int],
    rule: tuple[str, str] = ("oja", "layer"),
    *,
    dtype: torch.dtype = torch.float32,
    gate: str = "sign",
    begins: bool = False,
) -> Stepped:
    job = random_job("gate", shape, *rule, dtype=dtype)
    buffer = torch.full_like(job.weight, math.nan) if begins else torch.randn(*shape).to(dtype)
    return Stepped(job.weight, job.out, job.A, job.moments, buffer, begins, 1, *rule, gate)


def converted(layer: Stepped, change: Callable[[Tensor], Tensor]) -> Stepped:
    """The layer with tensors of its own, A and the moments among them."""
    return layer._replace(**{name: change(t) for name, t in layer._asdict().items() if isinstance(t, Tensor)})


def without_momentum(layer: Stepped) -> Stepped:
    return layer._replace(momentum_buffer=None, begins=True)


def floors(layer: Stepped, options: SGDOptions) -> tuple[Tensor, Tensor]:
    """Of weight and momentum: the gated gradient's, and eight roundings of all that is added up."""
    job = Job(layer.A, layer.moments, layer.weight, layer.grad, layer.groups, layer.decay, layer.normalize)
    H = expected("delta", job, torch.float64).abs()
    W = layer.weight.double().abs()
    M = torch.zeros_like(H) if layer.momentum_buffer is None else layer.momentum_buffer.double().abs()
    terms = H + options.weight_decay * W + M.nan_to_num()
    momentum = floor_of("delta", job) + 8 * EPS32 * terms
    return 2 * options.lr * momentum + EPS32 * W, momentum


def assert_steps(layers: Sequence[Stepped], options: SGDOptions) -> None:
    """Takes one step with all layers and judges weights and momenta; gradients and sums stay."""
    exact = [converted(layer, Tensor.double) for layer in layers]
    baseline = [converted(layer, lambda t: t.clone().float()) for layer in layers]
    before = [converted(layer, Tensor.clone) for layer in layers]
    for copies in (exact, baseline):
        eager.gated_sgd_(copies, options, eager)
    epilogue.fused_sgd_(layers, options)
    for layer, old, one, other in zip(layers, before, exact, baseline, strict=True):
        weight_floor, momentum_floor = floors(old, options)
        assert_as_good(layer.weight, other.weight, one.weight, weight_floor)
        if layer.momentum_buffer is not None:
            assert_as_good(layer.momentum_buffer, other.momentum_buffer, one.momentum_buffer, momentum_floor)
        for name in ("grad", "A", "moments"):
            assert torch.equal(getattr(layer, name), getattr(old, name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_step_over_mixed_layers(name: str, dtype: torch.dtype) -> None:
    options = OPTIONS[name]
    rules = [("oja", "layer"), ("instar", "filter"), ("sanger", "mean"), ("none", "none")]
    layers = [
        random_step(
            shape, rules[i % 4], dtype=dtype, gate="none" if i % 3 == 2 else "sign", begins=i % 2 == 1
        )
        for i, shape in enumerate(SHAPES)
    ]
    assert_steps(layers if options.momentum else [without_momentum(layer) for layer in layers], options)


@pytest.mark.races
def test_step_of_two_dtypes_and_more_layers_than_a_launch_takes() -> None:
    layers = [random_step(SHAPES[i % len(SHAPES)], dtype=DTYPES[i % 2]) for i in range(60)]
    assert_steps(layers, OPTIONS["nesterov"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_step_layouts(layout: str) -> None:
    layers, views = [], []
    for names in (("grad",), ("weight",), ("momentum_buffer",), ("A", "grad", "weight", "momentum_buffer")):
        layer = random_step((3, 8, 3, 3), dtype=torch.bfloat16)
        layer = layer._replace(**{name: embed(getattr(layer, name), layout) for name in names})
        layers.append(layer)
        views += [getattr(layer, name) for name in names]
    assert_steps(layers, OPTIONS["dampening"])
    if layout in ("slice", "step"):
        assert all(guards_intact(view) for view in views)


def test_step_bits_do_not_depend_on_the_order_of_threads(cuda: ModuleType) -> None:
    layers = [random_step(shape) for shape in SHAPES]
    copies = [[converted(layer, Tensor.clone) for layer in layers] for _ in SCHEDULES]
    epilogue.fused_sgd_(layers, OPTIONS["nesterov"])
    for schedule, others in zip(SCHEDULES, copies, strict=True):
        cuda.schedule(*schedule)
        epilogue.fused_sgd_(others, OPTIONS["nesterov"])
        for layer, other in zip(layers, others, strict=True):
            assert torch.equal(layer.weight, other.weight)
            assert torch.equal(layer.momentum_buffer, other.momentum_buffer)


def test_step_hides_nothing_that_is_not_finite() -> None:
    bad_sum, bad_grad, bad_momentum = (random_step((5, 19)) for _ in range(3))
    bad_sum.A[2, 3] = math.inf
    bad_grad.grad[2, 3] = math.inf
    bad_momentum.momentum_buffer[2, 3] = -math.inf
    epilogue.fused_sgd_([bad_sum, bad_grad, bad_momentum], OPTIONS["momentum"])
    assert bool(bad_sum.weight.isnan().all())
    assert bad_grad.weight.isnan().nonzero().tolist() == [[2, 3]]
    assert bad_momentum.weight[2, 3] == math.inf


def test_step_without_a_gate_does_not_look_at_the_gradient() -> None:
    layer = random_step((5, 19), gate="none")
    other = converted(layer, Tensor.clone)
    other.grad.fill_(math.nan)
    epilogue.fused_sgd_([layer, other], OPTIONS["momentum"])
    assert torch.equal(layer.weight, other.weight)


def test_step_with_no_rate_and_an_infinite_weight() -> None:
    """A weight decay of 0 takes nothing from the weight, an infinite one no more than others."""
    layer = without_momentum(random_step((5, 19), ("none", "layer")))
    layer.weight[1, 1] = math.inf
    epilogue.fused_sgd_([layer], OPTIONS["plain"])
    assert layer.weight[1, 1] == math.inf
    assert int(layer.weight.isfinite().sum()) == layer.weight.numel() - 1


def test_step_of_empty_layers() -> None:
    epilogue.fused_sgd_([], OPTIONS["plain"])
    epilogue.fused_sgd_([random_step((0, 4)), random_step((4, 0))], OPTIONS["momentum"])


@pytest.mark.parametrize("change", [{"dampening": 0.01}, {"weight_decay": 0.01}, {"maximize": True}])
def test_a_wrong_step_would_be_seen(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    right = epilogue.fused_sgd_
    monkeypatch.setattr(epilogue, "fused_sgd_", lambda layers, o: right(layers, o._replace(**change)))
    with pytest.raises(AssertionError, match="too far"):
        assert_steps([random_step((5, 19))], OPTIONS["momentum"])


# --- helpers ------------------------------------------------------------------------------------


def copy_of(job: Job) -> Job:
    out = job.out.clone()
    return job._replace(out=out, weight=out if job.weight is job.out else job.weight)


def misaligned(tensor: Tensor) -> Tensor:
    """The same values one element behind a multiple of 16 bytes."""
    buffer = tensor.new_empty(tensor.numel() + 17)
    offset = -buffer.data_ptr() // buffer.element_size() % 16 + 1
    return buffer[offset : offset + tensor.numel()].view(tensor.shape).copy_(tensor)

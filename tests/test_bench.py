"""The benchmark harness: its arithmetic on a fake clock, its models, its baselines. Nothing is timed."""

from __future__ import annotations

import json

import pytest
import torch

from bench import interleave, report
from bench.baselines import topk, unfold
from bench.crossover import crossover
from bench.interleave import Candidate, Spread, Timing
from bench.models import DeepHebb, ResNet, Triangle
from bench.report import Bar, Row
from ghl_kernels import reference
from ghl_kernels.rule import HebbianRule


class FakeClock:
    """Time that passes only when a candidate says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, *seconds: float):
        """A function whose n-th call takes seconds[n]."""
        durations = iter(seconds)

        def run() -> None:
            self.now += next(durations)

        return run


def test_spread_interpolates_percentiles() -> None:
    spread = Spread.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (spread.p20, spread.median, spread.p80) == pytest.approx((1.8, 3.0, 4.2))


def test_spread_refuses_an_empty_sample() -> None:
    with pytest.raises(ValueError, match="empty"):
        Spread.of([])


def test_ratios_pair_the_times_of_one_round() -> None:
    timing = Timing("ours", seconds=(2.0, 30.0, 1.0), baseline=(1.0, 10.0, 2.0))
    # The ratio of the medians would be 1; the median of the ratios is 2.
    assert timing.cost.median == 2.0
    assert timing.speedup.median == 0.5


def test_interleave_times_every_candidate_once_a_round_and_drops_the_warmup() -> None:
    clock = FakeClock()
    timings = interleave.interleave(
        [Candidate("base", clock.takes(9.0, 1.0, 2.0)), Candidate("ours", clock.takes(9.0, 4.0, 6.0))],
        rounds=2,
        threads=1,
        warmup=1,
        clock=clock,
    )
    assert list(timings) == ["base", "ours"]
    assert timings["base"].seconds == (1.0, 2.0)
    assert timings["ours"].seconds == (4.0, 6.0)
    assert timings["ours"].cost.median == pytest.approx(3.5)
    assert timings["base"].cost.median == 1.0


def test_interleave_does_not_time_the_reset() -> None:
    clock = FakeClock()
    candidate = Candidate("base", clock.takes(1.0, 1.0), reset=clock.takes(100.0, 100.0))
    timings = interleave.interleave([candidate], rounds=2, threads=1, warmup=0, clock=clock)
    assert timings["base"].seconds == (1.0, 1.0)


@pytest.mark.parametrize(("names", "order"), [("ab", "ababab"), ("abc", "abcbcacab")])
def test_interleave_rotates_the_order_and_never_repeats_a_candidate(names: str, order: str) -> None:
    ran: list[str] = []
    candidates = [Candidate(name, lambda name=name: ran.append(name)) for name in names]
    interleave.interleave(candidates, rounds=3, threads=1, warmup=0)
    assert "".join(ran) == order


def test_interleave_pins_the_threads_and_restores_them() -> None:
    before = torch.get_num_threads()
    wanted = 1 if before > 1 else 2
    seen: list[int] = []
    candidate = Candidate("base", lambda: seen.append(torch.get_num_threads()))
    interleave.interleave([candidate], rounds=1, threads=wanted, warmup=1)
    assert seen == [wanted, wanted]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("names", "rounds", "threads", "warmup"),
    [([], 1, 1, 0), (["a", "a"], 1, 1, 0), (["a"], 0, 1, 0), (["a"], 1, 0, 0), (["a"], 1, 1, -1)],
)
def test_interleave_refuses(names: list[str], rounds: int, threads: int, warmup: int) -> None:
    with pytest.raises(ValueError, match="got"):
        interleave.interleave(
            [Candidate(name, lambda: None) for name in names], rounds=rounds, threads=threads, warmup=warmup
        )


@pytest.mark.parametrize(
    ("bar", "met", "missed"),
    [(Bar(1.42), 1.42, 1.43), (Bar(8.0, at_least=True), 8.0, 7.99)],
    ids=["most", "least"],
)
def test_bar(bar: Bar, met: float, missed: float) -> None:
    assert bar.met_by(met)
    assert not bar.met_by(missed)


def test_report_keeps_rows_that_miss_their_bar(tmp_path) -> None:
    rows = [
        Row("step", "fast", "backprop", Spread(1.0, 0.9, 1.1), "1 ms", Bar(1.42)),
        Row("step", "slow", "backprop", Spread(2.0, 1.9, 2.1), "2 ms", Bar(1.42)),
        Row("step", "rival", "backprop", Spread(2.3, 2.2, 2.4), "2 ms"),
    ]
    report.write_json(tmp_path / "new" / "out.json", rows, {"threads": 2, "rounds": 25})
    document = json.loads((tmp_path / "new" / "out.json").read_text())
    assert [row["met"] for row in document["rows"]] == [True, False, None]
    assert document["rows"][1]["ratio"]["median"] == 2.0
    assert document["settings"] == {"threads": 2, "rounds": 25}
    assert {"cpu", "commit", "torch", "ghl_kernels", "python"} <= document["environment"].keys()
    assert report.table(rows).row_count == 3


def test_deephebb_has_the_published_shapes() -> None:
    model = DeepHebb()
    sizes = []
    for stage in model.stages:
        stage[1].register_forward_hook(lambda conv, args, u: sizes.append(tuple(u.shape[1:])))
    with torch.no_grad():
        logits = model(torch.zeros(1, 3, 32, 32))
    assert sizes == [(96, 32, 32), (384, 16, 16), (1536, 8, 8)]
    assert model.classifier.in_features == 24576
    assert logits.shape == (1, 10)


@pytest.mark.parametrize("argument", [{"size": 12}, {"size": 0}, {"activation": "tanh"}])
def test_deephebb_refuses(argument: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="got"):
        DeepHebb(**argument)


def test_triangle() -> None:
    u = torch.tensor([0.0, 2.0, 7.0]).view(1, 3, 1, 1)
    assert Triangle()(u).flatten().tolist() == [0.0, 0.0, 4.0]
    assert Triangle(0.5)(u).flatten().tolist() == [0.0, 0.0, 2.0]


def test_resnet20_has_the_published_size() -> None:
    model = ResNet(blocks=3)
    with torch.no_grad():
        logits = model(torch.zeros(2, 3, 32, 32))
    assert logits.shape == (2, 10)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) == 19
    assert sum(conv.weight.numel() for conv in convolutions) == 267_696


@pytest.mark.parametrize(
    ("stride", "padding", "dilation"), [(1, 1, 1), (2, 0, 1), ((1, 2), (2, 1), (2, 1))], ids=str
)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_unfold_is_the_ghl_rule(stride, padding, dilation, temperature: float) -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 5, (3, 2), stride, padding, dilation, bias=False, dtype=torch.float64)
    unfold.convert(torch.nn.Sequential(conv), temperature)
    x = torch.randn(4, 3, 9, 8, dtype=torch.float64)
    u = conv(x)
    grad_u = torch.randn_like(u)
    u.backward(grad_u)
    unfold.gate_(conv)
    expected = reference.conv_weight_grad(
        x,
        u.detach(),
        grad_u,
        conv.weight.detach(),
        HebbianRule.ghl(temperature),
        stride=stride,
        padding=padding,
        dilation=dilation,
    )
    torch.testing.assert_close(conv.weight.grad, expected, rtol=1e-10, atol=1e-12)


def test_unfold_converts_the_model_and_keeps_its_output() -> None:
    torch.manual_seed(0)
    model = DeepHebb(widths=(4, 6, 8), size=8)
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    unfold.convert(model)
    torch.testing.assert_close(model(x), expected)
    assert sum(isinstance(module, unfold.UnfoldConv2d) for module in model.modules()) == 3


def test_unfold_gate_needs_a_backward() -> None:
    conv = torch.nn.Conv2d(3, 5, 3, bias=False)
    unfold.convert(torch.nn.Sequential(conv))
    conv(torch.randn(1, 3, 4, 4))
    with pytest.raises(RuntimeError, match="backward"):
        unfold.gate_(conv)


@pytest.mark.parametrize(
    "options", [{"groups": 3}, {"bias": True}, {"padding": "same"}, {"padding_mode": "reflect"}]
)
def test_unfold_refuses_what_was_not_published(options: dict[str, object]) -> None:
    conv = torch.nn.Conv2d(3, 6, 3, **({"bias": False} | options))
    unfold.convert(torch.nn.Sequential(conv))
    with pytest.raises(ValueError, match="published"):
        conv(torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
@pytest.mark.parametrize("k", [1, 3, 7])
def test_topk_is_the_kwta_rule(k: int, memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    u = torch.randn(2, 7, 4, 3, dtype=torch.float64).to(memory_format=memory_format)
    y = topk.kwta_topk(u, k)
    assert torch.equal(y, reference.kwta(u, k, dim=1))
    assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    ("costs", "expected"),
    [((0.5, 0.8, 0.9), 0.4), ((1.1, 2.0, 3.0), 0.0), ((0.5, 0.5, 1.5), 0.2), ((0.5, 1.0, 2.0), 0.1)],
    ids=["always", "never", "between", "exactly"],
)
def test_crossover_is_where_the_cost_passes_one(costs: tuple[float, ...], expected: float) -> None:
    assert crossover((0.05, 0.1, 0.4), costs) == pytest.approx(expected)

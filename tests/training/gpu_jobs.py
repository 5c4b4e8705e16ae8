"""What only a GPU can show of training: a script, whose jobs test_training_on_a_gpu.py runs one by one."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import oracle
import torch
from beside_reference import PASSES, RULE, OptimizerOf
from precision import train_in
from reference_model import ReferenceModel, assert_gradients_close, small_batches, small_network, summed_loss
from torch import Tensor, nn

import ghl_kernels as ghl
from ghl_kernels.backends.cuda.kernels import correlate

Step = Callable[[tuple[Tensor, ...]], None]
StepOf = Callable[[nn.Module], Step]
Around = Callable[[], contextlib.AbstractContextManager[Any]]

WARM_UP = 3
REPLAYS = 4
OPTIMIZERS: dict[str, OptimizerOf] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, capturable=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, capturable=True, fused=True),
}
# As GHLSGD and torch.optim.SGD both take them.
MOMENTA: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.05},
    "momentum": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "damped": {"lr": 0.05, "momentum": 0.9, "dampening": 0.1},
    "nesterov": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
}


def low_precision() -> None:
    """Autocast and GradScaler with every form of AdamW, and bfloat16 weights, judged at every step."""

    def rounded(dtype: torch.dtype) -> float:
        """Tensor cores take an activity in x's dtype."""
        return torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0.0

    with mock.patch.object(oracle, "operand_rounding", rounded):
        for dtype in (torch.bfloat16, torch.float16):
            train_in(dtype, "backward", autocast=True, device="cuda")
            for options in ({"foreach": True}, {"fused": True}, {"capturable": True}):
                kind = _with(torch.optim.AdamW, options)
                scaled = not options.get("fused")  # those are given the scaled gradient
                train_in(dtype, "step", autocast=True, scaled=scaled, optimizer=kind, device="cuda")
        for gate_at in PASSES:
            train_in(torch.bfloat16, gate_at, autocast=False, device="cuda")


def _with(kind: type[torch.optim.Optimizer], options: dict[str, bool]) -> type[torch.optim.Optimizer]:
    class Configured(kind):  # type: ignore[misc, valid-type]
        def __init__(self, params: object, lr: float) -> None:
            super().__init__(params, lr=lr, **options)

    return Configured


def fused_with_grad_scaler() -> None:
    """The fused optimizers divide by the scale themselves."""
    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        model = ghl.convert(small_network().cuda(), RULE, gate_at="step")
        reference = ReferenceModel(model.cpu())
        model.cuda()
        optimizer = kind(model.parameters(), lr=0.05, fused=True)
        ghl.StepGate(optimizer, model)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
        gated: dict[str, Tensor] = {}
        optimizer.register_step_pre_hook(
            lambda *_: gated.update({n: p.grad.clone() for n, p in model.named_parameters()})  # noqa: B023
        )
        for x, target in small_batches(*PASSES["step"], dtype=torch.float32):
            scaler.scale(summed_loss(model, (x.cuda(), target.cuda()))).backward()
            reference.backward((x, target))
        scale = scaler.get_scale()
        scaler.step(optimizer)
        assert_gradients_close({n: g.cpu() / scale for n, g in gated.items()}, reference, torch.float32)


def capture() -> None:
    """Forward, backward and step in one CUDA graph, replayed on other data; the same steps run eagerly."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    for dtype in (torch.float32, torch.float64):
        for name, optimizer_of in OPTIMIZERS.items():
            for gate_at in PASSES:
                step_of = functools.partial(_step_of, optimizer_of=optimizer_of, gate_at=gate_at)
                _capture(_network(gate_at, dtype), step_of, step_of, dtype, f"{gate_at}, {name}, {dtype}")


def captured_lists() -> None:
    """The same, in 16 bits by autocast, of a first layer that keeps lists of winners for backward."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    autocast = functools.partial(torch.autocast, "cuda", torch.bfloat16)
    with mock.patch.object(correlate, "correlate_winners", wraps=correlate.correlate_winners) as summed:
        for gate_at in PASSES:
            torch.manual_seed(0)
            layers = nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
            model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 5))
            model = model.to("cuda", memory_format=torch.channels_last)  # type: ignore[call-overload]
            ghl.convert(model, ghl.HebbianRule.kwta(1), gate_at=gate_at)
            step_of = functools.partial(
                _step_of, optimizer_of=OPTIMIZERS["SGD"], gate_at=gate_at, around=autocast
            )
            _capture(model, step_of, step_of, torch.float32, f"lists, {gate_at}", layout=torch.channels_last)
    assert summed.called


def fused_step() -> None:
    """GHLSGD beside SGD under a StepGate, step by step."""
    for name, options in MOMENTA.items():
        torch.manual_seed(0)
        model = ghl.convert(small_network().cuda(), RULE, gate_at="step")
        twin = copy.deepcopy(model)
        step, gated = _fused_step_of(model, options), _gated_step_of(twin, options)
        for seed in range(REPLAYS):
            for x, target in small_batches(8, dtype=torch.float32, seed=seed):
                step((x.cuda(), target.cuda()))
                gated((x.cuda(), target.cuda()))
        _assert_same(model, twin, f"GHLSGD, {name}")


def captured_fused_step() -> None:
    """A step of GHLSGD in a CUDA graph, replayed on other data; SGD's under a StepGate, run eagerly."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    for name, options in MOMENTA.items():
        fused = functools.partial(_fused_step_of, options=options)
        gated = functools.partial(_gated_step_of, options=options)
        _capture(_network("step", torch.float32), fused, gated, torch.float32, f"GHLSGD, {name}")


def _network(gate_at: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return ghl.convert(small_network().to("cuda", dtype), RULE, gate_at=gate_at)


def _capture(
    model: nn.Module,
    step_of: StepOf,
    eager_of: StepOf,
    dtype: torch.dtype,
    what: str,
    layout: torch.memory_format = torch.contiguous_format,
) -> None:
    twin = copy.deepcopy(model)
    batches = [
        (x.cuda().contiguous(memory_format=layout), target.cuda())
        for seed in range(WARM_UP + REPLAYS)
        for x, target in small_batches(8, dtype=dtype, seed=seed)
    ]
    eager = eager_of(twin)
    for batch in batches:
        eager(batch)
    static = tuple(t.clone() for t in batches[0])
    step = step_of(model)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for batch in batches[:WARM_UP]:
            _fill(static, batch)
            step(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(static)
    for batch in batches[WARM_UP:]:
        _fill(static, batch)
        graph.replay()
    _assert_same(model, twin, what)
    step(batches[0])  # and eager steps go on from there
    eager(batches[0])
    _assert_same(model, twin, f"{what}, afterwards")


def _assert_same(model: nn.Module, twin: nn.Module, what: str) -> None:
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{what}: {name}: {text}")


def _step_of(
    model: nn.Module,
    optimizer_of: OptimizerOf,
    gate_at: str,
    around: Around = contextlib.nullcontext,
) -> Step:
    optimizer = optimizer_of(model.parameters())
    if gate_at == "step":
        ghl.StepGate(optimizer, model)
    return _stepping(model, optimizer, around)


def _gated_step_of(model: nn.Module, options: dict[str, Any]) -> Step:
    return _step_of(model, lambda parameters: torch.optim.SGD(parameters, **options), "step")


def _fused_step_of(model: nn.Module, options: dict[str, Any]) -> Step:
    return _stepping(model, ghl.GHLSGD(model, **options))


def _stepping(
    model: nn.Module, optimizer: torch.optim.Optimizer, around: Around = contextlib.nullcontext
) -> Step:
    def step(batch: tuple[Tensor, ...]) -> None:
        optimizer.zero_grad()
        with around():
            loss = summed_loss(model, (batch[0], batch[1]))
        loss.backward()
        optimizer.step()

    return step


def _fill(static: tuple[Tensor, ...], batch: tuple[Tensor, ...]) -> None:
    for mine, theirs in zip(static, batch, strict=True):
        mine.copy_(theirs)


JOBS: dict[str, Callable[[], None]] = {
    "low precision": low_precision,
    "fused with GradScaler": fused_with_grad_scaler,
    "capture": capture,
    "fused step": fused_step,
    "captured fused step": captured_fused_step,
    "captured lists": captured_lists,
}
# Without the CUDA kernels they would compare torch's operators with themselves; then this is the exit status.
OF_CUDA_KERNELS = ("fused step", "captured fused step", "captured lists")
NO_KERNELS = 77

if __name__ == "__main__":
    # float32 is compared with float64, or one way to compute it with another
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    job = sys.argv[1]
    missing = {status.name: status.reason for status in ghl.backends() if not status.available}
    if job in OF_CUDA_KERNELS and "cuda" in missing:
        print(missing["cuda"])
        sys.exit(NO_KERNELS)
    JOBS[job]()

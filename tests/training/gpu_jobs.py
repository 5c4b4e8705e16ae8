"""What only a GPU can show of training: a script, whose jobs test_training_on_a_gpu.py runs one by one."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from unittest import mock

import oracle
import torch
from beside_reference import PASSES, RULE, OptimizerOf
from precision import train_in
from reference_model import ReferenceModel, assert_gradients_close, small_batches, small_network, summed_loss
from torch import Tensor, nn

import ghl_kernels as ghl

WARM_UP = 3
REPLAYS = 4
OPTIMIZERS: dict[str, OptimizerOf] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, capturable=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, capturable=True, fused=True),
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
                _capture(gate_at, optimizer_of, dtype, f"{gate_at}, {name}, {dtype}")


def _capture(gate_at: str, optimizer_of: OptimizerOf, dtype: torch.dtype, what: str) -> None:
    torch.manual_seed(0)
    model = ghl.convert(small_network().to("cuda", dtype), RULE, gate_at=gate_at)
    twin = copy.deepcopy(model)
    batches = [
        (x.cuda(), target.cuda())
        for seed in range(WARM_UP + REPLAYS)
        for x, target in small_batches(8, dtype=dtype, seed=seed)
    ]
    eager = _step_of(twin, optimizer_of, gate_at)
    for batch in batches:
        eager(batch)
    static = tuple(t.clone() for t in batches[0])
    step = _step_of(model, optimizer_of, gate_at)
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
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{what}: {name}: {text}")
    step(batches[0])  # and eager steps go on from there
    eager(batches[0])
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=lambda text: f"{what}, afterwards: {text}")


def _step_of(
    model: nn.Module, optimizer_of: OptimizerOf, gate_at: str
) -> Callable[[tuple[Tensor, ...]], None]:
    optimizer = optimizer_of(model.parameters())
    if gate_at == "step":
        ghl.StepGate(optimizer, model)

    def step(batch: tuple[Tensor, ...]) -> None:
        optimizer.zero_grad()
        summed_loss(model, (batch[0], batch[1])).backward()
        optimizer.step()

    return step


def _fill(static: tuple[Tensor, ...], batch: tuple[Tensor, ...]) -> None:
    for mine, theirs in zip(static, batch, strict=True):
        mine.copy_(theirs)


JOBS: dict[str, Callable[[], None]] = {
    "low precision": low_precision,
    "fused with GradScaler": fused_with_grad_scaler,
    "capture": capture,
}

if __name__ == "__main__":
    JOBS[sys.argv[1]]()

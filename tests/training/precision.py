"""A network in low precision whose every step is judged by the float64 rule; for any device."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from beside_reference import PASSES, RULE
from reference_model import small_batches, small_network
from torch import nn
from torch.nn import functional as F
from witness import Witness

import ghl_kernels as ghl

STEPS = 3


def train_in(
    dtype: torch.dtype,
    gate_at: str,
    *,
    autocast: bool,
    scaled: bool = False,
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
    device: str = "cpu",
) -> None:
    """Steps of bfloat16 or float16, by autocast or by the weights themselves, each judged on its own."""
    torch.manual_seed(0)
    model = small_network().to(device, torch.float32 if autocast else dtype)
    if not autocast:
        model[1].float()  # batch norm's statistics, as mixed-precision recipes keep them
        model[1].register_forward_pre_hook(lambda _, inputs: inputs[0].float())
        model[1].register_forward_hook(lambda _module, _inputs, output: output.to(dtype))
    ghl.convert(model, RULE, gate_at=gate_at)
    witness = Witness(model)
    chosen = optimizer(model.parameters(), lr=2.0**-6)
    if gate_at == "step":
        ghl.StepGate(chosen, model)
    judged = _judge_every_step(chosen, model, witness)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**6, enabled=scaled)
    cast = torch.autocast(device, dtype) if autocast else nullcontext()
    for seed in range(STEPS):
        for x, target in small_batches(*PASSES[gate_at], dtype=torch.float32, seed=seed):
            with cast:
                u = model(x.to(device) if autocast else x.to(device, dtype))
            assert u.dtype == dtype
            scaler.scale(F.cross_entropy(u.float(), target.to(device), reduction="sum")).backward()
        scaler.step(chosen)
        scaler.update()
        chosen.zero_grad()
        witness.forget()
    assert len(judged) == STEPS
    assert all(p.isfinite().all() for p in model.parameters())


def _judge_every_step(
    optimizer: torch.optim.Optimizer, model: nn.Module, witness: Witness
) -> list[torch.optim.Optimizer]:
    """Judges the gradients that every step is about to use; returns the steps it has judged."""
    judged: list[torch.optim.Optimizer] = []

    def judge(stepping: torch.optim.Optimizer, *_: object) -> None:
        witness.assert_follows({name: p.grad for name, p in model.named_parameters()})
        judged.append(stepping)

    optimizer.register_step_pre_hook(judge)
    return judged

"""From the sums to the weights: decay, norm, then store, gate, learn or step, for many layers at a time."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ghl_kernels import _native
from ghl_kernels.backends.cuda.kernels.arguments import DTYPE, stream_of
from ghl_kernels.backends.eager import SGDOptions, Stepped
from ghl_kernels.backends.gpu.jobs import Job, ordered_as, run
from ghl_kernels.backends.gpu.memory import workspace

_TARGET = {"gate": 0, "delta": 1, "learn": 2}
_DECAY = {"none": 0, "oja": 1, "instar": 2}
_NORM = {"layer": 0, "filter": 1, "mean": 2, "none": 2}


class Layer(NamedTuple):
    """One layer as the module takes it: addresses (0 for none), and strides from row to row in elements."""

    rows: int
    columns: int
    A: int
    A_stride: int
    weight: int
    weight_stride: int
    out: int
    out_stride: int
    grad: int
    grad_stride: int
    momentum: int
    momentum_stride: int
    row_decay: int  # of the moments that multiply the rows of W (instar)
    positions: int  # of their number, where the norm is their mean
    decay: int
    normalize: int
    is_gated: int = 1
    begins_momentum: int = 0


def delta(jobs: Sequence[Job]) -> None:
    """out <- H of every layer: what eager.delta returns."""
    run(jobs, functools.partial(_launch, "delta", 0.0))


def gate_(jobs: Sequence[Job]) -> None:
    """out <- |H| * sign(G) + (G - G) of every layer, G being its ``grad``, or out itself."""
    run(jobs, functools.partial(_launch, "gate", 0.0))


def learn_(jobs: Sequence[Job], lr: float) -> None:
    """out <- weight + lr * H of every layer, out being the weight."""
    run(jobs, functools.partial(_launch, "learn", lr))


def fused_sgd_(layers: Sequence[Stepped], options: SGDOptions) -> None:
    """What eager.gated_sgd_ does, with one reading and one writing of every tensor after the norm."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[Stepped]] = {}
    for layer in layers:
        if layer.weight.numel():
            by_kind.setdefault((layer.weight.device, layer.weight.dtype), []).append(layer)
    for members in by_kind.values():
        jobs = [Job(s.A, s.moments, s.weight, s.weight, s.groups, s.decay, s.normalize) for s in members]
        run(jobs, functools.partial(_launch_step, members, options))


def _launch(target: str, rate: float, jobs: list[Job]) -> None:
    dtype = jobs[0].weight.dtype
    if target == "gate" and {jobs[0].out.dtype, jobs[0].signs.dtype} != {dtype}:
        return _gate_in_float32(jobs)
    held = _workspace(jobs)
    _native.load_cuda().foreach_epilogue(
        layers=[_layer(job, grad=job.signs if target == "gate" else None) for job in jobs],
        dtype=DTYPE[dtype],
        target=_TARGET[target],
        rate=rate,
        workspace=held.data_ptr(),
        **stream_of(jobs[0].out),
    )
    return None


def _gate_in_float32(jobs: list[Job]) -> None:
    """A gradient of another dtype than its weight's: both without a rounding of their own."""
    wide = [
        job._replace(
            weight=job.weight.float(),
            out=job.out.float(),
            grad=None if job.grad is None else job.grad.float(),
        )
        for job in jobs
    ]
    _launch("gate", 0.0, wide)
    for job, ready in zip(jobs, wide, strict=True):
        if ready.out is not job.out:
            job.out.copy_(ready.out)


def _launch_step(layers: list[Stepped], options: SGDOptions, jobs: list[Job]) -> None:
    held = _workspace(jobs)
    operands = [_operands(layer, job) for layer, job in zip(layers, jobs, strict=True)]
    _native.load_cuda().gated_sgd(
        layers=[
            _layer(job, grad, momentum)._replace(
                is_gated=int(layer.gate == "sign"), begins_momentum=int(layer.begins)
            )
            for layer, job, (grad, momentum) in zip(layers, jobs, operands, strict=True)
        ],
        dtype=DTYPE[jobs[0].weight.dtype],
        rate=options.lr,
        momentum=options.momentum,
        gain=1 - options.dampening,
        weight_decay=options.weight_decay,
        nesterov=options.nesterov,
        maximize=options.maximize,
        workspace=held.data_ptr(),
        **stream_of(jobs[0].out),
    )
    for layer, (_, momentum) in zip(layers, operands, strict=True):
        if (
            momentum is not None
            and layer.momentum_buffer is not None
            and momentum is not layer.momentum_buffer
        ):
            layer.momentum_buffer.copy_(momentum)


def _operands(layer: Stepped, job: Job) -> tuple[Tensor | None, Tensor | None]:
    """The gradient, where it is looked at, and the momentum, ordered as the weight."""
    grad = ordered_as(job.out, layer.grad) if layer.gate == "sign" else None
    momentum = layer.momentum_buffer
    return grad, None if momentum is None else ordered_as(job.out, momentum)


def _layer(job: Job, grad: Tensor | None = None, momentum: Tensor | None = None) -> Layer:
    rows = job.out.shape[0]
    moments = job.moments.data_ptr()
    return Layer(
        rows,
        job.out.numel() // rows,
        *_matrix(job.A),
        *_matrix(job.weight),
        *_matrix(job.out),
        *_matrix(grad),
        *_matrix(momentum),
        row_decay=moments if job.decay == "instar" else 0,
        positions=moments + 4 * (job.moments.numel() - 1) if job.normalize == "mean" else 0,
        decay=_DECAY[job.decay],
        normalize=_NORM[job.normalize],
    )


def _matrix(tensor: Tensor | None) -> tuple[int, int]:
    """Its address and the stride of its rows, which are dense."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))


def _workspace(jobs: list[Job]) -> Tensor:
    rows = sum(job.out.shape[0] for job in jobs)
    return workspace((2, rows), jobs[0].out.device, f"the epilogue of {rows} units")

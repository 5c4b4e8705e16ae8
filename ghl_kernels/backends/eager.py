"""The operations in torch's own operators: any device, any floating dtype.

Sums are float32 (float64 for float64 inputs) whatever the input dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from ghl_kernels._geometry import Geometry
from ghl_kernels.rule import Competition

Activities = Callable[[Tensor, int, Competition], Tensor]
Outer = Callable[[Tensor | None, Tensor, Tensor], Tensor]
Correlate = Callable[[Tensor, Tensor, tuple[int, ...], Geometry], Tensor]

EPS = 1e-30
# 16-bit inputs are summed from float32 copies of this many bytes at a time.
_BLOCK_BYTES = 32 << 20


def status() -> tuple[bool, str]:
    """(available, reason)."""
    return True, "torch's own operators, any device"


def refusal(device: torch.device, dtype: torch.dtype) -> str:
    """Why this backend cannot run on such tensors, or "" when it can."""
    return ""


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the sums over positions."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def compete(u: Tensor, dim: int, competition: Competition) -> Tensor:
    """y = c(u), same shape and dtype as u."""
    return torch.empty_like(u).copy_(_compete(u.to(sum_dtype(u.dtype)), dim, competition))


def competition_state(u: Tensor, dim: int, competition: Competition) -> tuple[Tensor, Tensor, Tensor]:
    """Per position: the k-th largest u, the last unit that wins a tie at it, logsumexp over the winners."""
    v = u.to(sum_dtype(u.dtype)).movedim(dim, -1)
    k = competition.winners or v.shape[-1]
    wins = _winner_mask(v, -1, k)
    threshold = v.topk(k, dim=-1).values[..., -1]
    units = torch.arange(v.shape[-1], device=v.device)
    cut = torch.where(wins & (v == threshold.unsqueeze(-1)), units, -1).amax(-1).to(torch.int32)
    logsumexp = torch.where(wins, v / competition.temperature, float("-inf")).logsumexp(-1)
    bad = v.isnan().any(-1)
    nan = float("nan")
    return threshold.masked_fill(bad, nan), cut.masked_fill(bad, -1), logsumexp.masked_fill(bad, nan)


def winners(u: Tensor, dim: int, competition: Competition) -> tuple[Tensor, Tensor]:
    """Winning units (int32, ascending) and their activities, (P, k); the first unit is -1 where u is NaN."""
    k = competition.winners
    v = u.to(sum_dtype(u.dtype)).movedim(dim, -1).reshape(-1, u.shape[dim])
    y = _compete(v, -1, competition)
    units = torch.arange(v.shape[1], device=v.device)
    unit = torch.where(_winner_mask(v, -1, k), units, v.shape[1]).sort(-1).values[:, :k]
    # a NaN compares false everywhere and leaves too few winners; keep the indices inside the row
    unit = unit.clamp_max(v.shape[1] - 1)
    activity = y.gather(1, unit)
    unit[:, 0].masked_fill_(v.isnan().any(-1), -1)
    return unit.to(torch.int32).contiguous(), activity.contiguous()


def linear_sums(
    x: Tensor,
    u: Tensor,
    competition: Competition,
    decay: str,
    activities: Activities | None = None,
    outer: Outer | None = None,
) -> tuple[Tensor, Tensor]:
    """A (N, D) and the moments of y, from x (..., D), u (..., N).

    ``activities`` gives y for a block of u, and ``outer`` is what stands in for add_outer.
    """
    activities = activities or _float_activities
    outer = outer or add_outer
    x, u = x.reshape(-1, x.shape[-1]), u.reshape(-1, u.shape[-1])
    dtype = sum_dtype(x.dtype)
    A: Tensor | None = None
    moments = new_moments(u.shape[1], 1, decay, u.shape[0], dtype, x.device)
    for x_block, u_block in _blocks(x, u):
        y = activities(u_block, 1, competition)
        A = outer(A, x_block, y)
        add_moments(moments, y, 1, decay)
    return (x.new_zeros((u.shape[1], x.shape[1]), dtype=dtype) if A is None else A), moments


def conv_sums(
    x: Tensor,
    u: Tensor,
    geometry: Geometry,
    competition: Competition,
    decay: str,
    activities: Activities | None = None,
    correlate: Correlate | None = None,
) -> tuple[Tensor, Tensor]:
    """A (N, C / groups, *kernel_size) and the moments of y, from x (B, C, *size) and u (B, N, *out_size).

    ``correlate`` is what stands in for conv_correlate.
    """
    activities = activities or _float_activities
    correlate = correlate or conv_correlate
    dtype = sum_dtype(x.dtype)
    shape = (u.shape[1], x.shape[1] // geometry.groups, *geometry.kernel_size)
    A: Tensor | None = None
    positions = u.shape[0] * u.shape[2:].numel()
    moments = new_moments(u.shape[1], geometry.groups, decay, positions, dtype, x.device)
    for x_block, u_block in _blocks(x, u):
        y = activities(u_block, 1, competition)
        part = correlate(x_block, y, shape, geometry)
        A = part if A is None else A.add_(part)
        if moments.numel() > 1:
            add_moments(moments, y.movedim(1, -1), geometry.groups, decay)
    return (x.new_zeros(shape, dtype=dtype) if A is None else A), moments


def linear_pair(
    x: Tensor,
    u: Tensor,
    grad_u: Tensor,
    competition: Competition,
    decay: str,
    activities: Activities | None = None,
    outer: Outer | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A (N, D), the moments of y and G (N, D), from x (..., D), u and dL/du (..., N)."""
    A, moments = linear_sums(x, u, competition, decay, activities, outer)
    return A, moments, linear_grad(x, grad_u, outer)


def linear_grad(x: Tensor, grad_u: Tensor, outer: Outer | None = None) -> Tensor:
    """G (N, D), of A's dtype, from x (..., D) and dL/du (..., N)."""
    rows = grad_u.reshape(-1, grad_u.shape[-1])
    G = (outer or add_outer)(None, x.reshape(-1, x.shape[-1]), rows)
    return G.to(sum_dtype(x.dtype)).contiguous()


def add_outer(A: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    """sum_p y_p x_p^T (N, D), from x (P, D) and y (P, N), in y's dtype; added to A where there is one."""
    x = x.to(y.dtype)
    return y.t().mm(x) if A is None else A.addmm_(y.t(), x)


def conv_pair(
    x: Tensor,
    u: Tensor,
    grad_u: Tensor,
    geometry: Geometry,
    competition: Competition,
    decay: str,
    activities: Activities | None = None,
    correlate: Correlate | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As conv_sums, and G, from dL/du of u's shape."""
    A, moments = conv_sums(x, u, geometry, competition, decay, activities, correlate)
    return A, moments, conv_grad(x, grad_u, geometry, correlate)


def conv_grad(x: Tensor, grad_u: Tensor, geometry: Geometry, correlate: Correlate | None = None) -> Tensor:
    """G, of A's shape and dtype, from dL/du of u's shape."""
    shape = (grad_u.shape[1], x.shape[1] // geometry.groups, *geometry.kernel_size)
    return (correlate or conv_correlate)(x, grad_u, shape, geometry).to(sum_dtype(x.dtype))


def conv_correlate(x: Tensor, y: Tensor, shape: tuple[int, ...], geometry: Geometry) -> Tensor:
    """sum_p y_p x_p^T by the library's weight gradient, in y's dtype; contiguous."""
    x = x.to(y.dtype)
    if y.numel() == 0 or x.numel() == 0:
        return x.new_zeros(shape)
    # Only its shape is read, but an expanded tensor would be copied: memory that is there anyway will do.
    if y.untyped_storage().nbytes() >= (y.storage_offset() + math.prod(shape)) * y.element_size():
        weight = y.as_strided(shape, _contiguous_strides(shape))
    else:
        weight = x.new_empty(shape)
    dims = len(geometry.kernel_size)
    _, A, _ = torch.ops.aten.convolution_backward(
        y,
        x,
        weight,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        [0] * dims,
        geometry.groups,
        [False, True, False],
    )
    return A.contiguous()


def _contiguous_strides(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def linear_winner_sums(
    x: Tensor, unit: Tensor, activity: Tensor, units: int, decay: str, outer: Outer | None = None
) -> tuple[Tensor, Tensor]:
    """As linear_sums, from the winners' lists (P, k)."""
    x = x.reshape(-1, x.shape[-1])
    y = _scatter(unit, activity, units)
    A = (outer or add_outer)(None, x, y)
    moments = new_moments(units, 1, decay, y.shape[0], y.dtype, x.device)
    add_moments(moments, y, 1, decay)
    return A, moments


def conv_winner_sums(
    x: Tensor, unit: Tensor, activity: Tensor, units: int, geometry: Geometry, decay: str
) -> tuple[Tensor, Tensor]:
    """As conv_sums, from the winners' lists (P, k)."""
    y = _scatter(unit, activity, units)
    moments = new_moments(units, geometry.groups, decay, y.shape[0], y.dtype, x.device)
    add_moments(moments, y, geometry.groups, decay)
    planes = y.view(x.shape[0], *geometry.out_size(x.shape[2:]), units).movedim(-1, 1)
    shape = (units, x.shape[1] // geometry.groups, *geometry.kernel_size)
    return conv_correlate(x, planes, shape, geometry), moments


def conv_winner_pair(
    x: Tensor, unit: Tensor, activity: Tensor, grad_u: Tensor, geometry: Geometry, decay: str
) -> tuple[Tensor, Tensor, Tensor]:
    """As conv_pair, from the winners' lists (P, k)."""
    A, moments = conv_winner_sums(x, unit, activity, grad_u.shape[1], geometry, decay)
    return A, moments, conv_grad(x, grad_u, geometry)


def gate(
    grad: Tensor, A: Tensor, moments: Tensor, weight: Tensor, groups: int, decay: str, normalize: str
) -> Tensor:
    """|H| * sign(grad) + (grad - grad), of weight's dtype."""
    gated = signs_in(weight.dtype, grad)
    gate_(gated, A, moments, weight, groups, decay, normalize)
    return gated


def signs_in(dtype: torch.dtype, grad: Tensor) -> Tensor:
    """A copy of ``grad`` for a gate, which asks for signs and what is not finite: none may get lost."""
    if torch.promote_types(grad.dtype, dtype) == dtype:
        return grad.to(dtype, copy=True)
    return (grad.sign() + (grad - grad)).to(dtype)


def gate_(
    grad: Tensor, A: Tensor, moments: Tensor, weight: Tensor, groups: int, decay: str, normalize: str
) -> None:
    """grad <- |H| * sign(grad) + (grad - grad)."""
    H = delta(A, moments, weight, groups, decay, normalize)
    grad.copy_(H.abs() * grad.sign() + (grad - grad))


def gate_all_(layers: Sequence[tuple[Any, ...]]) -> None:
    """gate_ of every layer, from its arguments."""
    for arguments in layers:
        gate_(*arguments)


def learn_(
    weight: Tensor, A: Tensor, moments: Tensor, lr: float, groups: int, decay: str, normalize: str
) -> None:
    """weight <- weight + lr * H."""
    H = delta(A, moments, weight, groups, decay, normalize)
    weight.copy_(weight.to(H.dtype) + lr * H)


class Stepped(NamedTuple):
    """One layer of a step of SGD on gated gradients.

    ``momentum_buffer``, of weight's shape and dtype, is updated; None without momentum. It is set, and not
    read, where it ``begins``.
    """

    weight: Tensor
    grad: Tensor  # the plain one, left as it is
    A: Tensor
    moments: Tensor
    momentum_buffer: Tensor | None
    begins: bool
    groups: int
    decay: str
    normalize: str
    gate: str


class SGDOptions(NamedTuple):
    """What a parameter group of torch.optim.SGD holds, as numbers."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool


def gated_sgd_(layers: Sequence[Stepped], options: SGDOptions, backend: Any) -> None:
    """weight <- torch.optim.SGD's for the gradient |H| sign(G), or -H, by a backend's gate_all_ and delta."""
    gradients, gated = [], []
    for layer in layers:
        rule = layer.A, layer.moments, layer.weight, layer.groups, layer.decay, layer.normalize
        if layer.gate == "sign":
            gradients.append(layer.grad.clone())
            gated.append((gradients[-1], *rule))
        else:
            gradients.append(backend.delta(*rule).neg_().to(layer.weight.dtype))
    if gated:
        backend.gate_all_(gated)
    buffers = [None if layer.begins else layer.momentum_buffer for layer in layers]
    sgd([layer.weight for layer in layers], gradients, buffers, **options._asdict())
    for layer, buffer in zip(layers, buffers, strict=True):
        if layer.begins and layer.momentum_buffer is not None and buffer is not None:
            layer.momentum_buffer.copy_(buffer)


def delta(A: Tensor, moments: Tensor, weight: Tensor, groups: int, decay: str, normalize: str) -> Tensor:
    """H, of weight's shape and A's dtype."""
    W = weight.detach().flatten(1).to(A.dtype)
    H = A.flatten(1)
    if decay == "oja":
        H = H - (W * H).sum(1, keepdim=True) * W
    elif decay == "instar":
        H = H - moments[:-1].unsqueeze(1) * W
    elif decay in ("subspace", "sanger"):
        H = H - mixing(moments, W, groups, decay)
    return normalized(H, moments, normalize).view(weight.shape)


def mixing(moments: Tensor, W: Tensor, groups: int, decay: str) -> Tensor:
    """(sum_p y_p y_p^T) W per group, W (N, D); the lower triangle of the sums for Sanger's rule."""
    per_group = W.shape[0] // groups
    C = moments[:-1].view(groups, per_group, per_group)
    if decay == "sanger":
        C = C.tril()
    return torch.bmm(C, W.reshape(groups, per_group, W.shape[1])).view(W.shape)


def normalized(H: Tensor, moments: Tensor, normalize: str) -> Tensor:
    """H (N, D) divided by its scale; a scale that is not finite makes its scope NaN."""
    if normalize == "none" or H.numel() == 0:
        return H.clone()
    if normalize == "mean":
        return H / moments[-1].clamp_min(1.0)
    scale = H.abs().amax() if normalize == "layer" else H.abs().amax(1, keepdim=True)
    return torch.where(scale.isfinite(), H / (scale + EPS), torch.full_like(H, math.nan))


def moments_size(units: int, groups: int, decay: str) -> int:
    """Length of the moments: what the decay needs of y beside A, then the number of positions P."""
    if decay == "instar":
        return units + 1
    if decay in ("subspace", "sanger"):
        return units * (units // groups) + 1
    return 1


def new_moments(
    units: int, groups: int, decay: str, positions: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Moments of no positions but with their number: zeros for what the decay needs of y, then [P]."""
    size = moments_size(units, groups, decay)
    if size == 1:
        return torch.full((1,), positions, dtype=dtype, device=device)
    moments = torch.zeros(size, dtype=dtype, device=device)
    moments[-1].fill_(positions)  # an assignment copies a number from the host, which waits for the GPU
    return moments


def add_moments(moments: Tensor, y: Tensor, groups: int, decay: str) -> None:
    """Add y (..., N) to the moments: sum_p y_p (instar) or sum_p y_p y_p^T per group (subspace, sanger).

    y is rearranged only where the decay needs it.
    """
    positions, units = y.shape[:-1].numel(), y.shape[-1]
    if decay == "instar":
        moments[:-1] += y.reshape(positions, units).sum(0)
    elif decay in ("subspace", "sanger"):
        grouped = y.reshape(positions, groups, units // groups).transpose(0, 1)
        moments[:-1] += torch.bmm(grouped.transpose(1, 2), grouped).flatten()


def _float_activities(u: Tensor, dim: int, competition: Competition) -> Tensor:
    return _compete(u.to(sum_dtype(u.dtype)), dim, competition)


def _compete(u: Tensor, dim: int, competition: Competition) -> Tensor:
    activity, k, temperature, anti = competition
    if u.numel() == 0:
        return torch.zeros_like(u)
    wins = _winner_mask(u, dim, k) if k else None
    if activity == "softmax":
        y = torch.softmax(u / temperature if wins is None else (u / temperature).where(wins, -math.inf), dim)
    elif activity == "linear":
        y = u
    elif activity == "relu":
        y = torch.relu(u)
    else:
        y = torch.ones_like(u)
    if wins is not None:
        y = torch.where(wins, y, 0.0)
    if anti:
        first = torch.zeros_like(u, dtype=torch.bool).scatter_(dim, u.argmax(dim, keepdim=True), True)
        y = torch.where(first, y, -y)
    return torch.where(u.isnan().any(dim, keepdim=True), math.nan, y)


def _winner_mask(u: Tensor, dim: int, k: int) -> Tensor:
    """The k largest along dim; torch.topk breaks ties as it likes, so they are counted out by index."""
    threshold = u.topk(k, dim).values.narrow(dim, k - 1, 1)
    above, level = u > threshold, u == threshold
    room = k - above.sum(dim, keepdim=True)
    return above | (level & (level.cumsum(dim) <= room))


def _scatter(unit: Tensor, activity: Tensor, units: int) -> Tensor:
    """Dense y (P, N) from the winners' lists."""
    y = activity.new_zeros((unit.shape[0], units))
    y.scatter_(1, unit.clamp_min(0).long(), activity)
    return torch.where(unit[:, :1] < 0, math.nan, y)


def _blocks(x: Tensor, u: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """x and u: whole where they have 32 or 64 bits, in blocks of the batch where float32 copies are made."""
    if u.shape[0] == 0:
        return
    if x.dtype in (torch.float32, torch.float64):
        yield x, u
        return
    step = max(1, _BLOCK_BYTES * u.shape[0] // max(1, 4 * (x.numel() + u.numel())))
    for start in range(0, u.shape[0], step):
        yield x[start : start + step], u[start : start + step]

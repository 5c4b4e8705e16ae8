"""Stage 6: results on streams of their own, and tensors of more than 2^31 elements."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import ghl_kernels as ghl
from bench.gpu import stage
from bench.gpu.stage import Stage, available_kernels
from ghl_kernels.rule import HebbianRule

RULES = {"softmax": HebbianRule.ghl(), "k-WTA": HebbianRule.kwta(8)}
# Of A, relative to its largest entry, in bfloat16; the parity stage is the judge of accuracy.
TOLERANCE = 1e-2
# Clock cycles that the producer of u is kept waiting, so that a kernel which does not wait reads zeros.
DELAY = 50_000_000
ROWS_AT_A_TIME = 1 << 16
SIDE = (4096, 512, 256)  # positions, units and features on a side stream
SMALL_SIDE = (40, 16, 8)
DTYPE = torch.bfloat16


class Sizes(NamedTuple):
    """Rows (positions, units or features), of more than 2^31 elements in the full form."""

    positions: int
    wide: int
    narrow: int


FULL = Sizes((1 << 20) + 3, 2056, 64)
SMALL = Sizes(70, 24, 16)


def run(this: Stage) -> None:
    """Every backend of kernels, every rule."""
    sizes = SMALL if this.dry else FULL
    cases: dict[str, Callable[[torch.device, Sizes, HebbianRule], float]] = {
        "competition": competition_error,
        "pair": pair_error,
    }
    for backend in available_kernels(this):
        with ghl.use_backend(backend):
            for rule_name, rule in RULES.items():
                for name, measure in cases.items():
                    label = f"{backend}, {name} of {sizes.positions} x {sizes.wide}, {rule_name}"
                    error = this.attempt(label, lambda m=measure, r=rule: m(this.device, sizes, r))
                    if error is not None:
                        this.add("large", {"case": label, "error": error})
                        if not error <= TOLERANCE:
                            this.errors.append(f"{label}: off by {error:.2e} of the largest entry")
            for name, make in streamed(this.device, SMALL_SIDE if this.dry else SIDE).items():
                label = f"{backend}, {name} on a side stream"
                same = this.attempt(label, lambda make=make: follows_its_stream(this.device, *make()))
                this.add("streams", {"backend": backend, "operation": name, "ordered": same})
                if same is False:
                    this.errors.append(f"{label} did not wait for what it reads")


def competition_error(device: torch.device, sizes: Sizes, rule: HebbianRule) -> float:
    """Largest error of y in the first and in the last rows of u (positions, wide)."""
    u = torch.randn(sizes.positions, sizes.wide, dtype=DTYPE, device=device)
    y = ghl.functional.compete(u, rule, 1)
    ends = [slice(0, 50), slice(sizes.positions - 50, sizes.positions)]
    return max(
        _relative_error(y[rows], ghl.reference.compete(u[rows].float(), rule, 1).to(DTYPE)) for rows in ends
    )


def pair_error(device: torch.device, sizes: Sizes, rule: HebbianRule) -> float:
    """The larger error of A and G, from x (positions, wide)."""
    x = torch.randn(sizes.positions, sizes.wide, dtype=DTYPE, device=device)
    u, grad_u = torch.randn(2, sizes.positions, sizes.narrow, dtype=DTYPE, device=device)
    A, _, G = torch.ops.ghl.linear_pair(x, u, grad_u, *rule.competition(sizes.narrow), "oja")
    expected = torch.zeros(2, sizes.narrow, sizes.wide, device=device)
    for rows in torch.arange(sizes.positions, device="cpu").split(ROWS_AT_A_TIME):
        here = slice(int(rows[0]), int(rows[-1]) + 1)
        y = ghl.reference.compete(u[here].float(), rule, 1)
        expected[0] += y.t() @ x[here].float()
        expected[1] += grad_u[here].float().t() @ x[here].float()
    return max(_relative_error(A, expected[0]), _relative_error(G, expected[1]))


Streamed = tuple[Tensor, Callable[[Tensor], Tensor]]


def streamed(device: torch.device, size: tuple[int, int, int]) -> dict[str, Callable[[], Streamed]]:
    """By operation: what it reads, and how it is called on a tensor with those values."""
    P, N, D = size
    k_winners, softmax = RULES["k-WTA"], RULES["softmax"]

    def randn(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def pair() -> Streamed:
        x, grad_u = randn(P, D), randn(P, N)
        arguments = (*softmax.competition(N), "oja")
        return randn(P, N), lambda u: torch.cat(torch.ops.ghl.linear_pair(x, u, grad_u, *arguments)[::2])

    def sparse() -> Streamed:
        competition = k_winners.competition(N)
        lists = torch.ops.ghl.winners(randn(P, N), 1, *competition)
        return randn(P, D), lambda x: torch.ops.ghl.linear_winner_sums(x, *lists, N, "none")[0]

    def gate() -> Streamed:
        weight, A = (randn(N, D, dtype=torch.float32) for _ in range(2))
        moments = torch.full((1,), float(P), device=device)

        def gated(G: Tensor) -> Tensor:
            grad = G.clone()
            torch.ops.ghl.gate_(grad, A, moments, weight, 1, "oja", "layer")
            return grad

        return randn(N, D, dtype=torch.float32), gated

    return {
        "competition": lambda: (randn(P, N), lambda u: ghl.functional.compete(u, k_winners, 1)),
        "pair": pair,
        "sparse": sparse,
        "gate": gate,
    }


def follows_its_stream(device: torch.device, values: Tensor, run: Callable[[Tensor], Tensor]) -> bool | None:
    """Whether a kernel on a side stream waits for what was queued there before it; None without streams."""
    expected = run(values)
    if device.type == "cpu":
        return None
    late = torch.zeros_like(values)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        torch.cuda._sleep(DELAY)
        late.copy_(values)
        result = run(late)
    side.synchronize()
    return torch.equal(result, expected)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.float() - expected.float()).abs().max()
    return (difference / expected.float().abs().max()).item()


if __name__ == "__main__":
    sys.exit(stage.main("limits", run))

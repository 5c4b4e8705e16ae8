"""What users would pick instead, written from the published formulas; one algorithm a file.

Every function takes plain tensors and is free of autograd unless it says otherwise. Shapes: x (B, C, *size),
u and y (B, N, *out_size), weight, A, G and H (N, C, *kernel_size); linear x (..., D), u (..., N),
weight (N, D). ``**conv`` is stride, padding and dilation of a 2-d convolution with zero padding, as for
``ghl.functional``. Costs are counted in dense passes: one is the arithmetic of the layer's forward. Each
is tested equal to the float64 reference with the rule it stands for (tests/test_baselines.py).

``BASELINES`` maps each code ("B0", "B4c", ...) to its :class:`Baseline`.
"""

import string

from bench.baselines import (
    backprop,
    boosting,
    conv_trick,
    depthwise,
    epilogue,
    hpca,
    library,
    linear,
    scatter,
    selection,
    softhebb,
    surrogate,
    swta,
    topk,
    unfold,
)
from bench.baselines._baseline import Baseline

__all__ = ["BASELINES", "Baseline"]


def _order(baseline: Baseline) -> tuple[int, str]:
    """B4 before B4c before B12."""
    return int(baseline.code[1:].rstrip(string.ascii_lowercase)), baseline.code


_ALL = (
    backprop.BASELINE,
    *unfold.BASELINES,
    conv_trick.BASELINE,
    *library.BASELINES,
    surrogate.BASELINE,
    softhebb.BASELINE,
    *selection.BASELINES,
    topk.BASELINE,
    swta.BASELINE,
    hpca.BASELINE,
    boosting.BASELINE,
    scatter.BASELINE,
    linear.BASELINE,
    epilogue.BASELINE,
    depthwise.BASELINE,
)

BASELINES: dict[str, Baseline] = {baseline.code: baseline for baseline in sorted(_ALL, key=_order)}

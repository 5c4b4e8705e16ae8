"""Global-guided Hebbian Learning for PyTorch: drop-in layers on fused kernels.

    import ghl_kernels as ghl

    model = ghl.convert(model)  # nn.Conv*d and nn.Linear learn by GHL; train as before

See :class:`HebbianRule` for the rule, :class:`StepGate` for accumulation, AMP and DDP.
"""

import torch  # noqa: F401  first of all: the native module must join torch's OpenMP runtime

from ghl_kernels import _ops, functional, reference
from ghl_kernels._dispatch import backends, use_backend
from ghl_kernels.convert import convert, revert
from ghl_kernels.monitor import LayerReading, Monitor
from ghl_kernels.nn import GHLConv1d, GHLConv2d, GHLConv3d, GHLLayer, GHLLinear
from ghl_kernels.rule import HebbianRule
from ghl_kernels.sgd import GHLSGD
from ghl_kernels.step_gate import StepGate

__version__ = "0.1.0"

__all__ = [
    "GHLSGD",
    "GHLConv1d",
    "GHLConv2d",
    "GHLConv3d",
    "GHLLayer",
    "GHLLinear",
    "HebbianRule",
    "LayerReading",
    "Monitor",
    "StepGate",
    "backends",
    "convert",
    "functional",
    "reference",
    "revert",
    "use_backend",
]

del _ops

"""How float32 may be multiplied."""

from __future__ import annotations

import torch


def allows_tf32(is_conv: bool) -> bool:
    """Whether torch may multiply float32 in tf32; convolutions have a setting of their own."""
    setting = getattr(torch.backends.cudnn, "conv", None) if is_conv else torch.backends.cuda.matmul
    precision = getattr(setting, "fp32_precision", None)
    if precision is not None:  # torch >= 2.9, where reading the older flag may raise
        return bool(precision == "tf32")
    return torch.backends.cudnn.allow_tf32 if is_conv else torch.backends.cuda.matmul.allow_tf32

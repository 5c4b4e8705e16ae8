"""A small vision transformer whose products are all ``nn.Linear`` (and one ``nn.Conv2d`` for the patches)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention on (B, T, dim); ``nn.MultiheadAttention`` would hide weights from convert."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, 2))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), on (B, T, dim)."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """(B, 3, size, size) -> (B, classes): patches, pre-norm transformer blocks, the mean over the patches.

    Args:
        size: height and width of the input, a multiple of ``patch``.
        classes: outputs.
        patch: height and width of a patch.
        dim: features of a patch, a multiple of ``heads``.
        depth: blocks.
        heads: of the attention.
        hidden: units of each block's hidden layer; None: 4 * dim.

    Raises:
        ValueError: a size or dim that does not divide.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021; the mean in place of a class token.
    The default sizes, for 32 x 32 images, are a choice of this project.
    """

    def __init__(
        self,
        size: int = 32,
        classes: int = 10,
        patch: int = 4,
        dim: int = 192,
        depth: int = 6,
        heads: int = 3,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        if size < patch or size % patch:
            raise ValueError(f"size must be a positive multiple of patch, got {size=}, {patch=}")
        if dim < heads or dim % heads:
            raise ValueError(f"dim must be a positive multiple of heads, got {dim=}, {heads=}")
        self.patches = nn.Conv2d(3, dim, patch, stride=patch)
        self.position = nn.Parameter(torch.empty((size // patch) ** 2, dim))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.blocks = nn.Sequential(*(Block(dim, heads, hidden or 4 * dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.classifier = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.classifier(self.norm(self.blocks(tokens)).mean(1))

"""VGG: plain stacks of 3 x 3 convolutions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class VGG(nn.Module):
    """Stages of 3 x 3 convolutions with ReLU, each ended by max pooling; then three linear layers.

    (B, 3, size, size) -> (B, classes), size a multiple of 32. The default is VGG-16 at 224 x 224, without
    the published dropout.

    Args:
        convolutions: number of convolutions of each of the five stages.
        width: output channels of the first stage; they double from stage to stage, up to 8 times.
        hidden: units of the two hidden linear layers.
        size: height and width of the input.
        classes: outputs.
        bias: of the convolutions.

    Raises:
        ValueError: other than five stages, or a size that is not a positive multiple of 32.

    Source: Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
    2015, configuration D; initialization of He et al., "Delving Deep into Rectifiers", 2015, because
    without batch norm the responses would vanish with torch's own.
    """

    def __init__(
        self,
        convolutions: Sequence[int] = (2, 2, 3, 3, 3),
        width: int = 64,
        hidden: int = 4096,
        size: int = 224,
        classes: int = 1000,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if len(convolutions) != 5:
            raise ValueError(f"convolutions must be five numbers, got {tuple(convolutions)}")
        if size < 32 or size % 32:
            raise ValueError(f"size must be a positive multiple of 32, got {size}")
        layers: list[nn.Module] = []
        channels = 3
        for stage, count in enumerate(convolutions):
            out = width * min(1 << stage, 8)
            for _ in range(count):
                conv = nn.Conv2d(channels, out, 3, padding=1, bias=bias)
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
                layers += [conv, nn.ReLU(inplace=True)]
                channels = out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(channels * (size // 32) ** 2, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))

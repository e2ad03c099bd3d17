"""What stands between a tower and a trunk: the connector, and the newline that ends each row of a tiled image.

Shapes: N images, P tokens of an image, H trunk width.
"""

import torch
from torch import nn


class Connector(nn.Module):
    """Tower features [N, patches, width] -> image tokens [N, P, H]."""

    def __init__(self, kind: str, shuffle_factor: int, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.shuffle_factor = shuffle_factor
        width = vision_width * shuffle_factor**2
        if kind == "linear":
            self.layers = nn.Sequential(nn.Linear(width, text_width))
        else:
            self.layers = nn.Sequential(nn.Linear(width, text_width), nn.GELU(), nn.Linear(text_width, text_width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.shuffle_factor > 1:
            features = _join_patches(features, self.shuffle_factor)
        return self.layers(features.to(next(self.layers.parameters()).dtype))


def _join_patches(features: torch.Tensor, factor: int) -> torch.Tensor:
    """Concatenates each factor x factor square of patches: [N, S*S, C] -> [N, (S/factor)^2, C * factor^2]."""
    count, patches, width = features.shape
    side = int(patches**0.5)
    squares = features.view(count, side // factor, factor, side // factor, factor, width)
    return squares.permute(0, 1, 3, 2, 4, 5).reshape(count, (side // factor) ** 2, width * factor**2)


def fresh_newline(width: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """A newline [H] as small as a token's embedding, as LLaVA-OneVision begins with."""
    return nn.Parameter((torch.randn(width) * width**-0.5).to(dtype or torch.get_default_dtype()))

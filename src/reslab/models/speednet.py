"""SpeedNet: the small convolutional networks of the CIFAR-10 speed records (Jordan 2024, arXiv:2404.00498)."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reslab.models import ModelError
from reslab.models.network import Network

PATCH = 2  # side of the patches that the first layer whitens
EPS = 5e-4  # added to their variances


class Conv3x3(nn.Conv2d):
    """A 3×3 convolution without bias that starts as the identity on its first channels, the rest as in torch."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(c_in, c_out, 3, padding=1, bias=False)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.dirac_(self.weight.data[: self.in_channels])


def norm(channels: int) -> nn.BatchNorm2d:
    """Return a batch norm that learns a bias only."""
    layer = nn.BatchNorm2d(channels)
    layer.weight.requires_grad_(False)
    return layer


class ConvGroup(nn.Module):
    """Two or three convolutions, each with norm and GELU; the first is followed by a 2×2 max-pool.

    With `residual`, the output is gelu(F(x) + x), where x is the output of the first convolution.
    """

    def __init__(self, c_in: int, c_out: int, convs: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.convs = nn.ModuleList(Conv3x3(c_in if i == 0 else c_out, c_out) for i in range(convs))
        self.norms = nn.ModuleList(norm(c_out) for _ in range(convs))

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C_out, H // 2, W // 2)
        first = x = F.gelu(self.norms[0](F.max_pool2d(self.convs[0](x), 2)))
        for conv, norm in zip(self.convs[1:-1], self.norms[1:-1], strict=True):
            x = F.gelu(norm(conv(x)))
        x = self.norms[-1](self.convs[-1](x))
        return F.gelu(x + first if self.residual else x)


class SpeedNet(Network):
    """A whitening layer and three groups of convolutions: (N, in_channels, H, W) -> (N, num_classes).

    The first layer whitens 2×2 patches of the training images (Page 2018, "How to train your ResNet") and stays fixed,
    except for its bias. The other convolutions start as the identity, the norms learn only a bias, and the logits are
    scaled down. Train it with `param_groups.norm_bias_lr_scale`. Source: Jordan 2024, "94 % on CIFAR-10 in 3.29 seconds
    on a single GPU", arXiv:2404.00498, section 3.

    Args:
        widths: Channels of each group; each halves the resolution.
        convs: Convolutions per group.
        residual: Add the output of each group's first convolution to that of its last.
        logit_scale: Factor of the logits.
        in_channels: Channels of the images.
        num_classes: Outputs of the head; 0 for no head.

    Raises:
        ModelError: An argument is out of range.
    """

    def __init__(
        self,
        widths: Sequence[int] = (64, 256, 256),
        convs: int = 2,
        residual: bool = False,
        logit_scale: float = 1 / 9,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        if not widths or min(*widths, in_channels) < 1 or convs < 2 or num_classes < 0:
            raise ModelError(
                "widths and in_channels must be at least 1, convs at least 2, num_classes at least 0, "
                f"got {list(widths)}, {in_channels}, {convs}, {num_classes}"
            )
        self.in_channels, self.num_classes, self.num_features = in_channels, num_classes, widths[-1]
        self.init_images = 2000
        self.logit_scale = logit_scale
        self.whiten = nn.Conv2d(in_channels, 2 * in_channels * PATCH**2, PATCH)
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(self.whiten.bias)  # type: ignore[arg-type]
        channels = itertools.pairwise([self.whiten.out_channels, *widths])
        self.groups = nn.ModuleList(ConvGroup(c_in, c_out, convs, residual) for c_in, c_out in channels)
        self.head = nn.Linear(widths[-1], num_classes, bias=False) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the maximum over the positions of the last group, scaled: (N, C, H, W) -> (N, num_features)."""
        x = F.gelu(self.whiten(x))
        for group in self.groups:
            x = group(x)
        # Not amax: compiled in bf16, its backward pass looks for the maximum in unrounded values, and returns NaN.
        return x.flatten(2).max(2).values * self.logit_scale

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Set the first layer to the principal components of 2×2 patches, divided by their standard deviations."""
        patches = F.unfold(images.double(), PATCH).transpose(1, 2).flatten(0, 1)  # (N · positions, C · PATCH²)
        variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (directions / (variances + EPS).sqrt()).T.flip(0).unflatten(1, (self.in_channels, PATCH, PATCH))
        self.whiten.weight.copy_(torch.cat([filters, -filters]))

    def layer_groups(self) -> dict[str, list[nn.Module | nn.Parameter]]:
        """Return the layers by group: stem, stage1, stage2, …, head."""
        stages = {f"stage{i + 1}": group for i, group in enumerate(self.groups)}
        return {name: [layer] for name, layer in {"stem": self.whiten, **stages, "head": self.head}.items()}

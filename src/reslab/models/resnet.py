"""Residual networks (He et al. 2015, arXiv:1512.03385), with torchvision's state-dict keys.

A network is a stem, stages of blocks, a mean over the positions, and a linear head. A block computes
relu(F(x) + S(x)): F is two or three convolutions, S the shortcut. Each stage after the first halves the
resolution and doubles the channels.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from reslab.models import ModelError
from reslab.models.network import Network

Block = Literal["basic", "bottleneck"]
Stem = Literal["imagenet", "cifar", "cifar_stride2"]
Shortcut = Literal["identity", "A", "C", "none"]
Norm = Literal["batch", "group", "none", "BatchNorm2d", "SyncBatchNorm", "GroupNorm", "InstanceNorm2d", "Identity"]

relu = partial(F.relu, inplace=True)

# Kernel and stride of the first convolution; whether a 3×3 max-pool of stride 2 follows.
STEMS = {
    "imagenet": (7, 2, True),  # 224 -> 56
    "cifar": (3, 1, False),  # 32 -> 32
    "cifar_stride2": (3, 2, False),  # 32 -> 16: a quarter of the operations
}


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a group norm of 32 groups (Wu & He 2018), or fewer if a group would have less than two channels."""
    return nn.GroupNorm(math.gcd(32, channels, channels // 2), channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    **dict.fromkeys(("batch", "BatchNorm2d"), nn.BatchNorm2d),
    **dict.fromkeys(("group", "GroupNorm"), group_norm),
    **dict.fromkeys(("none", "Identity"), nn.Identity),
    "SyncBatchNorm": nn.SyncBatchNorm,
    "InstanceNorm2d": partial(nn.InstanceNorm2d, affine=True),
}


class SubsampleAndPad(nn.Module):
    """Shortcut option A: take every stride-th position and fill new channels with zeros. No parameters.

    Half of the new channels (rounded down) come before the others and the rest after, as in the most used published
    CIFAR networks (https://github.com/akamaster/pytorch_resnet_cifar10), whose weights therefore fit.
    """

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels, self.stride = new_channels, stride

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C + new, H/s, W/s)
        before = self.new_channels // 2
        padding = (0, 0, 0, 0, before, self.new_channels - before)
        return F.pad(x[:, :, :: self.stride, :: self.stride], padding)


class BlurredConv2d(nn.Conv2d):
    """A strided convolution after a 3×3 binomial filter, against aliasing (Zhang 2019). No new parameters."""

    binomial: Tensor

    def __init__(self, c_in: int, *args: Any, **options: Any) -> None:
        super().__init__(c_in, *args, **options)
        row = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("binomial", row.outer(row).repeat(c_in, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C_out, H/s, W/s)
        return super().forward(F.conv2d(x, self.binomial, padding=1, groups=self.in_channels))


class LayerFactory(NamedTuple):
    """Builds the layers of all blocks of one network."""

    norm: Callable[[int], nn.Module]
    shortcut_kind: str
    groups: int  # of the 3×3 in a bottleneck
    blur: bool

    def conv(self, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
        # A norm has its own bias per channel: only without a norm does a convolution need one.
        bias = self.norm is nn.Identity
        make = BlurredConv2d if self.blur and stride > 1 else nn.Conv2d
        return make(c_in, c_out, kernel, stride, padding=kernel // 2, groups=groups, bias=bias)

    def shortcut(self, c_in: int, c_out: int, stride: int) -> nn.Module | None:
        """Return S: the identity, or a projection to the shape of F(x) (He et al. 4.1); None in a plain network."""
        fits = stride == 1 and c_in == c_out
        if self.shortcut_kind == "none":
            return None
        if self.shortcut_kind == "C" or (self.shortcut_kind == "identity" and not fits):
            return nn.Sequential(self.conv(c_in, c_out, 1, stride), self.norm(c_out))
        return nn.Identity() if fits else SubsampleAndPad(c_out - c_in, stride)


class ResidualBlock(nn.Module, ABC):
    """relu(F(x) + S(x)) (He et al. 2015, eq. 1 and 2), or relu(F(x)) in a plain network."""

    downsample: nn.Module | None  # S, under torchvision's name
    drop_path: nn.Module  # drops F(x) for random images in training

    @abstractmethod
    def branch(self, x: Tensor) -> Tensor:
        """Compute F: (N, C, H, W) -> (N, C_out, H/s, W/s)."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if self.downsample is not None:
            y = self.drop_path(y) + self.downsample(x)
        return relu(y)


class BasicBlock(ResidualBlock):
    """A block whose F is two 3×3 convolutions (He et al. 2015, figure 5, left)."""

    expansion = 1
    last_norm = "bn2"

    def __init__(self, parts: LayerFactory, c_in: int, c_inner: int, c_out: int, stride: int, drop: float) -> None:
        super().__init__()
        self.conv1 = parts.conv(c_in, c_inner, 3, stride)  # (N, C, H, W) -> (N, C_inner, H/s, W/s)
        self.bn1 = parts.norm(c_inner)
        self.conv2 = parts.conv(c_inner, c_out, 3)  # -> (N, C_out, H/s, W/s)
        self.bn2 = parts.norm(c_out)
        self.downsample = parts.shortcut(c_in, c_out, stride)
        self.drop_path = StochasticDepth(drop, "row")

    def branch(self, x: Tensor) -> Tensor:
        x = relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


class Bottleneck(ResidualBlock):
    """A block whose F is 1×1, 3×3 and 1×1 to four times the channels (He et al. 2015, figure 5, right)."""

    expansion = 4
    last_norm = "bn3"

    def __init__(self, parts: LayerFactory, c_in: int, c_inner: int, c_out: int, stride: int, drop: float) -> None:
        super().__init__()
        self.conv1 = parts.conv(c_in, c_inner, 1)  # (N, C, H, W) -> (N, C_inner, H, W)
        self.bn1 = parts.norm(c_inner)
        # Stride on the 3×3 as in torchvision, not on the 1×1 as in the paper: +0.5 % top-1 ("V1.5").
        self.conv2 = parts.conv(c_inner, c_inner, 3, stride, parts.groups)  # -> (N, C_inner, H/s, W/s)
        self.bn2 = parts.norm(c_inner)
        self.conv3 = parts.conv(c_inner, c_out, 1)  # -> (N, C_out, H/s, W/s)
        self.bn3 = parts.norm(c_out)
        self.downsample = parts.shortcut(c_in, c_out, stride)
        self.drop_path = StochasticDepth(drop, "row")

    def branch(self, x: Tensor) -> Tensor:
        x = relu(self.bn1(self.conv1(x)))
        x = relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


BLOCKS: dict[str, type[BasicBlock] | type[Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ResNet(Network):
    """A residual network for images of any size: (N, in_channels, H, W) -> (N, num_classes).

    With torchvision's weights, it computes the same as torchvision's network. Sources: He et al. 2015 (the
    networks), Zagoruyko & Komodakis 2016 (wide), Xie et al. 2017 (groups), Goyal et al. 2017 (zero_init),
    Huang et al. 2016 (drop_path), Zhang 2019 (blur).

    Args:
        block: basic (two 3×3 convolutions) or bottleneck (1×1, 3×3, 1×1, four times the channels out).
        layers: Blocks per stage; each stage after the first halves the resolution. The first stage may have none:
            then a block of stride 2 follows the stem, and no block runs at full resolution.
        width: Channels of the first stage's convolutions; each stage doubles them.
        stem: imagenet (7×7 of stride 2 and a max-pool: 1/4 of the resolution), cifar (3×3: full resolution), or
            cifar_stride2 (3×3 of stride 2: 1/2).
        shortcut: identity, with projections where the shape changes (the paper's option B); A, zeros for new
            channels instead of projections; C, projections in every block; none, the plain network.
        norm: batch, group, none, or the name of a class of torch.nn: BatchNorm2d, SyncBatchNorm, GroupNorm,
            InstanceNorm2d, Identity.
        groups: Groups of the bottleneck's 3×3 convolution (ResNeXt's cardinality).
        width_per_group: Channels per group, at a stage width of 64.
        zero_init: Initialize the last norm of each residual branch to zero: each block starts as relu(S(x)).
        drop_path: Stochastic depth: probability, in [0, 1), to drop the last block's branch for an image in
            training. It grows linearly from the first block to the last.
        blur: Blur before each convolution of stride 2 except in the stem, as ffcv-imagenet does.
        in_channels: Channels of the images.
        num_classes: Outputs of the head; 0 for no head: forward returns the features, (N, num_features).

    Raises:
        ModelError: (a ValueError) Arguments that are invalid or contradict each other.
    """

    def __init__(
        self,
        block: Block = "basic",
        layers: Sequence[int] = (2, 2, 2, 2),
        width: int = 64,
        *,
        stem: Stem = "imagenet",
        shortcut: Shortcut = "identity",
        norm: Norm = "batch",
        groups: int = 1,
        width_per_group: int = 64,
        zero_init: bool = False,
        drop_path: float = 0.0,
        blur: bool = False,
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.block, self.layers, self.width, self.stem = block, tuple(layers), width, stem
        self.shortcut, self.norm, self.groups, self.width_per_group = shortcut, norm, groups, width_per_group
        self.zero_init, self.drop_path, self.blur = zero_init, drop_path, blur
        self.in_channels, self.num_classes = in_channels, num_classes
        _check(self)
        self.num_features = width * 2 ** (len(layers) - 1) * BLOCKS[block].expansion

        parts = LayerFactory(NORMS[norm], shortcut, groups, blur)
        kernel, stride, pool = STEMS[stem]
        self.conv1 = parts._replace(blur=False).conv(in_channels, width, kernel, stride)
        self.bn1 = parts.norm(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if pool else nn.Identity()
        for i, blocks in enumerate(_stages(self, parts)):
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        _initialize(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the mean over the positions of the last stage: (N, in_channels, H, W) -> (N, num_features)."""
        x = self.maxpool(relu(self.bn1(self.conv1(x))))
        for i in range(len(self.layers)):
            x = getattr(self, f"layer{i + 1}")(x)
        return x.mean((2, 3))

    @property
    def head(self) -> nn.Module:  # type: ignore[override]
        return self.fc  # torchvision's name, for the state dict

    def layer_groups(self) -> dict[str, list[nn.Module | nn.Parameter]]:
        """Return the layers by group: stem, stage1, stage2, …, head."""
        stages = {f"stage{i + 1}": [getattr(self, f"layer{i + 1}")] for i in range(len(self.layers))}
        return {"stem": [self.conv1, self.bn1], **stages, "head": [self.fc]}

    def blocks(self) -> list[nn.Module]:
        """Return the residual blocks."""
        return [module for module in self.modules() if isinstance(module, ResidualBlock)]


def _check(net: ResNet) -> None:
    for name, choices in (("block", Block), ("stem", Stem), ("shortcut", Shortcut), ("norm", Norm)):
        if getattr(net, name) not in get_args(choices):
            raise ModelError(f"{name} must be one of {', '.join(get_args(choices))}, got {getattr(net, name)!r}")
    for name in ("width", "groups", "width_per_group", "in_channels"):
        if getattr(net, name) < 1:
            raise ModelError(f"{name} must be at least 1, got {getattr(net, name)}")
    bad_layers = not any(net.layers) or net.layers[0] < 0 or min(net.layers[1:], default=1) < 1
    grouped = (net.groups, net.width_per_group) != (1, 64)
    for wrong, message in (
        (bad_layers, f"layers must have at least one block per stage (only the first may have none), got {net.layers}"),
        (net.num_classes < 0, f"num_classes must be at least 1, or 0 for no head, got {net.num_classes}"),
        (grouped and net.block == "basic", "groups and width_per_group require block='bottleneck'"),
        (net.width * net.width_per_group < 64, "width_per_group is too small for this width"),
        (not 0 <= net.drop_path < 1, f"drop_path must be a probability in [0, 1), got {net.drop_path}"),
        (net.drop_path and net.shortcut == "none", "drop_path requires another shortcut than none"),
        (net.zero_init and net.shortcut == "none", "zero_init requires another shortcut than none"),
        (net.zero_init and NORMS[net.norm] is nn.Identity, "zero_init requires another norm than none"),
    ):
        if wrong:
            raise ModelError(message)


def _stages(net: ResNet, parts: LayerFactory) -> Iterator[list[ResidualBlock]]:
    make = BLOCKS[net.block]
    depth = itertools.count(1)
    c_in = net.width
    for i, blocks in enumerate(net.layers):
        planes = net.width * 2**i
        c_inner = planes * net.width_per_group // 64 * net.groups
        stage: list[ResidualBlock] = []
        for b in range(blocks):
            stride = 2 if i > 0 and b == 0 else 1
            # Block l of L is dropped with probability l/L · drop_path (Huang et al. 2016, eq. 4).
            drop = next(depth) / sum(net.layers) * net.drop_path
            stage.append(make(parts, c_in, c_inner, planes * make.expansion, stride, drop))
            c_in = planes * make.expansion
        yield stage


def _initialize(net: ResNet) -> None:
    """Initialize as torchvision does: Kaiming normal over the fan-out (He et al. 2015b)."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if net.zero_init and isinstance(module, BasicBlock | Bottleneck):
            nn.init.zeros_(getattr(module, module.last_norm).weight)

"""Augmentation in the batch, on its device: each image with its own parameters, uint8 as long as possible.

A crop is one copy of rows from overlapping windows, a flip one choice between an image and its mirror, so
nothing loops over samples or waits for the device. Images come as (N, H, W, C): permuted, that is the
channels_last layout the convolutions want.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import exp, log, sqrt
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import betaincinv
from torch import Tensor

from reslab.data import order
from reslab.errors import UserError

DRAWS = 5  # columns of the parameters: dy, dx, flip, cy, cx
UNIT = 1 << 24  # a share of 1 as an integer: float32 holds such a share and its complement exactly


@dataclass(frozen=True)
class Augment:
    """What is done to a training image; nothing by default (but the random crop of image files).

    Args:
        crop_padding: Pixels added on every side before a crop back to the image's size at a random place
            (4 in He et al. 2015, section 4.2); 0 for no crop.
        padding_mode: What the padding holds: zeros (before normalisation) or the mirrored image.
        flip: Mirror left-right: none; random: half of the images; alternating: every image in every other
            epoch, which half begins is random (airbench, Jordan 2024).
        cutout: Side in pixels of a square set to the mean, at a random centre, cut at the border
            (DeVries & Taylor 2017); 0 for none.
        mixup: Alpha of mixup (Zhang et al. 2018): every image, and its label, is blended with another of its
            batch, all with one share from Beta(alpha, alpha); 0 for none. With cutmix too, each batch takes one
            of the two at random.
        cutmix: Alpha of CutMix (Yun et al. 2019): a rectangle of another image of the batch is pasted in, its
            share of the area, and of the label, 1 - Beta(alpha, alpha); 0 for none.
        scale: For data sets of files: share of the image's area that the random crop takes (Inception crop).
        ratio: For data sets of files: width over height of that crop.
    """

    crop_padding: int = 0
    padding_mode: Literal["zeros", "reflect"] = "zeros"
    flip: Literal["none", "random", "alternating"] = "none"
    cutout: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        if self.crop_padding < 0 or self.cutout < 0:
            raise UserError("augment: crop_padding and cutout are numbers of pixels, 0 or more")
        if not (0 <= self.mixup < np.inf and 0 <= self.cutmix < np.inf):
            raise UserError("augment: mixup and cutmix are alphas of Beta distributions, 0 (off) or more")
        if not (0 < self.scale[0] <= self.scale[1] <= 1 and 0 < self.ratio[0] <= self.ratio[1]):
            raise UserError("augment: scale and ratio are [low, high], above 0, the scale at most 1")

    @property
    def active(self) -> bool:
        return bool(self.crop_padding or self.cutout or self.flip != "none")

    def draw(self, seed: int, epoch: int, indices: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int32]:
        """The parameters of images of side `size` in an epoch: int32 (N, 5), or (N, 0) if nothing is done."""
        if not self.active:
            return np.empty((len(indices), 0), np.int32)
        places = 2 * self.crop_padding + 1
        u = order.uniforms(seed, epoch, indices, DRAWS).astype(np.float64)
        draws = (u * [places, places, 2, size, size]).astype(np.int32)
        if self.flip == "alternating":
            draws[:, 2] = (order.uniforms(seed, 0, indices, DRAWS)[:, 2] < 0.5) ^ (epoch % 2 == 1)
        return draws

    def draw_mix(self, seed: int, epoch: int, indices: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int32]:
        """How the images of a batch, of side `size`, are mixed in an epoch: int32 (5,), see `mix`; (0,) if not.

        A function of the batch's first index: micro-batches and ranks, which share no image, draw their own.
        """
        if not (self.mixup or self.cutmix):
            return np.empty(0, np.int32)
        which, u, y, x = order.uniforms(seed, epoch, indices[:1], 4, order.MIX)[0].astype(np.float64)
        if not self.cutmix or (self.mixup and which < 0.5):
            share = betaincinv(self.mixup, self.mixup, u)  # the inverse of Beta's distribution function
            return np.array([round(share * UNIT), 0, 0, size, size], np.int32)
        half = int(0.5 * np.sqrt(1 - betaincinv(self.cutmix, self.cutmix, u)) * size)
        top, left = int(y * size) - half, int(x * size) - half
        box = np.clip([top, left, top + 2 * half, left + 2 * half], 0, size)
        return np.array([0, *box], np.int32)

    def apply(self, images: Tensor, draws: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        """uint8 (N, H, W, C), draws (N, 5) -> augmented, normalised float32 (N, C, H, W), channels_last."""
        dy, dx, mirrored, cy, cx = draws.long().unbind(1)
        if self.crop_padding:
            images = crop(images, dy, dx, self.crop_padding, self.padding_mode)
        if self.flip != "none":
            images = flip(images, mirrored)
        normal = normalize(images, mean, std)
        return cutout(normal, cy, cx, self.cutout) if self.cutout else normal


def crop(images: Tensor, dy: Tensor, dx: Tensor, padding: int, mode: Literal["zeros", "reflect"]) -> Tensor:
    """Pads (N, H, W, C) on every side, cuts (H, W) out again at (dy, dx), int64 (N,) in [0, 2 × padding]."""
    n, h, w, c = images.shape
    if mode == "reflect":
        padded = _mirror_pad(_mirror_pad(images, padding, 2), padding, 1)
    else:
        padded = torch.nn.functional.pad(images, (0, 0, padding, padding, padding, padding))
    tall, wide = h + 2 * padding, w + 2 * padding
    # Row k is the w pixels from pixel k on: a crop is h whole rows, which a CPU copies 16 × faster than it
    # indexes windows (N, dy, dx, H, W, C).
    rows = padded.as_strided((n * tall * wide - w + 1, w * c), (c, 1))
    image = torch.arange(n, device=images.device)[:, None]
    y = dy[:, None] + torch.arange(h, device=images.device)
    starts = (image * tall + y) * wide + dx[:, None]
    return rows.index_select(0, starts.flatten()).view(n, h, w, c)


def _mirror_pad(images: Tensor, padding: int, dim: int) -> Tensor:
    before = images.narrow(dim, 1, padding).flip(dim)
    after = images.narrow(dim, images.shape[dim] - padding - 1, padding).flip(dim)
    return torch.cat((before, images, after), dim)


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirrors those images of (N, H, W, C) left-right whose `mirrored`, int64 (N,), is 1 and not 0."""
    both = torch.stack((images, images.flip(2)), 1).flatten(0, 1)
    return both.index_select(0, 2 * torch.arange(len(images), device=images.device) + mirrored)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (N, H, W, C) -> (images / 255 - mean) / std, float32 (N, C, H, W) in channels_last."""
    n, h, w, c = images.shape
    scale, shift = _affine(mean, std, w, images.device)
    flat = torch.addcmul(shift, images.reshape(n, h, w * c).float(), scale)
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)


@lru_cache(maxsize=32)
def _affine(mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    # A whole image row each, (W*C,): broadcasting over 3 channels alone defeats the CPU's vector units.
    centre, deviation = torch.tensor([mean, std], dtype=torch.float64).repeat(1, width)
    scale, shift = 1 / (255 * deviation), -centre / deviation
    return scale.float().to(device), shift.float().to(device)


def cutout(images: Tensor, cy: Tensor, cx: Tensor, size: int) -> Tensor:
    """Zeroes a square of side `size` round (cy, cx), int64 (N,), in place in channels_last (N, C, H, W)."""
    n, c, h, w = images.shape
    y = torch.arange(h, device=images.device) - (cy - size // 2)[:, None]  # (N, H), 0 … size - 1 inside
    x = torch.arange(w * c, device=images.device) // c - (cx - size // 2)[:, None]  # (N, W*C)
    tall, wide = ((k >= 0) & (k < size) for k in (y, x))
    rows = images.permute(0, 2, 3, 1).view(n, h, w * c)
    # rows × (1 - tall × wide): exactly 0 or as it was, 3 times faster on a CPU than to make and fill a mask.
    rows.addcmul_(rows * tall[:, :, None], wide[:, None].to(rows.dtype), value=-1)
    return images


def mix(images: Tensor, plan: Tensor) -> tuple[Tensor, Tensor]:
    """Mixes each image of (N, C, H, W), channels_last, with the one before it, as torchvision's MixUp and CutMix do.

    Args:
        images: Normalised, float32.
        plan: int32 (5,): the image's own share, in 1 / UNIT, inside of a box, and the box's top, left, bottom and
            right. Outside of it the image stays as it is. For mixup the box is the image, for CutMix the share 0.

    Returns:
        The mixed images, and the weight of their own labels, float32 (): their share of all pixels.
    """
    n, c, h, w = images.shape
    foreign = 1 - plan[0].float() / UNIT
    top, left, bottom, right = plan[1:].unbind()
    y = torch.arange(h, device=images.device)[:, None]
    x = torch.arange(w * c, device=images.device) // c
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)  # (H, W*C): whole rows, as in _affine
    rows = images.permute(0, 2, 3, 1).view(n, h, w * c)
    mixed = rows.roll(1, 0).lerp_(rows, 1 - inside * foreign)
    own = 1 - foreign * (bottom - top) * (right - left) / (h * w)
    return mixed.view(n, h, w, c).permute(0, 3, 1, 2), own


def resized_crop_box(
    u: npt.NDArray[np.float32],
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """The crop (top, left, height, width) of torchvision's RandomResizedCrop, from 22 uniform numbers.

    Ten tries of an area (uniform) and an aspect ratio (log-uniform); the first that fits is placed uniformly,
    and if none fits the largest central crop with an allowed ratio is taken (Szegedy et al. 2015).
    """
    *tries, y, x = u.tolist()
    for k in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * tries[k])
        aspect = exp(log(ratio[0]) + log(ratio[1] / ratio[0]) * tries[10 + k])
        w, h = round(sqrt(area * aspect)), round(sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
    h0 = min(height, round(width / ratio[0]))
    w0 = min(width, round(height * ratio[1]))
    return (height - h0) // 2, (width - w0) // 2, h0, w0

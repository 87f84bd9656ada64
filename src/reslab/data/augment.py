"""Augmentation in the batch, on its device: each image with its own parameters, uint8 as long as possible.

A crop is one copy of rows from overlapping windows, a flip one choice between an image and its mirror, so
nothing loops over samples or waits for the device. Images come as (N, H, W, C): permuted, that is the
channels_last layout the convolutions want. Only `transforms` work image by image, in the loader's processes.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from math import exp, log, sqrt
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from scipy.special import betaincinv
from torch import Tensor
from torchvision.transforms import v2

from reslab.data import order
from reslab.errors import UserError

ERASED_AREA, ERASED_RATIO = (0.02, 0.33), (0.3, 3.3)  # of random erasing's box (Zhong et al. 2020, section 4)
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
        erasing: The chance that a box of random size, place and shape is set to the mean (Zhong et al. 2020).
        mixup: Alpha of mixup (Zhang et al. 2018): two by two the images of a batch, and their labels, are blended
            with each other, all with one share from Beta(alpha, alpha); 0 for none. With cutmix too, each batch
            takes one of the two at random.
        cutmix: Alpha of CutMix (Yun et al. 2019): two by two a rectangle of the other image is pasted in, its
            share of the area, and of the label, 1 - Beta(alpha, alpha); 0 for none.
        transforms: Any of torchvision.transforms.v2 that keep an image's size, such as TrivialAugmentWide, RandAugment
            or ColorJitter: applied in this order, image by image, before all of the above but the crop of files.
            They take more time than anything else here: give `num_workers`.
        repeats: How often an image comes in an epoch, augmented anew each time; the epoch keeps its length, and has
            as many times fewer images (Hoffer et al. 2020).
        scale: For data sets of files: share of the image's area that the random crop takes (Inception crop).
        ratio: For data sets of files: width over height of that crop.
    """

    crop_padding: int = 0
    padding_mode: Literal["zeros", "reflect"] = "zeros"
    flip: Literal["none", "random", "alternating"] = "none"
    cutout: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    erasing: float = 0.0
    transforms: list[v2.Transform] = field(default_factory=list)
    repeats: int = 1
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        if self.crop_padding < 0 or self.cutout < 0:
            raise UserError("augment: crop_padding and cutout are numbers of pixels, 0 or more")
        if not (0 <= self.mixup < np.inf and 0 <= self.cutmix < np.inf):
            raise UserError("augment: mixup and cutmix are alphas of Beta distributions, 0 (off) or more")
        if not 0 <= self.erasing <= 1 or self.repeats < 1:
            raise UserError("augment: erasing is a chance, 0 (off) to 1, and repeats a count, 1 or more")
        if not (0 < self.scale[0] <= self.scale[1] <= 1 and 0 < self.ratio[0] <= self.ratio[1]):
            raise UserError("augment: scale and ratio are [low, high], above 0, the scale at most 1")

    @property
    def mixes(self) -> bool:
        return bool(self.mixup or self.cutmix)

    @property
    def active(self) -> bool:
        return bool(self.crop_padding or self.cutout or self.erasing or self.flip != "none")

    def draw(self, seed: int, epoch: int, indices: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int32]:
        """The parameters of images of side `size` in an epoch: int32 (N, 9), or (N, 0) if nothing is done.

        The columns: offsets dy, dx of the crop, flip, centre cy, cx of the cutout, and top, left, height and width of
        the box erased.
        """
        if not self.active:
            return np.empty((len(indices), 0), np.int32)
        places = 2 * self.crop_padding + 1
        u = order.uniforms(seed, epoch, indices, 5).astype(np.float64)
        draws = np.zeros((len(indices), 9), np.int32)
        draws[:, :5] = u * [places, places, 2, size, size]
        if self.flip == "alternating":
            draws[:, 2] = (order.uniforms(seed, 0, indices, 5)[:, 2] < 0.5) ^ (epoch % 2 == 1)
        if self.erasing:
            draws[:, 5:] = erased_boxes(order.uniforms(seed, epoch, indices, 23, order.ERASE), size, self.erasing)
        return draws

    def draw_mix(self, seed: int, epoch: int, step: int, size: int) -> npt.NDArray[np.int32]:
        """How images of side `size` are mixed in one optimizer step of an epoch: int32 (5,), see `mix`; (0,) if not."""
        if not self.mixes:
            return np.empty(0, np.int32)
        which, u, y, x = order.uniforms(seed, epoch, [step], 4, order.MIX)[0].astype(np.float64)
        if not self.cutmix or (self.mixup and which < 0.5):
            share = betaincinv(self.mixup, self.mixup, u)  # the inverse of Beta's distribution function
            return np.array([round(share * UNIT), 0, 0, size, size], np.int32)
        half = int(0.5 * np.sqrt(1 - betaincinv(self.cutmix, self.cutmix, u)) * size)
        top, left = int(y * size) - half, int(x * size) - half
        box = np.clip([top, left, top + 2 * half, left + 2 * half], 0, size)
        return np.array([0, *box], np.int32)

    def transform(self, images: Tensor, seed: int, epoch: int, indices: npt.NDArray[np.int64]) -> None:
        """Sends each of the images, uint8 (N, H, W, C), through `transforms`, in place.

        As PIL images: PIL takes half the time of torch for them, and makes the same pixels on any number of threads.

        Raises:
            UserError: a transform makes something else than an image of the same size.
        """
        if not self.transforms:
            return
        seeds = order.sample_seeds(seed, epoch, indices)
        with torch.random.fork_rng(devices=[]):
            for pixels, own in zip(images.numpy(), seeds.tolist(), strict=True):
                torch.default_generator.manual_seed(own)
                image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
                for transform in self.transforms:
                    image = transform(image)
                made = np.asarray(image)
                if made.shape[:2] != pixels.shape[:2] or made.size != pixels.size:
                    raise UserError(f"augment: transforms make {made.shape} of an image {pixels.shape}: keep its size")
                pixels[:] = made.reshape(pixels.shape)

    def apply(self, images: Tensor, draws: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        """uint8 (N, H, W, C), draws (N, 9) -> augmented, normalised float32 (N, C, H, W), channels_last."""
        dy, dx, mirrored, cy, cx, *box = draws.long().unbind(1)
        if self.crop_padding:
            images = crop(images, dy, dx, self.crop_padding, self.padding_mode)
        if self.flip != "none":
            images = flip(images, mirrored)
        normal = normalize(images, mean, std)
        if self.cutout:
            side = torch.full_like(cy, self.cutout)
            normal = erase(normal, cy - self.cutout // 2, cx - self.cutout // 2, side, side)
        return erase(normal, *box) if self.erasing else normal


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
    flat = images.reshape(n, h, w * c).float()
    torch.addcmul(shift, flat, scale, out=flat)
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)


@lru_cache(maxsize=32)
def _affine(mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    # A whole image row each, (W*C,): broadcasting over 3 channels alone defeats the CPU's vector units.
    centre, deviation = torch.tensor([mean, std], dtype=torch.float64).repeat(1, width)
    scale, shift = 1 / (255 * deviation), -centre / deviation
    return scale.float().to(device), shift.float().to(device)


def erase(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Zeroes a box of each image, int64 (N,) its sides, in place in channels_last (N, C, H, W); cut at the border."""
    n, c, h, w = images.shape
    y = torch.arange(h, device=images.device) - top[:, None]  # (N, H), 0 … height - 1 inside
    x = torch.arange(w * c, device=images.device) // c - left[:, None]  # (N, W*C)
    tall, wide = (y >= 0) & (y < height[:, None]), (x >= 0) & (x < width[:, None])
    rows = images.permute(0, 2, 3, 1).view(n, h, w * c)
    # rows × (1 - tall × wide): exactly 0 or as it was, 3 times faster on a CPU than to make and fill a mask.
    rows.addcmul_(rows * tall[:, :, None], wide[:, None].to(rows.dtype), value=-1)
    return images


def mix(images: Tensor, plan: Tensor) -> tuple[Tensor, Tensor]:
    """Mixes each image of (N, C, H, W), channels_last, with its partner, as torchvision's MixUp and CutMix do.

    Args:
        images: Normalised, float32; N is even.
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
    mixed = swap_pairs(rows).lerp_(rows, 1 - inside * foreign)
    own = 1 - foreign * (bottom - top) * (right - left) / (h * w)
    return mixed.view(n, h, w, c).permute(0, 3, 1, 2), own


def swap_pairs(x: Tensor) -> Tensor:
    """(N, …) with 0 and 1, 2 and 3, … exchanged: whom each is mixed with, however a batch is cut into even parts."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def erased_boxes(u: npt.NDArray[np.float32], size: int, chance: float) -> npt.NDArray[np.int64]:
    """The boxes (top, left, height, width) of torchvision's RandomErasing in images of side `size`, int64 (N, 4).

    From 23 uniform numbers each: whether at all, ten tries of an area and an aspect ratio, as for the crop, and the
    place. The box is empty where nothing is erased.
    """
    area, ratio = ERASED_AREA, ERASED_RATIO
    areas = size**2 * (area[0] + (area[1] - area[0]) * u[:, 1:11].astype(np.float64))
    aspects = np.exp(np.log(ratio[0]) + np.log(ratio[1] / ratio[0]) * u[:, 11:21].astype(np.float64))
    sides = np.rint(np.sqrt([areas * aspects, areas / aspects])).astype(np.int64)  # (2, N, 10): heights, widths
    fits = sides.max(0) < size
    first, rows = fits.argmax(1), np.arange(len(u))
    height, width = sides[:, rows, first] * (fits[rows, first] & (u[:, 0] < chance))
    return np.stack([u[:, 21] * (size - height + 1), u[:, 22] * (size - width + 1), height, width], 1).astype(np.int64)


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

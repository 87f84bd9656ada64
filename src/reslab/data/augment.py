"""Augmentation of whole batches on their device, with separate parameters for each image; uint8 as long as possible.

Nothing loops over samples or waits for the device: a crop copies rows from overlapping windows, a flip selects between
an image and its mirror image. Images are (N, H, W, C), which permuted is the channels_last layout that convolutions
prefer. Only `transforms` work image by image, in the loader's workers.
"""

import random
from dataclasses import dataclass, field
from functools import lru_cache
from math import exp, log, sqrt
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from scipy.special import betaincinv
from torch import Tensor
from torchvision.transforms import v2

from reslab.data import order
from reslab.errors import UserError

UNIT = 1 << 24  # fixed-point scale of mixup's lambda: float32 represents lambda and 1 - lambda exactly


@dataclass(frozen=True)
class Augment:
    """Augmentation of training images; none by default (image files are always cropped at random).

    Args:
        crop_padding: Pixels of padding on every side before a random crop back to the image's size (4 in He et al.
            2015, section 4.2); 0 for no crop.
        padding_mode: Fill the padding with zeros (before normalisation) or by reflection.
        flip: Mirror images left-right. none; random: with probability 0.5; alternating: in every other epoch, a random
            half of the images in the even epochs and the others in the odd ones (airbench, Jordan 2024).
        cutout: Side in pixels of a square set to the mean, at a random centre, clipped at the border
            (DeVries & Taylor 2017); 0 for none.
        erasing: Probability of setting a box of random size, place and shape to the mean (Zhong et al. 2020).
        mixup: Alpha of mixup (Zhang et al. 2018), 0 for none. Pairs of images in a batch, and their labels, are blended
            with one lambda per batch, from Beta(alpha, alpha). If cutmix is set too, each batch uses one of the two.
        cutmix: Alpha of CutMix (Yun et al. 2019), 0 for none. A rectangle of the other image of the pair is pasted in;
            its share of the area, and of the label, is 1 - Beta(alpha, alpha).
        transforms: Transforms of torchvision.transforms.v2 that keep an image's size, such as RandAugment. Applied in
            this order, image by image, before everything else but the crop of image files. Slow: set `num_workers`.
        repeats: How often each image occurs in an epoch, with separate augmentations. An epoch keeps its length and has
            fewer distinct images (Hoffer et al. 2020).
        scale: For image files: range of the random crop's share of the image's area (Inception crop).
        ratio: For image files: range of the random crop's width divided by its height.
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
            raise UserError("augment: crop_padding and cutout must be 0 or more pixels")
        if not (0 <= self.mixup < np.inf and 0 <= self.cutmix < np.inf):
            raise UserError("augment: mixup and cutmix must be at least 0 (off): alphas of a Beta distribution")
        if not 0 <= self.erasing <= 1 or self.repeats < 1:
            raise UserError("augment: erasing must be a probability, 0 (off) to 1, and repeats at least 1")
        if not (0 < self.scale[0] <= self.scale[1] <= 1 and 0 < self.ratio[0] <= self.ratio[1]):
            raise UserError("augment: scale and ratio must be [low, high] with 0 < low <= high, and scale <= 1")

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def params(self, seed: int, epoch: int, indices: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int32]:
        """Return the parameters of images of side `size` in an epoch: int32 (N, 9), or (N, 0) if nothing is done.

        Columns: offsets dy, dx of the crop; flip (0 or 1); centre cy, cx of the cutout; top, left, height and width of
        the erased box.
        """
        if self.flip == "none" and not (self.crop_padding or self.cutout or self.erasing):
            return np.empty((len(indices), 0), np.int32)
        offsets = 2 * self.crop_padding + 1
        u = order.uniforms(seed, epoch, indices, 5).astype(np.float64)
        params = np.zeros((len(indices), 9), np.int32)
        params[:, :5] = u * [offsets, offsets, 2, size, size]
        if self.flip == "alternating":
            params[:, 2] = (order.uniforms(seed, 0, indices, 5)[:, 2] < 0.5) ^ (epoch % 2 == 1)
        if self.erasing:
            params[:, 5:] = erased_boxes(order.uniforms(seed, epoch, indices, 23, order.ERASE), size, self.erasing)
        return params

    def mix_params(self, seed: int, epoch: int, step: int, size: int) -> npt.NDArray[np.int32]:
        """Return how images of side `size` are mixed in one optimizer step: int32 (5,), see `mix`; (0,) if not."""
        if not self.mixes:
            return np.empty(0, np.int32)
        which, u, y, x = order.uniforms(seed, epoch, [step], 4, order.MIX)[0].astype(np.float64)
        if not self.cutmix or (self.mixup and which < 0.5):
            lam = betaincinv(self.mixup, self.mixup, u)  # inverse of the CDF of Beta(alpha, alpha)
            return np.array([round(lam * UNIT), 0, 0, size, size], np.int32)
        half = int(0.5 * np.sqrt(1 - betaincinv(self.cutmix, self.cutmix, u)) * size)
        top, left = int(y * size) - half, int(x * size) - half
        box = np.clip([top, left, top + 2 * half, left + 2 * half], 0, size)
        return np.array([0, *box], np.int32)

    def transform(self, images: Tensor, seed: int, epoch: int, indices: npt.NDArray[np.int64]) -> None:
        """Apply `transforms` to each of the images, uint8 (N, H, W, C), in place; a UserError if a size changes.

        They are applied to PIL images: twice as fast as torch, and the pixels do not depend on the number of threads.
        """
        if not self.transforms:
            return
        seeds = order.sample_seeds(seed, epoch, indices)
        with torch.random.fork_rng(devices=[]):
            for pixels, sample_seed in zip(images.numpy(), seeds.tolist(), strict=True):
                torch.default_generator.manual_seed(sample_seed)
                image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
                for transform in self.transforms:
                    image = transform(image)
                output = np.asarray(image)
                if output.shape[:2] != pixels.shape[:2] or output.size != pixels.size:
                    raise UserError(f"data.augment.transforms must keep the size: {pixels.shape} became {output.shape}")
                pixels[:] = output.reshape(pixels.shape)

    def apply(self, images: Tensor, params: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        """uint8 (N, H, W, C), params (N, 9) -> augmented, normalised float32 (N, C, H, W) in channels_last."""
        dy, dx, mirrored, cy, cx, *box = params.long().unbind(1)
        if self.crop_padding:
            images = crop(images, dy, dx, self.crop_padding, self.padding_mode)
        if self.flip != "none":
            images = flip(images, mirrored)
        normalized = normalize(images, mean, std)
        if self.cutout:
            side = torch.full_like(cy, self.cutout)
            normalized = erase(normalized, cy - self.cutout // 2, cx - self.cutout // 2, side, side)
        return erase(normalized, *box) if self.erasing else normalized


def crop(images: Tensor, dy: Tensor, dx: Tensor, padding: int, mode: Literal["zeros", "reflect"]) -> Tensor:
    """Pad (N, H, W, C) on every side, then crop (H, W) at offsets (dy, dx), int64 (N,) in [0, 2 × padding]."""
    n, h, w, c = images.shape
    if mode == "reflect":
        padded = images
        for dim, size in ((2, w), (1, h)):
            before, after = padded.narrow(dim, 1, padding), padded.narrow(dim, size - padding - 1, padding)
            padded = torch.cat((before.flip(dim), padded, after.flip(dim)), dim)
    else:
        padded = torch.nn.functional.pad(images, (0, 0, padding, padding, padding, padding))
    padded_h, padded_w = h + 2 * padding, w + 2 * padding
    # Row k is the w pixels that start at pixel k. A crop is h such rows, which a CPU copies 16 times faster than it
    # indexes windows (N, dy, dx, H, W, C).
    rows = padded.as_strided((n * padded_h * padded_w - w + 1, w * c), (c, 1))
    image = torch.arange(n, device=images.device)[:, None]
    y = dy[:, None] + torch.arange(h, device=images.device)
    starts = (image * padded_h + y) * padded_w + dx[:, None]
    return rows.index_select(0, starts.flatten()).view(n, h, w, c)


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror images of (N, H, W, C) left-right where `mirrored`, int64 (N,), is 1 rather than 0."""
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
    # One whole image row each, (W*C,): broadcasting over 3 channels only would not use the CPU's vector units.
    means, stds = torch.tensor([mean, std], dtype=torch.float64).repeat(1, width)
    scale, shift = 1 / (255 * stds), -means / stds
    return scale.float().to(device), shift.float().to(device)


def erase(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Set a box of each image to zero, in place: channels_last (N, C, H, W), box int64 (N,); clipped at the border."""
    n, c, h, w = images.shape
    y = torch.arange(h, device=images.device) - top[:, None]  # (N, H), 0 to height - 1 inside the box
    x = torch.arange(w * c, device=images.device) // c - left[:, None]  # (N, W*C)
    inside_y, inside_x = (y >= 0) & (y < height[:, None]), (x >= 0) & (x < width[:, None])
    rows = images.permute(0, 2, 3, 1).view(n, h, w * c)
    # rows × (1 - inside_y × inside_x): exactly 0 or unchanged, and 3 times faster on a CPU than filling with a mask.
    rows.addcmul_(rows * inside_y[:, :, None], inside_x[:, None].to(rows.dtype), value=-1)
    return images


def mix(images: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """Mix each image of (N, C, H, W), channels_last, with the other of its pair, as torchvision's MixUp and CutMix do.

    Args:
        images: Normalised, float32; N is even.
        params: int32 (5,): the image's own weight inside a box, in units of 1 / UNIT (0 for CutMix), and the box's top,
            left, bottom and right (the whole image for mixup).

    Returns:
        The mixed images, and lambda, float32 (): the image's own share of all pixels, which is the weight of its label.
    """
    n, c, h, w = images.shape
    other_weight = 1 - params[0].float() / UNIT
    top, left, bottom, right = params[1:].unbind()
    y = torch.arange(h, device=images.device)[:, None]
    x = torch.arange(w * c, device=images.device) // c
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)  # (H, W*C): whole rows, as in _affine
    rows = images.permute(0, 2, 3, 1).view(n, h, w * c)
    mixed = swap_pairs(rows).lerp_(rows, 1 - inside * other_weight)
    lam = 1 - other_weight * (bottom - top) * (right - left) / (h * w)
    return mixed.view(n, h, w, c).permute(0, 3, 1, 2), lam


def swap_pairs(x: Tensor) -> Tensor:
    """Swap elements 0 and 1, 2 and 3, and so on of (N, ...): the pairs that are mixed.

    Neighbours stay together when a batch is split into micro-batches or among ranks.
    """
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def erased_boxes(u: npt.NDArray[np.float32], size: int, probability: float) -> npt.NDArray[np.int64]:
    """Return the boxes (top, left, height, width) of torchvision's RandomErasing for images of one size, int64 (N, 4).

    Computed from 23 uniform numbers per image: whether to erase, ten attempts at an area and an aspect ratio (as in
    `resized_crop_box`), and the place. The box is empty where nothing is erased.
    """
    area, ratio = (0.02, 0.33), (0.3, 3.3)  # Zhong et al. 2020, section 4
    areas = size**2 * (area[0] + (area[1] - area[0]) * u[:, 1:11].astype(np.float64))
    aspects = np.exp(np.log(ratio[0]) + np.log(ratio[1] / ratio[0]) * u[:, 11:21].astype(np.float64))
    sides = np.rint(np.sqrt([areas * aspects, areas / aspects])).astype(np.int64)  # (2, N, 10): heights, widths
    fits = sides.max(0) < size
    first, rows = fits.argmax(1), np.arange(len(u))
    height, width = sides[:, rows, first] * (fits[rows, first] & (u[:, 0] < probability))
    return np.stack([u[:, 21] * (size - height + 1), u[:, 22] * (size - width + 1), height, width], 1).astype(np.int64)


def resized_crop_box(
    u: npt.NDArray[np.float32], height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Return the crop (top, left, height, width) of torchvision's RandomResizedCrop, given 22 uniform numbers.

    Ten attempts at an area (uniform) and an aspect ratio (log-uniform). The first that fits is placed uniformly; if
    none fits, it is the largest central crop with an allowed ratio (Szegedy et al. 2015).
    """
    *attempts, y, x = u.tolist()
    for k in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * attempts[k])
        aspect = exp(log(ratio[0]) + log(ratio[1] / ratio[0]) * attempts[10 + k])
        w, h = round(sqrt(area * aspect)), round(sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
    h0 = min(height, round(width / ratio[0]))
    w0 = min(width, round(height * ratio[1]))
    return (height - h0) // 2, (width - w0) // 2, h0, w0


class TimmRandAugment(v2.Transform):
    """timm's RandAugment for PIL images: its operations, magnitudes and probabilities differ from torchvision's.

    Args:
        config: timm's config string: rand-m7-mstd0.5-inc1 has magnitude 7 of 10 with a standard deviation of 0.5.
        fill: Colour of the area that geometric operations uncover, one value per channel.
    """

    def __init__(self, config: str = "rand-m9-mstd0.5-inc1", fill: tuple[int, ...] = (124, 116, 104)) -> None:
        super().__init__()
        try:
            from timm.data.auto_augment import rand_augment_transform
        except ImportError:
            raise UserError("data.augment.transforms: TimmRandAugment requires timm: pip install timm") from None
        self.augment = rand_augment_transform(config, {"img_mean": tuple(fill)})

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        # timm uses the generators of Python and numpy: seed them from torch's generator, which is seeded per image.
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
        seed = int(torch.randint(2**32, ()))
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            return self.augment(inpt)
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002

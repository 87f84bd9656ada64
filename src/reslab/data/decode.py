"""From an image file to pixels of one size: decoding, the random crop of training, the centre of evaluation.

JPEGs for training are decoded by simplejpeg where it is installed (the extra `fast`), into memory that is used again
and again; by torchvision else. Both are libjpeg-turbo and give the same pixels.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as tvf

from reslab.data.augment import Augment, resized_crop_box
from reslab.data.files import DataError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

Box = tuple[int, int, int, int]  # top, left, height, width
JPEG = b"\xff\xd8\xff"
# A JPEG's rows that are decoded below a crop: its last rows depend on colours up to two rows below, at 1/8 on 16.
ROWS_BELOW = 16


def decode_bytes(data: bytes, channels: int, apply_exif_orientation: bool = True) -> Tensor:
    """An image file's pixels, uint8 (C, H, W), in memory as (H, W, C) mostly.

    Args:
        data: A JPEG, a PNG, or anything that PIL reads.
        channels: 1 or 3: what has others, or a palette, CMYK or transparency, is converted as PIL does it.
        apply_exif_orientation: Turn the image as its EXIF entry says; else as it is stored.
    """
    if data.startswith((JPEG, b"\x89PNG")):
        mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
        with suppress(RuntimeError):  # damaged, or a rare kind: PIL reads it, or says what is wrong
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            image = decode_image(encoded, mode, apply_exif_orientation=apply_exif_orientation)
            return tvf.to_dtype(image, torch.uint8, scale=True)  # a PNG may have 16 bits
    picture: Image.Image = Image.open(io.BytesIO(data))
    if apply_exif_orientation:
        picture = ImageOps.exif_transpose(picture)
    return tvf.pil_to_tensor(picture.convert("RGB" if channels == 3 else "L"))


@contextmanager
def named(path: Path) -> Iterator[None]:
    """What goes wrong with a file inside becomes a DataError that names it; decoders raise errors of all kinds."""
    try:
        yield
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{path} is no image that can be read: restore or remove it") from None
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{path} cannot be read ({reason}): restore or remove it") from None


def decode(path: Path, channels: int, apply_exif_orientation: bool = True) -> Tensor:
    """The image at a path, as `decode_bytes`.

    Raises:
        DataError: it cannot be read, with its path and the reason.
    """
    with named(path):
        return decode_bytes(path.read_bytes(), channels, apply_exif_orientation)


def _as_batch(image: Tensor) -> Tensor:
    """(C, H, W) -> (1, C, H, W) with the strides of channels_last: torch resizes that twice as fast."""
    return image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)


def resize_and_crop(image: Tensor, resize: int, size: int) -> Tensor:
    """Evaluation's view: the shorter side to `resize`, antialiased, then the centre (C, size, size)."""
    return tvf.center_crop(tvf.resize(_as_batch(image), [resize], antialias=True), [size, size])[0]


def resized_crop(image: Tensor, box: Box, size: int) -> Tensor:
    """The part (top, left, height, width) of uint8 (C, H, W) as (C, size, size): torchvision's resized_crop."""
    top, left, height, width = box
    part = _as_batch(image)[..., top : top + height, left : left + width]
    return interpolate(part, (size, size), mode="bilinear", antialias=True)[0]


class RandomCrop:
    """A random part of an image file, resized to a square; its parameters are those of torchvision's RandomResizedCrop.

    Args:
        channels: 1 or 3.
        apply_exif_orientation: Turn images as their EXIF entries say.
        augment: Whose scale and ratio are taken.
        scaled_decode: See ResizeConfig; None decodes at full size.
    """

    def __init__(
        self, channels: int, apply_exif_orientation: bool, augment: Augment, scaled_decode: float | None = None
    ) -> None:
        self.channels, self.apply_exif_orientation = channels, apply_exif_orientation
        self.scale, self.ratio = augment.scale, augment.ratio
        self.scaled_decode = scaled_decode
        self._scratch = np.empty(0, np.uint8)  # fresh memory for every image would cost a tenth of the time

    def __call__(self, data: bytes, u: npt.NDArray[np.float32], size: int) -> Tensor:
        """The crop, uint8 (C, size, size), of a file's content, by 22 uniform numbers."""
        if simplejpeg and data.startswith(JPEG) and not (self.apply_exif_orientation and _turned(data)):
            with suppress(ValueError):  # damaged, or a rare kind
                return self._of_jpeg(data, u, size)
        image = decode_bytes(data, self.channels, self.apply_exif_orientation)
        height, width = image.shape[-2:]
        return resized_crop(image, self._box(u, height, width), size)

    def _box(self, u: npt.NDArray[np.float32], height: int, width: int) -> Box:
        return resized_crop_box(u, height, width, self.scale, self.ratio)

    def _of_jpeg(self, data: bytes, u: npt.NDArray[np.float32], size: int) -> Tensor:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        if space in ("CMYK", "YCCK"):
            raise ValueError("simplejpeg's conversion to RGB is not PIL's")
        top, left, h, w = self._box(u, height, width)
        least = size * (self.scaled_decode or np.inf)
        f = max(f for f in (1, 2, 4, 8) if f == 1 or min(h, w) >= f * least)
        end = top + h + ROWS_BELOW
        cut = rows_field(data) if end < height else None
        if cut:  # what is below the crop need not be decoded
            height, data = end, b"".join((data[:cut], end.to_bytes(2, "big"), data[cut + 2 :]))
        pixels = self._decoded(data, -(-height // f), -(-width // f), cut is not None)
        return resized_crop(pixels.permute(2, 0, 1), (round(top / f), round(left / f), h // f, w // f), size)

    def _decoded(self, jpeg: bytes, height: int, width: int, cut: bool) -> Tensor:
        """Its pixels, (height, width, C): all, or all at 1/2, 1/4 or 1/8 of its size, rounded up."""
        size = height * width * self.channels
        if len(self._scratch) < size:
            self._scratch = np.empty(size, np.uint8)
        space = "RGB" if self.channels == 3 else "GRAY"
        try:
            simplejpeg.decode_jpeg(jpeg, space, min_height=height, min_width=width, buffer=self._scratch)
        except ValueError as error:
            if not (cut and "extraneous bytes" in str(error)):  # they come after the last row: all pixels are there
                raise
        return torch.from_numpy(self._scratch[:size].reshape(height, width, self.channels))


def rows_field(jpeg: bytes) -> int | None:
    """Where a baseline JPEG of one scan says in 2 bytes how many rows it has; None for other kinds.

    A decoder stops at a smaller number. (With several scans it would, in each, and say nothing of those that lack.)
    """
    at, frame = 2, None
    while jpeg[at : at + 1] == b"\xff" and (kind := jpeg[at + 1 : at + 2]) != b"\xda":  # up to the first scan
        if kind in (b"\xc0", b"\xc1"):
            frame = at
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    if frame is None or jpeg[at + 4 : at + 5] != jpeg[frame + 9 : frame + 10]:  # not all components in the scan
        return None
    return frame + 5


def _turned(jpeg: bytes) -> bool:
    with suppress(OSError):  # damaged: it will be said by the decoder
        return Image.open(io.BytesIO(jpeg)).getexif().get(ExifTags.Base.Orientation, 1) != 1
    return False

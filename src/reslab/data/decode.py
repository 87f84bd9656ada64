"""From an image file to pixels of one size: decoding, the random crop of training, the central crop of evaluation.

simplejpeg decodes ordinary JPEGs if it is installed (the extra `fast`); Pillow decodes everything else. Both use
libjpeg-turbo and give the same pixels.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as tvf

from reslab.data.augment import Augment, resized_crop_box
from reslab.data.files import DataError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG"
COLORSPACE = {1: "GRAY", 3: "RGB"}  # of simplejpeg, by the number of channels
MODE = {1: "L", 3: "RGB"}  # the same of Pillow
# libpng's conversion of 8-bit RGB to grey: integer weights over 2^15, rounded down (Pillow adds 0.5 before it does so).
LIBPNG_GREY = (9794 / 2**15, 19234 / 2**15, 3740 / 2**15, -0.5)
# Rows to decode below a crop: its last rows depend on the colours of up to two more rows, at scale 1/8 on 16.
ROWS_BELOW = 16


def decode_bytes(data: bytes, channels: int, apply_exif_orientation: bool = True) -> Tensor:
    """Return the pixels of an image file, given its content, as uint8 (C, H, W), in memory (H, W, C).

    Images with other than `channels` (1 or 3) channels, a palette, CMYK or transparency are converted. They are rotated
    as their EXIF orientation says if `apply_exif_orientation` is set.
    """
    if jpeg_size(data, apply_exif_orientation):
        with suppress(ValueError):  # damaged or a rare kind: Pillow can read it or explains why not
            return torch.from_numpy(simplejpeg.decode_jpeg(data, COLORSPACE[channels])).permute(2, 0, 1)
    image: Image.Image = Image.open(io.BytesIO(data))
    image.draft(MODE[channels], None)  # a colour JPEG as grey: its luminance, as simplejpeg decodes it
    if apply_exif_orientation:
        image = ImageOps.exif_transpose(image)
    is_png = data.startswith(PNG)
    if is_png and image.mode in ("I", "I;16"):  # 16-bit grey: Pillow would clip it to 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if is_png and channels == 1 and image.mode in ("RGB", "RGBA", "P"):
        return tvf.pil_to_tensor(image.convert("RGB").convert("L", LIBPNG_GREY))
    return tvf.pil_to_tensor(image.convert(MODE[channels]))


def jpeg_size(data: bytes, apply_exif_orientation: bool) -> tuple[int, int] | None:
    """Return (height, width) of a JPEG that simplejpeg can decode to the right pixels; None for any other file."""
    if simplejpeg is None or not data.startswith(JPEG) or (apply_exif_orientation and _is_rotated(data)):
        return None
    with suppress(ValueError):  # damaged
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        if space not in ("CMYK", "YCCK"):  # simplejpeg converts these to RGB in another way than Pillow
            return height, width
    return None


def _is_rotated(jpeg: bytes) -> bool:
    with suppress(OSError):  # damaged: the decoder will report it
        return Image.open(io.BytesIO(jpeg)).getexif().get(ExifTags.Base.Orientation, 1) != 1
    return False


@contextmanager
def as_data_error(path: Path) -> Iterator[None]:
    """Turn any exception into a DataError that names the file: decoders raise all kinds of exceptions."""
    try:
        yield
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{path} is not a readable image: restore or remove it") from None
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{path} cannot be read ({reason}): restore or remove it") from None


def decode(path: Path, channels: int, apply_exif_orientation: bool = True) -> Tensor:
    """Return the pixels of the image file at `path`, see `decode_bytes`; a DataError if it cannot be read."""
    with as_data_error(path):
        return decode_bytes(path.read_bytes(), channels, apply_exif_orientation)


def _as_batch(image: Tensor) -> Tensor:
    """(C, H, W) -> (1, C, H, W) with channels_last strides, which torch resizes twice as fast."""
    return image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)


def resize_and_crop(image: Tensor, resize: int, size: int) -> Tensor:
    """Resize the shorter side of uint8 (C, H, W) to `resize`, antialiased, and crop the centre (C, size, size)."""
    return tvf.center_crop(tvf.resize(_as_batch(image), [resize], antialias=True), [size, size])[0]


def resized_crop(image: Tensor, box: tuple[int, int, int, int], size: int) -> Tensor:
    """Crop a box from uint8 (C, H, W) and resize it to (C, size, size), as torchvision does."""
    top, left, height, width = box
    part = _as_batch(image)[..., top : top + height, left : left + width]
    return interpolate(part, (size, size), mode="bilinear", antialias=True)[0]


@dataclass
class RandomCrop:
    """A random crop of an image file, resized to a square, with the parameters of torchvision's RandomResizedCrop.

    `augment` provides its scale and ratio; for `scaled_decode`, see ResizeConfig.
    """

    channels: int
    apply_exif_orientation: bool
    augment: Augment
    scaled_decode: float | None = None

    def __post_init__(self) -> None:
        self._box = partial(resized_crop_box, scale=self.augment.scale, ratio=self.augment.ratio)
        self._buffer = np.empty(0, np.uint8)  # reused: new memory for every image would cost a tenth of the time

    def __call__(self, data: bytes, u: npt.NDArray[np.float32], size: int) -> Tensor:
        """Return the crop, uint8 (C, size, size), of a file's content, given 22 uniform numbers."""
        if jpeg := jpeg_size(data, self.apply_exif_orientation):
            with suppress(ValueError):  # damaged or a rare kind
                return self._crop_jpeg(data, *jpeg, u, size)
        image = decode_bytes(data, self.channels, self.apply_exif_orientation)
        return resized_crop(image, self._box(u, *image.shape[-2:]), size)

    def _crop_jpeg(self, data: bytes, height: int, width: int, u: npt.NDArray[np.float32], size: int) -> Tensor:
        top, left, h, w = self._box(u, height, width)
        min_side = size * (self.scaled_decode or np.inf)
        f = max(f for f in (1, 2, 4, 8) if f == 1 or min(h, w) >= f * min_side)
        end = top + h + ROWS_BELOW
        offset = height_offset(data) if end < height else None
        if offset:  # shorten the image in its header: the rows below the crop need not be decoded
            height, data = end, b"".join((data[:offset], end.to_bytes(2, "big"), data[offset + 2 :]))
        pixels = self._decode_jpeg(data, -(-height // f), -(-width // f), shortened=offset is not None)
        return resized_crop(pixels.permute(2, 0, 1), (round(top / f), round(left / f), h // f, w // f), size)

    def _decode_jpeg(self, jpeg: bytes, height: int, width: int, shortened: bool) -> Tensor:
        """Decode (height, width, C) into the buffer: full size, or 1/2, 1/4 or 1/8 of it, rounded up."""
        size = height * width * self.channels
        if len(self._buffer) < size:
            self._buffer = np.empty(size, np.uint8)
        space = COLORSPACE[self.channels]
        try:
            simplejpeg.decode_jpeg(jpeg, space, min_height=height, min_width=width, buffer=self._buffer)
        except ValueError as error:
            # Data left over after the last row of a shortened image: all of its pixels were decoded.
            if not (shortened and "extraneous bytes" in str(error)):
                raise
        return torch.from_numpy(self._buffer[:size].reshape(height, width, self.channels))


def height_offset(jpeg: bytes) -> int | None:
    """Return the offset of the 2-byte image height in a baseline JPEG with a single scan; None for other JPEGs.

    With a smaller height there a decoder stops early. With several scans it would stop early in each of them and would
    not notice missing ones.
    """
    at, frame = 2, None
    while jpeg[at : at + 1] == b"\xff" and (kind := jpeg[at + 1 : at + 2]) != b"\xda":  # up to the first scan
        if kind in (b"\xc0", b"\xc1"):
            frame = at
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    if frame is None or jpeg[at + 4 : at + 5] != jpeg[frame + 9 : frame + 10]:  # the scan lacks some components
        return None
    return frame + 5

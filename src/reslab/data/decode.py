"""From an image file to pixels of one size: decoding, the random crop of training, the central crop of evaluation.

simplejpeg decodes ordinary JPEGs if it is installed (the extra `fast`); Pillow decodes everything else. Both use
libjpeg-turbo and give the same pixels. Deeper images are reduced to 8 bits per channel, or rejected if their samples
have no defined range.
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
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as tvf

from reslab.data.augment import Augment, resized_crop_box
from reslab.data.files import DataError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

JPEG = b"\xff\xd8\xff"
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of a JPEG's frame header
COLORSPACE = {1: "GRAY", 3: "RGB"}  # of simplejpeg, by the number of channels
MODE = {1: "L", 3: "RGB"}  # the same of Pillow
VIA = {
    "La": "LA",
    "RGBa": "RGBA",
    "LAB": "RGB",
}  # modes that Pillow cannot convert to each of MODE, and one that it can
# Formats whose 16-bit samples are unsigned and span the whole range in Pillow, which scales those of PGM and JPEG 2000.
SIXTEEN_BITS = {"PNG": ("I;16", "I"), "TIFF": ("I;16", "I;16B"), "PPM": ("I",), "JPEG2000": ("I;16",)}
SAMPLE_FORMAT = {1: "unsigned integer", 2: "signed integer", 3: "floating-point"}  # of TIFF
ROTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# libpng's conversion of 8-bit RGB to grey: integer weights over 2^15, rounded down (Pillow adds 0.5 before it does so).
LIBPNG_GREY = (9794 / 2**15, 19234 / 2**15, 3740 / 2**15, -0.5)
# Rows to decode below a crop: its last rows depend on the colours of up to two more rows, at scale 1/8 on 16.
ROWS_BELOW = 16


class PixelFormatError(ValueError):
    """An image has samples without a defined range, or of a kind that Pillow cannot read; the message names them."""


def decode_bytes(data: bytes, channels: int, apply_exif_orientation: bool = True) -> Tensor:
    """Return the pixels of an image file, given its content, as uint8 (C, H, W), in memory (H, W, C).

    Images with other than `channels` (1 or 3) channels, a palette, CMYK or transparency are converted. They are rotated
    as their EXIF orientation says if `apply_exif_orientation` is set. Of 16-bit samples the upper 8 bits are kept.

    Raises:
        PixelFormatError: The samples have no defined range, as in 32-bit and floating-point images.
    """
    if jpeg_size(data, apply_exif_orientation):
        with suppress(ValueError):  # damaged or a rare kind: Pillow can read it or explains why not
            return torch.from_numpy(simplejpeg.decode_jpeg(data, COLORSPACE[channels])).permute(2, 0, 1)
    image, rotation = _open(data, channels)
    image_format = image.format
    image = _to_8_bits(image)
    if apply_exif_orientation and rotation is not None:
        image = image.transpose(rotation)
    image = image.convert(VIA.get(image.mode, image.mode))
    if image_format == "PNG" and channels == 1 and image.mode in ("RGB", "RGBA", "P"):
        return tvf.pil_to_tensor(image.convert("RGB").convert("L", LIBPNG_GREY))
    return tvf.pil_to_tensor(image.convert(MODE[channels]))


def _open(data: bytes, channels: int) -> tuple[Image.Image, Image.Transpose | None]:
    """Return an image in memory, and the rotation that its EXIF orientation asks for."""

    def load(image: Image.Image) -> tuple[Image.Image, Image.Transpose | None]:
        image.draft(MODE[channels], None)  # a colour JPEG as grey: its luminance, as simplejpeg decodes it
        image.load()
        return image, ROTATION.get(image.getexif().get(ExifTags.Base.Orientation, 1))

    image = _identify(data)
    try:
        return load(image)
    except Exception:  # possibly in broken EXIF, which raises all kinds of exceptions: try again without it
        image = _identify(data)
        image.getexif = Image.Exif  # type: ignore[method-assign]
        return load(image)


def _identify(data: bytes) -> Image.Image:
    """Open an image without decoding it; raise a PixelFormatError if its samples cannot be reduced to 8 bits."""
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        if (samples := _tiff_samples(data) or _jpeg_samples(data)) is None:
            raise
        raise PixelFormatError(f"an image with {samples} samples, which Pillow cannot read") from None
    formats = image.tag_v2.get(TiffImagePlugin.SAMPLEFORMAT, ()) if hasattr(image, "tag_v2") else ()
    sixteen_bits = image.mode in SIXTEEN_BITS.get(image.format or "", ())
    if (image.mode.startswith(("I", "F")) and not sixteen_bits) or 2 in formats:
        samples = _tiff_samples(data) or ("floating-point" if image.mode == "F" else "integer")
        raise PixelFormatError(f"an image with {samples} samples (mode {image.mode}), which have no defined range")
    return image


def _tiff_samples(data: bytes) -> str | None:
    """Describe the samples of a TIFF; None for any other file."""
    with suppress(Exception):  # no TIFF, or damaged
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if data[2:4] in (b"+\0", b"\0+") else 8])
        file = io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        bits, number = tags[TiffImagePlugin.BITSPERSAMPLE], tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0]
        return f"{len(bits)} × {max(bits)}-bit {SAMPLE_FORMAT.get(number, 'complex or undefined')}"
    return None


def _jpeg_samples(data: bytes) -> str | None:
    """Describe the samples of a JPEG that has other than 8 bits, of 2 to 16; None for any other file."""
    frames = (at for kind, at in _segments(data) if kind in FRAMES)
    bits = next((data[at + 4] for at in frames if at + 4 < len(data)), 8)
    return f"{bits}-bit JPEG" if data.startswith(JPEG) and bits != 8 and 2 <= bits <= 16 else None


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Return a 12- or 16-bit image as its upper 8 bits, which Pillow would clip to 255; any other image as it is."""
    if not image.mode.startswith("I"):
        return image
    tags = getattr(image, "tag_v2", {})
    pixels = (np.asarray(image) >> (tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0] - 8)).astype(np.uint8)
    white_is_zero = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0  # Pillow inverts 8-bit images only
    return Image.fromarray(~pixels if white_is_zero else pixels)


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
    with suppress(Exception):  # broken EXIF is ignored; a damaged image will be reported by the decoder
        return Image.open(io.BytesIO(jpeg)).getexif().get(ExifTags.Base.Orientation, 1) != 1
    return False


@contextmanager
def as_data_error(path: Path) -> Iterator[None]:
    """Turn any exception into a DataError that names the file: decoders raise all kinds of exceptions."""
    try:
        yield
    except MemoryError:
        raise
    except PixelFormatError as error:
        raise DataError(f"{path} is {error}: convert it to grey or RGB with 8 or 16 bits per channel") from None
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
    at = dict(_segments(jpeg))
    frame, scan = at.get(0xC0, at.get(0xC1)), at.get(0xDA)
    if frame is None or scan is None or jpeg[scan + 4 : scan + 5] != jpeg[frame + 9 : frame + 10]:
        return None  # or the scan lacks some components
    return frame + 5


def _segments(jpeg: bytes) -> Iterator[tuple[int, int]]:
    """Yield (marker, offset) of the segments up to the first scan, and of that scan."""
    at, kind = 2, 0
    while kind != 0xDA and jpeg[at : at + 1] == b"\xff" and at + 1 < len(jpeg):
        kind = jpeg[at + 1]
        yield kind, at
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")

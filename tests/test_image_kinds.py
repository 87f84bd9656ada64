"""Every pixel format is converted with its real range or rejected by name, and broken EXIF costs no picture."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reslab.data import DataError
from reslab.data.decode import as_data_error, decode_bytes

RAMP = np.linspace(0, 2**16 - 1, 256).round().astype(np.uint16)[None].repeat(4, 0)  # all levels of grey, left to right
GREY = (RAMP >> 8).astype(np.uint8)
BROKEN = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01\0"  # announces five entries and ends in the first


def as_mode(mode: str, pixels: np.ndarray = RAMP) -> Image.Image:
    """Return the ramp as an image of a mode, over the whole range of its samples."""
    size = pixels.shape[::-1]
    if mode.startswith("I;16"):
        return Image.frombytes(mode, size, pixels.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    if mode in ("I", "F"):
        return Image.fromarray(pixels.astype(np.int32 if mode == "I" else np.float32))
    image = Image.fromarray((pixels >> 8).astype(np.uint8))
    between = {"La": "LA", "RGBa": "RGBA", "LAB": "RGB", "HSV": "RGB", "YCbCr": "RGB", "CMYK": "RGB"}
    return image.convert(between.get(mode, mode)).convert(mode)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(samples: np.ndarray, photometric: int = 1, kind: int = 1, bits: int | None = None, order: str = "<") -> bytes:
    """Write an uncompressed TIFF by hand: samples (H, W) or (H, W, C) of any type; `kind` is its SampleFormat."""
    channels = 1 if samples.ndim == 2 else samples.shape[2]
    height, width = samples.shape[:2]
    data = (
        samples.tobytes()
        if samples.dtype.itemsize == 1
        else samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    )
    extra = [(338, 0)] * (channels in (2, 4))
    tags = dict([(256, width), (257, height), (259, 1), (262, photometric), (277, channels), (278, height), *extra])
    lists = {258: [bits or samples.dtype.itemsize * 8] * channels, 339: [kind] * channels}
    start = 8 + len(data)
    at, tail, entries = start + 2 + 12 * (len(tags) + 4) + 4, b"", []
    for tag, values in lists.items():
        packed = struct.pack(f"{order}{channels}H", *values)
        if channels > 2:
            entries.append((tag, struct.pack(f"{order}HHII", tag, 3, channels, at + len(tail))))
            tail += packed
        else:
            entries.append((tag, struct.pack(f"{order}HHI", tag, 3, channels) + packed.ljust(4, b"\0")))
    for tag, value in {**tags, 273: 8, 279: len(data)}.items():
        entries.append((tag, struct.pack(f"{order}HHII", tag, 4, 1, value)))
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, start)
    body = b"".join(entry for _, entry in sorted(entries))
    return head + data + struct.pack(f"{order}H", len(entries)) + body + bytes(4) + tail


def png(samples: np.ndarray, color: int) -> bytes:
    """Write a 16-bit PNG by hand, samples (H, W, C)."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def pgm(maximum: int, channels: int = 1) -> bytes:
    samples = (RAMP.astype(int) * maximum // 65535).astype(">u2" if maximum > 255 else np.uint8)
    magic = {1: "P5", 3: "P6"}[channels]
    return f"{magic}\n256 4\n{maximum}\n".encode() + samples[..., None].repeat(channels, -1).tobytes()


def twelve_bits() -> bytes:
    a, b = (RAMP[:, i::2].astype(np.int32) >> 4 for i in range(2))
    packed = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).astype(np.uint8).reshape(4, 384)
    data = bytearray(tiff(np.zeros((4, 256), np.uint8), bits=12))
    shift = packed.size - 4 * 256
    end = 8 + 4 * 256
    data = data[:4] + struct.pack("<I", end + shift) + packed.tobytes() + data[end:]
    return bytes(data.replace(struct.pack("<HHII", 279, 4, 1, 1024), struct.pack("<HHII", 279, 4, 1, packed.size)))


def channels_of(samples: np.ndarray, count: int) -> np.ndarray:
    """Return the ramp as RGB, with an opaque fourth channel if there are four."""
    full = np.full_like(samples, np.iinfo(samples.dtype).max)
    return np.stack([samples] * min(count, 3) + [full] * (count - 3), -1)


WRITTEN = {
    **{f"png {mode}": saved(as_mode(mode), "PNG") for mode in ("L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B")},
    **{
        f"tiff {mode} {compression}": saved(as_mode(mode), "TIFF", compression=compression)
        for mode in ("L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "I;16", "I;16L", "I;16B")
        for compression in (None, "tiff_lzw", "tiff_adobe_deflate")
        if not (compression and mode in ("YCbCr", "LAB"))
    },
    **{f"ppm {mode}": saved(as_mode(mode), "PPM") for mode in ("L", "RGB", "RGBA", "I", "I;16")},
    **{f"jp2 {mode}": saved(as_mode(mode), "JPEG2000") for mode in ("L", "LA", "RGB", "RGBA", "I;16", "I;16B")},
    **{f"bmp {mode}": saved(as_mode(mode), "BMP") for mode in ("L", "P", "RGB", "RGBA")},
    **{f"jpeg {mode}": saved(as_mode(mode), "JPEG", quality=100) for mode in ("L", "RGB", "CMYK", "YCbCr")},
    **{f"webp {mode}": saved(as_mode(mode), "WEBP", lossless=True) for mode in ("L", "RGB", "RGBA", "RGBa", "HSV")},
    "gif": saved(as_mode("L"), "GIF"),
}
MADE = {
    "png grey 16": png(RAMP[..., None], 0),
    "png RGB 16": png(channels_of(RAMP, 3), 2),
    "png LA 16": png(np.stack([RAMP, np.full_like(RAMP, 65535)], -1), 4),
    "png RGBA 16": png(channels_of(RAMP, 4), 6),
    **{f"pgm {n}": pgm(n) for n in (255, 1023, 4095, 16383, 65535)},
    **{f"ppm {n}": pgm(n, 3) for n in (255, 4095, 65535)},
    "pgm plain": f"P2\n256 4\n4095\n{' '.join(map(str, (RAMP.astype(int) * 4095 // 65535).ravel()))}\n".encode(),
    **{f"tiff grey 16 {order}": tiff(RAMP, order=order) for order in "<>"},
    **{f"tiff RGB 16 {order}": tiff(channels_of(RAMP, 3), 2, order=order) for order in "<>"},
    **{f"tiff RGBX 16 {order}": tiff(channels_of(RAMP, 4), 2, order=order) for order in "<>"},
    "tiff grey 12": twelve_bits(),
    "tiff white is zero 8": tiff(255 - GREY, photometric=0),
    "tiff white is zero 16": tiff(65535 - RAMP, photometric=0),
}
TOLERANCE = {"pgm 1023": 1, "jpeg": 2, "tiff YCbCr": 1, "tiff LAB": 2, "webp HSV": 1, "ppm": 1, "pgm": 1}


@pytest.mark.parametrize("kind", [*WRITTEN, *MADE])
@pytest.mark.parametrize("channels", [1, 3])
def test_brightness_ramp_keeps_its_order_and_range(kind, channels):
    pixels = decode_bytes({**WRITTEN, **MADE}[kind], channels)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (channels, 4, 256)
    tolerance = next((value for name, value in TOLERANCE.items() if kind.startswith(name)), 0)
    assert (pixels.int() - torch.from_numpy(GREY).int()).abs().max() <= tolerance
    assert (pixels.int().diff(dim=-1) >= 0).all()


def test_images_of_one_bit_are_black_and_white():
    bits = Image.fromarray(np.where(GREY > 99, 255, 0).astype(np.uint8)).convert("1", dither=Image.Dither.NONE)
    for kind in ("PNG", "TIFF", "BMP", "PPM", "GIF"):
        assert np.array_equal(decode_bytes(saved(bits, kind), 3)[2], np.where(GREY > 99, 255, 0)), kind


@pytest.mark.parametrize("mode", ["La", "RGBa", "LAB", "HSV", "PA", "RGBX", "CMYK", "YCbCr"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_of_pillow_is_converted(monkeypatch, mode, channels):
    image = as_mode(mode)
    image.format = "PNG"
    monkeypatch.setattr("reslab.data.decode.Image.open", lambda file: image)
    pixels = decode_bytes(b"", channels).int()
    assert (pixels - torch.from_numpy(GREY).int()).abs().max() <= (2 if mode in ("LAB", "YCbCr") else 0)


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_png_is_read_as_32_bit_integers_by_older_pillow(monkeypatch, channels):
    image = as_mode("I")
    image.format = "PNG"
    monkeypatch.setattr("reslab.data.decode.Image.open", lambda file: image)
    assert np.array_equal(decode_bytes(b"", channels)[0], GREY)


INTS = RAMP.astype(np.int32)
REJECTED = {
    "tiff I": (saved(as_mode("I"), "TIFF"), "1 × 32-bit signed integer samples .mode I., which have no defined range"),
    "tiff F": (saved(as_mode("F"), "TIFF"), "1 × 32-bit floating-point samples .mode F., which have no defined range"),
    "tiff F big-endian": (tiff(RAMP.astype(np.float32), kind=3, order=">"), "1 × 32-bit floating-point"),
    "tiff unsigned 32": (tiff(RAMP.astype(np.uint32)), "1 × 32-bit unsigned integer"),
    "tiff signed 8": (tiff((GREY - 128).astype(np.int8), kind=2), "1 × 8-bit signed integer"),
    "tiff signed 16": (tiff((INTS - 2**15).astype(np.int16), kind=2), "1 × 16-bit signed integer"),
    "tiff signed 16 big-endian": (tiff((INTS - 2**15).astype(np.int16), kind=2, order=">"), "1 × 16-bit signed"),
    "tiff double": (tiff(RAMP.astype(np.float64), kind=3), "1 × 64-bit floating-point samples, which Pillow cannot"),
    "tiff RGB float": (tiff(np.stack([RAMP] * 3, -1).astype(np.float32), 2, kind=3), "3 × 32-bit floating-point"),
    "tiff two 16": (tiff(np.stack([RAMP] * 2, -1)), "2 × 16-bit unsigned integer samples, which Pillow cannot read"),
    "tiff complex": (tiff(RAMP.astype(np.complex64), kind=6), "1 × 64-bit complex or undefined"),
    "pfm": (saved(as_mode("F"), "PPM"), "floating-point samples .mode F."),
    "jpeg 12": (
        saved(as_mode("L"), "JPEG").replace(b"\xff\xc0\0\x0b\x08", b"\xff\xc0\0\x0b\x0c"),
        "12-bit JPEG samples",
    ),
}


@pytest.mark.parametrize("kind", REJECTED)
def test_samples_without_a_defined_range_are_rejected_by_name(kind):
    data, samples = REJECTED[kind]
    for channels in (1, 3):
        message = f"^x.tif is an image with {samples}.*: convert it to grey or RGB with 8 or 16 bits per channel"
        with pytest.raises(DataError, match=message), as_data_error(Path("x.tif")):
            decode_bytes(data, channels)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("mode", ["L", "I;16", "I;16B", "RGB", "P"])
def test_exif_orientation_is_applied_at_any_depth(kind, mode):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = decode_bytes(saved(as_mode(mode), kind, exif=exif), 3)
    assert np.array_equal(pixels[0], np.rot90(GREY, -1))


def with_exif(kind: str, exif: bytes) -> bytes:
    image = as_mode("RGB")
    if kind == "TIFF":  # EXIF is an IFD of the file: let its offset point to the last byte
        data = saved(image, "TIFF", exif={0x8769: {0x9000: b"0230"}, 0x0112: 1})
        at = data.index(struct.pack("<HHI", 0x8769, 4, 1)) + 8
        return data[:at] + struct.pack("<I", len(data) - 1) + data[at + 4 :]
    return saved(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


BROKEN_EXIF = {
    "cut": BROKEN,
    "no header": b"Exif\0\0nonsense",
    "short": b"Exif\0\0II",
    "offset outside": b"Exif\0\0II*\0\xff\xff\xff\xff",
    "empty": b"Exif\0\0",
    "wrong type": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0",
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("broken", BROKEN_EXIF)
@pytest.mark.parametrize("simplejpeg", [True, False])
def test_broken_exif_does_not_cost_the_picture(monkeypatch, kind, broken, simplejpeg):
    if not simplejpeg:
        monkeypatch.setattr("reslab.data.decode.simplejpeg", None)
    data = with_exif(kind, BROKEN_EXIF[broken])
    for apply_exif_orientation in (True, False):
        pixels = decode_bytes(data, 3, apply_exif_orientation).int()
        assert (pixels - torch.from_numpy(GREY).int()).abs().max() <= (2 if kind == "JPEG" else 0)


@pytest.mark.parametrize("profile", ["", "\nexif\n 8\nnot hexadecimal", "no lines at all"])
def test_broken_exif_in_the_text_of_a_png_is_ignored(profile):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Raw profile type exif", profile)
    assert np.array_equal(decode_bytes(saved(as_mode("RGB"), "PNG", pnginfo=info), 3)[0], GREY)


def test_damaged_pixels_are_still_an_error():
    for kind in ("PNG", "WEBP", "TIFF", "JPEG"):
        data = saved(as_mode("RGB"), kind)
        with pytest.raises(DataError, match=r"^x cannot be read"), as_data_error(Path("x")):
            decode_bytes(data[: len(data) * 2 // 3], 3)

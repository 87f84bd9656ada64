"""From an image file to a square of pixels: the same pixels as torchvision's transforms; damaged files are named."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as tvf

from reslab.data import Augment, DataError, ImageData, ImageFolder, ImageNet, ResizeConfig, decode
from reslab.data.augment import resized_crop_box
from reslab.data.decode import RandomCrop, as_data_error, decode_bytes, height_offset, resize_and_crop, resized_crop
from reslab.data.order import RESIZED_CROP, uniforms
from reslab.errors import UserError

sides = st.integers(1, 70)
needs_simplejpeg = pytest.mark.skipif(decode.simplejpeg is None, reason="simplejpeg is not installed")


def picture(height: int = 120, width: int = 170, mode: str = "RGB") -> Image.Image:
    """Smooth shapes with some noise, like a photo."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / width * 15 + k) + np.cos(y / height * (9 + k)) for k in range(3)]
    noise = np.random.default_rng(0).normal(0, 6, (height, width, 3))
    pixels = (128 + 50 * np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def jpeg(image: Image.Image | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    (image or picture()).save(file, "JPEG", **{"quality": 92, **options})
    return file.getvalue()


def rotated(orientation: int = 6, image: Image.Image | None = None) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(image, exif=exif)


def crop_numbers(n: int) -> np.ndarray:
    return uniforms(0, 0, range(n), 22, RESIZED_CROP)


@settings(max_examples=80, deadline=None)
@given(sides, sides, st.sampled_from([1, 3]), st.booleans(), st.integers(2, 40), st.data())  # 1 fails in torch 2.15
def test_resized_crop_matches_torchvision(height, width, channels, channels_last, size, data):
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top, left = data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w))
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (channels, height, width), dtype=np.uint8))
    if channels_last:  # the memory layout of decoders
        image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    theirs = tvf.resized_crop(image, top, left, h, w, [size, size], antialias=True)
    # torch's vectorised and plain uint8 code round halves differently
    torch.testing.assert_close(resized_crop(image, (top, left, h, w), size), theirs, rtol=0, atol=1)


@pytest.mark.parametrize("channels", [1, 3])
def test_resize_and_crop_matches_torchvision(channels):
    image = decode_bytes(jpeg(), channels)
    theirs = tvf.center_crop(tvf.resize(image, [64], antialias=True), [56, 56])
    torch.testing.assert_close(resize_and_crop(image, 64, 56), theirs, rtol=0, atol=1)


KINDS = {  # kinds of JPEG
    **{s: jpeg(subsampling=s) for s in ("4:4:4", "4:2:2", "4:2:0")},
    "grey": jpeg(picture(mode="L")),
    "progressive": jpeg(progressive=True),
    "restarts": jpeg(restart_marker_rows=1),
    "odd": jpeg(picture(33, 47)),
    "cmyk": jpeg(picture(mode="CMYK")),
    "rotated": rotated(),
}


@needs_simplejpeg
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("channels", "apply_exif_orientation"), [(3, True), (3, False), (1, True)])
def test_simplejpeg_and_pillow_give_the_same_pixels(monkeypatch, kind, channels, apply_exif_orientation):
    crop = RandomCrop(channels, apply_exif_orientation, Augment())

    def images() -> list[torch.Tensor]:
        whole = decode_bytes(KINDS[kind], channels, apply_exif_orientation)
        return [whole, *(crop(KINDS[kind], u, 24) for u in crop_numbers(8))]

    simplejpeg = images()
    monkeypatch.setattr(decode, "simplejpeg", None)
    assert all(torch.equal(a, b) for a, b in zip(simplejpeg, images(), strict=True))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colour_png_as_grey_has_the_weights_of_libpng(mode):
    image, file = picture(mode=mode), io.BytesIO()
    image.save(file, "PNG")
    rgb = np.asarray(image.convert("RGB")).astype(int)
    grey = (rgb @ [9794, 19234, 3740]) >> 15
    assert np.array_equal(decode_bytes(file.getvalue(), 1)[0], grey)


def record_decoded_sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return a list that receives the (height, width) of every JPEG decoded from now on."""
    sizes: list[tuple[int, int]] = []
    original = RandomCrop._decode_jpeg

    def decode_jpeg(self: RandomCrop, jpeg: bytes, height: int, width: int, shortened: bool) -> torch.Tensor:
        sizes.append((height, width))
        return original(self, jpeg, height, width, shortened)

    monkeypatch.setattr(RandomCrop, "_decode_jpeg", decode_jpeg)
    return sizes


@needs_simplejpeg
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "cmyk"])
@pytest.mark.parametrize("share", [None, 0.5])
def test_rows_below_the_crop_are_skipped_without_changing_pixels(monkeypatch, kind, share):
    crop = RandomCrop(3, False, Augment(scale=(0.02, 0.3)), share)
    sizes = record_decoded_sizes(monkeypatch)
    cut = [crop(KINDS[kind], u, 12) for u in crop_numbers(40)]
    monkeypatch.setattr(decode, "ROWS_BELOW", 10_000)
    whole = [crop(KINDS[kind], u, 12) for u in crop_numbers(40)]
    assert all(torch.equal(a, b) for a, b in zip(cut, whole, strict=True))
    rows = [height for height, _ in sizes]
    assert (sum(rows[:40]) < 0.9 * sum(rows[40:])) == (kind not in ("odd", "progressive"))


@needs_simplejpeg
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("missing", [3, 300, 5000])
def test_truncated_file_is_named_wherever_the_crop_is(progressive, missing):
    data = jpeg(progressive=progressive)[:-missing]
    crop = RandomCrop(3, False, Augment(scale=(0.02, 0.3)))
    for u in crop_numbers(20):
        with pytest.raises(DataError, match=r"^pets/cat.jpg cannot be read"), as_data_error(Path("pets/cat.jpg")):
            crop(data, u, 12)


def test_height_offset_is_found_in_baseline_jpegs_of_one_scan():
    for kind, data in KINDS.items():
        at = height_offset(data)
        if kind == "progressive":
            assert at is None
        else:
            assert data[at : at + 2] == Image.open(io.BytesIO(data)).height.to_bytes(2, "big")
    data = KINDS["4:2:0"]
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    assert height_offset(data[:frame] + b"\xff\xfe\x00\x04hi" + data[frame:]) == frame + 6 + 5
    assert height_offset(data[: scan + 4] + b"\x01" + data[scan + 5 :]) is None  # one component in the first scan
    assert [height_offset(data[:n]) for n in (0, 3, frame, scan)] == [None] * 4


@needs_simplejpeg
def test_frame_header_that_is_not_found_changes_nothing():
    data, u = jpeg(), crop_numbers(9)
    filled = data.replace(b"\xff\xc0", b"\xff\xff\xc0", 1)  # any marker may be preceded by fill bytes
    crop = RandomCrop(3, False, Augment(scale=(0.02, 0.3)))
    assert all(torch.equal(crop(filled, row, 12), crop(data, row, 12)) for row in u)


@pytest.mark.shared_data
def test_training_crops_of_photos_match_torchvision(shared_data):
    source = ImageFolder(".", train="imagenet-samples", test="imagenet-samples")
    data = ImageData(source, str(shared_data), batch_size=20, num_workers=0, val_split=0)
    images, _, indices, _, _ = next(iter(data.train_dataloader()))
    for image, index, u in zip(images, indices, uniforms(0, 0, indices, 22, RESIZED_CROP), strict=True):
        whole = tvf.pil_to_tensor(Image.open(data.train_data.path(index)).convert("RGB"))
        box = resized_crop_box(u, *whole.shape[-2:], scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
        theirs = tvf.resized_crop(whole, *box, [224, 224], antialias=True)
        torch.testing.assert_close(image.permute(2, 0, 1), theirs, rtol=0, atol=1)


def mean_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.float() - b.float()).abs().mean().item()


@needs_simplejpeg
@pytest.mark.parametrize("channels", [1, 3])
def test_scaled_decode_changes_pixels_slightly_where_the_crop_is_large(channels):
    data, u = jpeg(picture(400, 500)), crop_numbers(30)
    exact, scaled = (RandomCrop(channels, True, Augment(), share) for share in (None, 1.0))
    for size, same in ((32, False), (400, True)):  # for 400, no crop is large enough to be decoded at a smaller scale
        pairs = [(exact(data, row, size), scaled(data, row, size)) for row in u]
        assert all(a.shape == b.shape == (channels, size, size) for a, b in pairs)
        differences = [mean_difference(a, b) for a, b in pairs]
        assert max(differences) == 0 if same else 0 < np.median(differences) <= max(differences) < 6


@needs_simplejpeg
def test_scaled_decode_keeps_the_requested_share(monkeypatch):
    decoded = record_decoded_sizes(monkeypatch)
    whole = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    for share, size, height in (
        (1.0, 201, 401),
        (1.0, 200, 201),
        (1.0, 101, 201),
        (0.5, 101, 101),
        (1.0, 50, 51),
        (1.0, 2, 51),
    ):
        RandomCrop(3, True, whole, share)(jpeg(picture(401, 401)), crop_numbers(1)[0], size)
        assert decoded.pop() == (height, height)


@needs_simplejpeg
def test_scaled_decode_applies_exif_orientation():
    data = rotated(6, picture(300, 200))
    whole = Augment(scale=(1.0, 1.0), ratio=(1.5, 1.5))
    scaled, exact = (RandomCrop(3, True, whole, share)(data, crop_numbers(1)[0], 64) for share in (1.0, None))
    assert torch.equal(scaled, exact)


def test_scaled_decode_without_simplejpeg_names_the_package_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("reslab.data.datamodule.simplejpeg", None)
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        (tmp_path / part / "a" / "1.jpg").write_bytes(jpeg())
    data = ImageData(ImageFolder(str(tmp_path)), batch_size=1, val_split=0, resize=ResizeConfig(scaled_decode=1.0))
    with pytest.raises(UserError, match=r"requires simplejpeg: pip install 'reslab\[fast\]'"):
        data.setup("fit")


def test_exif_orientation_is_applied_to_own_photos_but_not_to_imagenet():
    assert ImageFolder("own").apply_exif_orientation and not ImageNet().apply_exif_orientation
    assert not ImageFolder("own", apply_exif_orientation=False).apply_exif_orientation
    assert decode_bytes(rotated(), 3, apply_exif_orientation=True).shape == (3, 170, 120)
    assert decode_bytes(rotated(), 3, apply_exif_orientation=False).shape == (3, 120, 170)
    as_stored = tvf.pil_to_tensor(Image.open(io.BytesIO(rotated())).convert("RGB"))
    assert torch.equal(decode_bytes(rotated(), 3, apply_exif_orientation=False), as_stored)


@settings(max_examples=150, deadline=None)
@example("rotated", [(0.0078125, 192)], 1.0, None)  # samples of 0 bits
@given(
    st.sampled_from(["4:4:4", "progressive", "cmyk", "rotated"]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
    st.floats(0.0, 1.0),
    st.sampled_from([None, 0.5]),
)
def test_damaged_file_gives_an_image_or_an_error_with_its_name(kind, damage, kept_share, share):
    data = bytearray(KINDS[kind])
    for place, value in damage:
        data[int(place * len(data))] = value
    crop = RandomCrop(3, True, Augment(), share if decode.simplejpeg else None)
    try:
        with as_data_error(Path("pets/cat.jpg")):
            assert crop(bytes(data[: int(kept_share * len(data))]), crop_numbers(1)[0], 16).shape == (3, 16, 16)
    except DataError as error:
        assert str(error).startswith("pets/cat.jpg ")
        assert str(error).endswith("restore or remove it") or "-bit JPEG samples" in str(error)  # damage to the bits

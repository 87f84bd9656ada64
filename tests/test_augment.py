"""Augmentation: the same images as torchvision's transforms, given the same parameters."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import beta, ks_2samp, kstest
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tvf

from reslab.data import Augment, TimmRandAugment
from reslab.data.augment import UNIT, crop, erase, erased_boxes, flip, mix, normalize, resized_crop_box, swap_pairs
from reslab.data.order import sample_seeds, uniforms
from reslab.errors import UserError

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def photos(n: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, height, width, channels), dtype=torch.uint8, generator=generator)


def chw(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 3, 1, 2)


sizes = st.integers(5, 12)
sides = st.integers(0, 16)


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, st.sampled_from([1, 3]), st.integers(1, 4), st.sampled_from(["zeros", "reflect"]), st.data())
def test_crop_matches_torchvision(height, width, channels, padding, mode, data):
    images = photos(3, height, width, channels)
    offsets = st.lists(st.integers(0, 2 * padding), min_size=3, max_size=3)
    dy, dx = data.draw(offsets), data.draw(offsets)
    ours = crop(images, torch.tensor(dy), torch.tensor(dx), padding, mode)
    for image, y, x, out in zip(chw(images), dy, dx, chw(ours), strict=True):
        padded = tvf.pad(image.float(), [padding], padding_mode="constant" if mode == "zeros" else mode)
        assert torch.equal(out.float(), tvf.crop(padded, y, x, height, width))


@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_flip_matches_torchvision(mirrored):
    images = photos(len(mirrored), 5, 7)
    ours = flip(images, torch.tensor(mirrored).long())
    theirs = [tvf.horizontal_flip(x) if m else x for x, m in zip(chw(images), mirrored, strict=True)]
    assert torch.equal(chw(ours), torch.stack(theirs))


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, st.data())
def test_erase_matches_torchvision(height, width, data):
    boxes = [[data.draw(st.integers(-8, 11)) for _ in range(2)] + [data.draw(sides) for _ in range(2)] for _ in "abc"]
    normal = normalize(photos(3, height, width), MEAN, STD)
    theirs = normal.clone()
    for image, (top, left, tall, wide) in zip(theirs, boxes, strict=True):
        bottom, right = max(top + tall, 0), max(left + wide, 0)
        top, left = max(top, 0), max(left, 0)
        tvf.erase(image, top, left, bottom - top, right - left, torch.zeros(()), inplace=True)
    assert torch.equal(erase(normal, *torch.tensor(boxes).T), theirs)


def test_erased_boxes_have_the_distribution_of_torchvision():
    size, n, probability = 40, 4000, 0.3
    boxes = erased_boxes(uniforms(0, 0, range(n), 23), size, probability)
    erased = boxes[boxes[:, 2] > 0]
    assert abs(len(erased) / n - probability) < 0.03
    assert (erased[:, :2] >= 0).all() and (erased[:, :2] + erased[:, 2:] <= size).all()
    torch.manual_seed(0)
    transform, image = v2.RandomErasing(), torch.empty(3, size, size)
    theirs = [transform.make_params([image]) for _ in range(2000)]
    for column, name in zip(erased.T, "ijhw", strict=True):
        assert ks_2samp(column, [params[name] for params in theirs]).pvalue > 0.01


@pytest.mark.parametrize("channels", [1, 3])
def test_normalize_matches_torchvision_and_is_channels_last(channels):
    images = photos(4, 8, 8, channels)
    ours = normalize(images, MEAN[:channels], STD[:channels])
    theirs = tvf.normalize(tvf.to_dtype(chw(images), torch.float32, scale=True), MEAN[:channels], STD[:channels])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_whole_pipeline_matches_torchvision_given_the_same_parameters():
    augment = Augment(crop_padding=4, flip="random", cutout=8, erasing=0.5)
    images = photos(64, 32, 32)
    params = augment.params(seed=1, epoch=2, indices=np.arange(64), size=32)
    ours = augment.apply(images, torch.from_numpy(params), MEAN, STD)
    for image, out, (dy, dx, mirrored, cy, cx, *box) in zip(chw(images), ours, params.tolist(), strict=True):
        x = tvf.crop(tvf.pad(image, [4]), dy, dx, 32, 32)
        x = tvf.horizontal_flip(x) if mirrored else x
        x = tvf.normalize(tvf.to_dtype(x, torch.float32, scale=True), MEAN, STD)
        top, left = max(cy - 4, 0), max(cx - 4, 0)
        x = tvf.erase(x, top, left, min(cy + 4, 32) - top, min(cx + 4, 32) - left, torch.zeros(()))
        x = tvf.erase(x, *box, torch.zeros(()))
        torch.testing.assert_close(out, x, rtol=0, atol=1e-6)


def test_params_depend_on_the_image_and_the_epoch_only():
    augment = Augment(crop_padding=4, flip="random", cutout=8)
    params = augment.params(0, 5, np.arange(5000), 32)
    np.testing.assert_array_equal(params[[7, 3]], augment.params(0, 5, np.array([7, 3]), 32))
    assert (params != augment.params(0, 6, np.arange(5000), 32)).any(1).mean() > 0.99
    assert not params[:, 5:].any()
    for column, count in zip(params.T[:5], (9, 9, 2, 32, 32), strict=True):
        assert sorted(set(column)) == list(range(count))
    assert Augment().params(0, 0, np.arange(3), 32).shape == (3, 0)


def test_alternating_flips_show_each_image_both_ways_in_two_epochs():
    flips = [Augment(flip="alternating").params(0, epoch, np.arange(1000), 32)[:, 2] for epoch in range(4)]
    assert (flips[0] != flips[1]).all()
    assert (flips[0] == flips[2]).all()
    assert 400 < flips[0].sum() < 600


JITTER = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
POLICIES = [v2.AutoAugment(), v2.RandAugment(), v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR), JITTER]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("channels", [1, 3])
def test_transforms_match_torchvision_seeded_per_image(policy, channels):
    images = photos(12, 24, 30, channels)
    ours, augment = images.clone(), Augment(transforms=[policy, policy])
    augment.transform(ours, seed=1, epoch=2, indices=np.arange(12))
    for image, out, seed in zip(images, ours, sample_seeds(1, 2, np.arange(12)).tolist(), strict=True):
        torch.manual_seed(seed)
        theirs = policy(policy(tvf.to_pil_image(image.permute(2, 0, 1))))
        assert torch.equal(chw(out[None])[0], tvf.pil_to_tensor(theirs))
    assert (ours != images).flatten(1).any(1).sum() > 6


def test_transforms_depend_on_the_image_and_its_seed_only():
    augment, images = Augment(transforms=[v2.RandAugment()]), photos(8, 16, 16)
    together, one_by_one = images.clone(), images.clone()
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    augment.transform(together, 0, 5, np.arange(8))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(4)
    for i in reversed(range(8)):
        augment.transform(one_by_one[i : i + 1], 0, 5, np.array([i]))
    assert torch.equal(together, one_by_one)
    for seed, epoch, first in [(1, 5, 0), (0, 6, 0), (0, 5, 8)]:
        other = images.clone()
        augment.transform(other, seed, epoch, np.arange(first, first + 8))
        assert not torch.equal(other, together)


def test_timm_randaugment_is_seeded_per_image_and_restores_the_global_generators():
    pytest.importorskip("timm", reason="requires timm")
    policy = TimmRandAugment("rand-m9-n4-mstd0.5-inc1-p1")
    image = Image.fromarray(photos(1, 32, 32)[0].numpy())
    outputs, states = [], []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        states.append((random.getstate(), np.random.get_state()[1].tolist()))  # noqa: NPY002
        outputs.append(np.asarray(policy(image)))
    assert states[0] == states[1] == states[2]
    assert np.array_equal(outputs[0], outputs[2]) and not np.array_equal(outputs[0], outputs[1])


def test_transform_that_changes_the_image_size_is_an_error():
    with pytest.raises(UserError, match="must keep the size"):
        Augment(transforms=[v2.Resize(8)]).transform(photos(2, 16, 16), 0, 0, np.arange(2))


def mixed_by(kind, images, **parameters):
    """Return four images and soft labels, mixed in pairs by torchvision's MixUp or CutMix with these parameters."""
    transform = kind(num_classes=4)
    transform.make_params = lambda inputs: parameters
    pairs = [transform(images[i : i + 2], torch.arange(i, i + 2)) for i in (0, 2)]
    return [torch.cat(parts) for parts in zip(*pairs, strict=True)]


def assert_mixed(params, images, theirs, atol):
    labels = torch.eye(len(images))
    ours, lam = mix(images, torch.tensor(params, dtype=torch.int32))
    torch.testing.assert_close(ours, theirs[0], rtol=0, atol=atol)
    torch.testing.assert_close(lam * labels + (1 - lam) * swap_pairs(labels), theirs[1], rtol=0, atol=1e-6)
    assert ours.is_contiguous(memory_format=torch.channels_last)


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, st.sampled_from([1, 3]), st.integers(0, UNIT))
def test_mixup_matches_torchvision(height, width, channels, lam):
    images = normalize(photos(4, height, width, channels), MEAN[:channels], STD[:channels])
    theirs = mixed_by(v2.MixUp, images, lam=lam / UNIT)
    assert_mixed([lam, 0, 0, height, width], images, theirs, atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, st.sampled_from([1, 3]), st.data())
def test_cutmix_matches_torchvision(height, width, channels, data):
    images = normalize(photos(4, height, width, channels), MEAN[:channels], STD[:channels])
    top, bottom = sorted(data.draw(st.integers(0, height)) for _ in range(2))
    left, right = sorted(data.draw(st.integers(0, width)) for _ in range(2))
    lam = 1 - (bottom - top) * (right - left) / (height * width)
    box = (left, top, right, bottom)
    theirs = mixed_by(v2.CutMix, images, box=box, lam_adjusted=lam)
    assert_mixed([0, top, left, bottom, right], images, theirs, atol=0)


def mix_params(augment, n=2000, size=32):
    return np.array([augment.mix_params(0, i // 50, i, size) for i in range(n)])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_mixup_lambda_has_the_beta_distribution(alpha):
    lam, *box = mix_params(Augment(mixup=alpha)).T
    assert kstest(lam / UNIT, beta(alpha, alpha).cdf).pvalue > 0.01
    assert np.unique(box, axis=1).T.tolist() == [[0, 0, 32, 32]]


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_cutmix_boxes_have_the_distribution_of_torchvision(alpha):
    torch.manual_seed(0)
    transform, images = v2.CutMix(alpha=alpha, num_classes=2), torch.empty(1, 3, 32, 32)
    theirs = [transform.make_params([images])["box"] for _ in range(2000)]
    lam, *box = mix_params(Augment(cutmix=alpha)).T
    assert not lam.any()
    for ours, column in zip(box, np.array(theirs)[:, [1, 0, 3, 2]].T, strict=True):
        assert ks_2samp(ours, column).pvalue > 0.01


def test_mixup_and_cutmix_together_use_one_of_them_per_batch():
    mixup_share = (mix_params(Augment(mixup=1.0, cutmix=1.0))[:, 0] > 0).mean()
    assert 0.45 < mixup_share < 0.55


def test_each_step_has_its_own_mix_which_changes_no_other_parameters():
    augment = Augment(flip="random", mixup=1.0)
    params = augment.mix_params(0, 5, 7, 32)
    np.testing.assert_array_equal(params, augment.mix_params(0, 5, 7, 32))
    others = [(0, 5, 3), (0, 6, 7), (1, 5, 7)]
    assert all(augment.mix_params(seed, epoch, step, 32)[0] != params[0] for seed, epoch, step in others)
    assert Augment().mix_params(0, 5, 7, 32).shape == (0,)
    np.testing.assert_array_equal(*(a.params(0, 5, np.arange(100), 32) for a in (augment, Augment(flip="random"))))


def test_mix_params_are_the_same_on_every_machine_and_version():
    # Fixed values: a change here changes every run with mixup or CutMix.
    assert Augment(mixup=0.2).mix_params(0, 0, 0, 32).tolist() == [16772412, 0, 0, 32, 32]
    assert Augment(cutmix=1.0).mix_params(0, 0, 4, 32).tolist() == [0, 4, 5, 32, 32]


def test_resized_crops_have_the_distribution_of_torchvision():
    scale, ratio, height, width, n = (0.08, 1.0), (3 / 4, 4 / 3), 60, 90, 4000
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [
            v2.RandomResizedCrop(32, scale, ratio).make_params([image])[k]
            for _ in range(n)
            for k in ("top", "left", "height", "width")
        ]
    ).reshape(n, 4)
    ours = np.array([resized_crop_box(u, height, width, scale, ratio) for u in uniforms(0, 0, range(n), 22)])
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    for column in range(4):
        a, b = np.sort(ours[:, column]), np.sort(theirs[:, column])
        points = np.arange(91)
        distance = abs(np.searchsorted(a, points, "right") - np.searchsorted(b, points, "right")).max() / n
        assert distance < 0.043  # two-sample Kolmogorov-Smirnov test, n = 4,000 each, p = 0.001


@pytest.mark.parametrize(("height", "width"), [(10, 100), (100, 10)])
def test_image_that_no_crop_fits_is_cropped_in_the_centre_like_torchvision(height, width):
    box = resized_crop_box(uniforms(0, 0, [0], 22)[0], height, width, (1.0, 1.0), (3 / 4, 4 / 3))
    transform = v2.RandomResizedCrop(32, (1.0, 1.0), (3 / 4, 4 / 3))
    theirs = transform.make_params([torch.empty(3, height, width)])
    assert box == tuple(theirs[k] for k in ("top", "left", "height", "width"))


@pytest.mark.parametrize(
    "invalid",
    [
        {"crop_padding": -1},
        {"cutout": -2},
        {"mixup": -0.1},
        {"cutmix": float("nan")},
        {"erasing": 1.5},
        {"repeats": 0},
        {"scale": (0.5, 2.0)},
        {"ratio": (2.0, 1.0)},
    ],
)
def test_invalid_settings_are_rejected(invalid):
    with pytest.raises(UserError, match="augment: "):
        Augment(**invalid)

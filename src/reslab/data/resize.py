"""How image files of any size become images of one size, as configuration; data in memory have theirs."""

from dataclasses import dataclass

import numpy as np

from reslab.errors import UserError


@dataclass(frozen=True)
class ProgressiveResizing:
    """A training size that grows with training, linearly between two shares of its epochs (as FFCV's recipes do).

    Args:
        start: Side of the images at first.
        begin: Share of the epochs after which it grows.
        until: Share of the epochs after which it has the size that is trained for.
        multiple: The sizes in between are multiples of this.
    """

    start: int
    begin: float = 0.0
    until: float = 1.0
    multiple: int = 32

    def __post_init__(self) -> None:
        if self.start < 1 or self.multiple < 1:
            raise UserError("data.resize.progressive: start and multiple are numbers of pixels, 1 or more")
        if not 0 <= self.begin < self.until <= 1:
            raise UserError("data.resize.progressive: begin and until are shares of the epochs, 0 ≤ begin < until ≤ 1")

    def sizes(self, end: int, epochs: int) -> tuple[int, ...]:
        """The size in each of the epochs, on the way to `end`."""
        epoch = np.arange(epochs)
        grown = np.interp(epoch, [self.begin * epochs, self.until * epochs], [self.start, end])
        rounded = (np.round(grown / self.multiple) * self.multiple).clip(self.multiple)
        rounded[epoch <= self.begin * epochs] = self.start
        rounded[epoch >= self.until * epochs] = end
        return tuple(map(int, rounded))


@dataclass(frozen=True)
class ResizeConfig:
    """How image files are cut to size: training sees random crops, evaluation the centre.

    Args:
        train_size: Side of the training images; by default the data set's image_size.
        test_size: Side of the images for evaluation; by default the data set's image_size. Networks trained on
            random crops do better on somewhat larger images (Touvron et al. 2019).
        test_resize: The shorter side before the central crop to `test_size`; by default 256/224 of that.
        progressive: Train on smaller images first.
        scaled_decode: Decode a JPEG at 1/2, 1/4 or 1/8 where the sides of the random crop keep at least this share
            of the training size. At 1 nothing is enlarged that was large enough; less is faster and blurs more.
            Other pixels than by default, and never in evaluation. Needs simplejpeg.
    """

    train_size: int | None = None
    test_size: int | None = None
    test_resize: int | None = None
    progressive: ProgressiveResizing | None = None
    scaled_decode: float | None = None

    def __post_init__(self) -> None:
        for name in ("train_size", "test_size", "test_resize"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise UserError(f"data.resize.{name} must be 1 or more pixels, not {size}")
        if self.test_size and self.test_resize and self.test_resize < self.test_size:
            raise UserError(f"data.resize.test_resize {self.test_resize} is less than test_size {self.test_size}")
        if self.scaled_decode is not None and self.scaled_decode <= 0:
            raise UserError("data.resize.scaled_decode is a share of the training size, above 0; 1 enlarges nothing")

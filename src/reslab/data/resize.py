"""Configuration of image sizes, for data sets of image files."""

from dataclasses import dataclass

import numpy as np

from reslab.errors import UserError


@dataclass(frozen=True)
class ProgressiveResizing:
    """Training images that grow linearly during a part of training, as in FFCV's recipes.

    Args:
        start: Side of the images at the start.
        begin: Fraction of the epochs after which they begin to grow.
        until: Fraction of the epochs after which they have their final size.
        multiple: Intermediate sizes are multiples of this.
    """

    start: int
    begin: float = 0.0
    until: float = 1.0
    multiple: int = 32

    def __post_init__(self) -> None:
        if self.start < 1 or self.multiple < 1:
            raise UserError("data.resize.progressive: start and multiple must be at least 1 pixel")
        if not 0 <= self.begin < self.until <= 1:
            raise UserError("data.resize.progressive: begin and until must be fractions with 0 ≤ begin < until ≤ 1")

    def sizes(self, end: int, epochs: int) -> tuple[int, ...]:
        """Return the size in each epoch; `end` is the final size."""
        epoch = np.arange(epochs)
        linear = np.interp(epoch, [self.begin * epochs, self.until * epochs], [self.start, end])
        rounded = (np.round(linear / self.multiple) * self.multiple).clip(self.multiple)
        rounded[epoch <= self.begin * epochs] = self.start
        rounded[epoch >= self.until * epochs] = end
        return tuple(map(int, rounded))


@dataclass(frozen=True)
class ResizeConfig:
    """Sizes of images from files: training uses random crops, evaluation central crops.

    Args:
        train_size: Side of the training images (default: the data set's image_size).
        test_size: Side of the evaluation images (default: the data set's image_size). Networks trained on random crops
            are more accurate on somewhat larger images (Touvron et al. 2019).
        test_resize: Length of the shorter side before the central crop to `test_size` (default: 256/224 of test_size).
        progressive: Start training on smaller images.
        scaled_decode: Decode training JPEGs at 1/2, 1/4 or 1/8 of their size if the sides of the random crop then keep
            at least this fraction of the training size. Smaller values are faster and blur more. Requires simplejpeg.
    """

    train_size: int | None = None
    test_size: int | None = None
    test_resize: int | None = None
    progressive: ProgressiveResizing | None = None
    scaled_decode: float | None = None

    def __post_init__(self) -> None:
        for name in ("train_size", "test_size", "test_resize"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise UserError(f"data.resize.{name} must be at least 1, got {size}")
        if self.scaled_decode is not None and self.scaled_decode <= 0:
            raise UserError(f"data.resize.scaled_decode must be above 0, got {self.scaled_decode}")

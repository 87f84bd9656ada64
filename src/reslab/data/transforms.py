"""Transforms of single images that torchvision lacks."""

import random
from typing import Any

import numpy as np
import torch
from torchvision.transforms import v2

from reslab.errors import UserError


class TimmRandAugment(v2.Transform):
    """timm's RandAugment for PIL images: its operations, magnitudes and probabilities differ from torchvision's.

    Args:
        config: timm's config string: rand-m7-mstd0.5-inc1 has magnitude 7 of 10 with a standard deviation of 0.5.
        fill: Colour of the area that geometric operations uncover, one value per channel.

    Raises:
        UserError: timm is not installed.
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

"""Transforms of one image that torchvision does not have."""

import random
from typing import Any

import numpy as np
import torch
from torchvision.transforms import v2

from reslab.errors import UserError


class TimmRandAugment(v2.Transform):
    """timm's RandAugment, of PIL images: other operations, magnitudes and chances than torchvision's.

    Args:
        config: In timm's words: rand-m7-mstd0.5-inc1 is magnitude 7 of 10 with a normal spread of 0.5, twice.
        fill: The colour, of each channel, of what is moved in.

    Raises:
        UserError: timm is not installed.
    """

    def __init__(self, config: str = "rand-m9-mstd0.5-inc1", fill: tuple[int, ...] = (124, 116, 104)) -> None:
        super().__init__()
        try:
            from timm.data.auto_augment import rand_augment_transform
        except ImportError:
            raise UserError("of the transforms, TimmRandAugment needs timm: pip install timm") from None
        self.augment = rand_augment_transform(config, {"img_mean": tuple(fill)})

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        # timm draws from Python's and numpy's generators: torch's, which has the image's own seed, seeds them.
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
        seed = int(torch.randint(2**32, ()))
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            return self.augment(inpt)
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002

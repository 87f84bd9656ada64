"""Data: sources of images, their order, and the batches made of them."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reslab.data.augment import Augment as Augment
    from reslab.data.batches import Batch as Batch
    from reslab.data.batches import FolderBatch as FolderBatch
    from reslab.data.datamodule import ImageData as ImageData
    from reslab.data.datasets import CIFAR10 as CIFAR10
    from reslab.data.datasets import CIFAR100 as CIFAR100
    from reslab.data.datasets import Digits as Digits
    from reslab.data.datasets import ImageFolder as ImageFolder
    from reslab.data.datasets import ImageNet as ImageNet
    from reslab.data.datasets import Imagenette as Imagenette
    from reslab.data.datasets import ImageSource as ImageSource
    from reslab.data.files import DataError as DataError
    from reslab.data.resize import ProgressiveResizing as ProgressiveResizing
    from reslab.data.resize import ResizeConfig as ResizeConfig
    from reslab.data.transforms import TimmRandAugment as TimmRandAugment

_EXPORTS = {
    "augment": ["Augment"],
    "batches": ["Batch", "FolderBatch"],
    "datamodule": ["ImageData"],
    "datasets": ["CIFAR10", "CIFAR100", "Digits", "ImageFolder", "ImageNet", "ImageSource", "Imagenette"],
    "files": ["DataError"],
    "resize": ["ProgressiveResizing", "ResizeConfig"],
    "transforms": ["TimmRandAugment"],
}
_MODULES = {name: module for module, names in _EXPORTS.items() for name in names}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    # Lazy: reslab.data.order does not need torch, and listing the data sets should not import it either.
    if name in _MODULES:
        return getattr(importlib.import_module(f"reslab.data.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'reslab.data' has no attribute {name!r}")

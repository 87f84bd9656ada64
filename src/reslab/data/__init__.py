"""Data: sources of images, their order, and the batches made of them."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reslab.data.augment import Augment as Augment
    from reslab.data.datamodule import ImageData as ImageData
    from reslab.data.datasets import CIFAR10 as CIFAR10
    from reslab.data.datasets import CIFAR100 as CIFAR100
    from reslab.data.datasets import Digits as Digits
    from reslab.data.datasets import ImageFolder as ImageFolder
    from reslab.data.datasets import ImageNet as ImageNet
    from reslab.data.datasets import Imagenette as Imagenette
    from reslab.data.datasets import ImageSource as ImageSource
    from reslab.data.files import DataError as DataError
    from reslab.data.loaders import Batch as Batch
    from reslab.data.loaders import FolderBatch as FolderBatch
    from reslab.data.resize import ProgressiveResizing as ProgressiveResizing
    from reslab.data.resize import ResizeConfig as ResizeConfig
    from reslab.data.transforms import TimmRandAugment as TimmRandAugment

_HOMES = {
    "Augment": "augment",
    "Batch": "loaders",
    "CIFAR10": "datasets",
    "CIFAR100": "datasets",
    "DataError": "files",
    "Digits": "datasets",
    "FolderBatch": "loaders",
    "ImageData": "datamodule",
    "ImageFolder": "datasets",
    "ImageNet": "datasets",
    "ImageSource": "datasets",
    "Imagenette": "datasets",
    "ProgressiveResizing": "resize",
    "TimmRandAugment": "transforms",
    "ResizeConfig": "resize",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    # Lazy: reslab.data.order needs no torch, and listing data sets should not either.
    if name in _HOMES:
        return getattr(importlib.import_module(f"reslab.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'reslab.data' has no attribute {name!r}")

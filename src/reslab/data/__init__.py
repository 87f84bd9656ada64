"""Data: sources of images, their order, and the batches made of them."""

from reslab.data.augment import Augment, TimmRandAugment
from reslab.data.batches import Batch, FolderBatch
from reslab.data.datamodule import ImageData
from reslab.data.datasets import CIFAR10, CIFAR100, Digits, ImageFolder, ImageNet, Imagenette, ImageSource
from reslab.data.files import DataError
from reslab.data.resize import ProgressiveResizing, ResizeConfig
from reslab.data.test_sets import CIFAR10C, CIFAR100C, CIFAR101, EvaluationSet, ImageNetA, ImageNetR, ImageNetV2

__all__ = ["CIFAR10", "CIFAR100", "Digits", "ImageFolder", "ImageNet", "ImageSource", "Imagenette"]
__all__ += ["Augment", "Batch", "DataError", "FolderBatch", "ImageData"]
__all__ += ["ProgressiveResizing", "ResizeConfig", "TimmRandAugment"]
__all__ += ["CIFAR10C", "CIFAR100C", "CIFAR101", "EvaluationSet", "ImageNetA", "ImageNetR", "ImageNetV2"]

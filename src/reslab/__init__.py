"""reslab: reproducible image-classification experiments with PyTorch Lightning."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reslab.data import ImageData as ImageData
    from reslab.models import create_model as create_model
    from reslab.models import list_models as list_models
    from reslab.training import Classifier as Classifier

__version__ = "0.1.0"
__all__ = ["Classifier", "ImageData", "create_model", "list_models"]

_MODULES = {"Classifier": "training", "ImageData": "data", "create_model": "models", "list_models": "models"}


def __getattr__(name: str) -> Any:
    # Lazy: `import reslab` and `reslab --help` must not import torch (1.7 s) and lightning (5 s).
    if name in _MODULES:
        return getattr(importlib.import_module(f"reslab.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'reslab' has no attribute {name!r}")

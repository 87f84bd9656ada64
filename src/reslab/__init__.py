"""reslab: ResNet experiments with PyTorch Lightning that others can reproduce."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reslab.data import ImageData as ImageData
    from reslab.models import create_model as create_model
    from reslab.models import list_models as list_models
    from reslab.training import Classifier as Classifier

__version__ = "0.1.0"
__all__ = ["Classifier", "ImageData", "create_model", "list_models"]

_HOMES = {
    "create_model": "reslab.models",
    "list_models": "reslab.models",
    "Classifier": "reslab.training",
    "ImageData": "reslab.data",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `import reslab` and `reslab --help` do not pay for torch (1.7 s) and lightning (5 s).
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'reslab' has no attribute {name!r}")

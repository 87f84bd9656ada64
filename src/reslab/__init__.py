"""reslab: reproducible image-classification experiments with PyTorch Lightning."""

from typing import TYPE_CHECKING

from reslab.host import lazy_exports

if TYPE_CHECKING:
    from reslab.data import ImageData
    from reslab.models import create_model, list_models
    from reslab.training import Classifier

__version__ = "0.2.0"
__all__ = ["Classifier", "ImageData", "create_model", "list_models"]
# `import reslab` and `reslab --help` must not import torch (1.7 s) and lightning (5 s).
__getattr__ = lazy_exports(
    __name__, {"data": ["ImageData"], "models": ["create_model", "list_models"], "training": ["Classifier"]}
)

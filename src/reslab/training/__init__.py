"""The LightningModule, its optimizers and schedules, and what a run needs beside them."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reslab.training.classifier import Classifier as Classifier
    from reslab.training.optimizers import Constant as Constant
    from reslab.training.optimizers import Cosine as Cosine
    from reslab.training.optimizers import Linear as Linear
    from reslab.training.optimizers import MultiStep as MultiStep
    from reslab.training.optimizers import OneCycle as OneCycle
    from reslab.training.optimizers import Schedule as Schedule

__all__ = ["Classifier", "Constant", "Cosine", "Linear", "MultiStep", "OneCycle", "Schedule"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'reslab.training' has no attribute {name!r}")
    home = "classifier" if name == "Classifier" else "optimizers"
    return getattr(importlib.import_module(f"reslab.training.{home}"), name)

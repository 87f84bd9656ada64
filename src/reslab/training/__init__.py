"""The LightningModule, its objectives, optimizers and schedules, and what a run needs beside them."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reslab.training.classifier import Classifier as Classifier
    from reslab.training.classifier import Execution as Execution
    from reslab.training.objectives import BinaryCrossEntropy as BinaryCrossEntropy
    from reslab.training.objectives import CrossEntropy as CrossEntropy
    from reslab.training.objectives import Distillation as Distillation
    from reslab.training.objectives import Objective as Objective
    from reslab.training.optimizers import Constant as Constant
    from reslab.training.optimizers import Cosine as Cosine
    from reslab.training.optimizers import Linear as Linear
    from reslab.training.optimizers import MultiStep as MultiStep
    from reslab.training.optimizers import OneCycle as OneCycle
    from reslab.training.optimizers import ParamGroups as ParamGroups
    from reslab.training.optimizers import Schedule as Schedule

_HOMES = {
    "classifier": ("Classifier", "Execution"),
    "objectives": ("BinaryCrossEntropy", "CrossEntropy", "Distillation", "Objective"),
    "optimizers": ("Constant", "Cosine", "Linear", "MultiStep", "OneCycle", "ParamGroups", "Schedule"),
}
__all__ = [name for names in _HOMES.values() for name in names]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"reslab.training.{home}"), name)
    raise AttributeError(f"module 'reslab.training' has no attribute {name!r}")

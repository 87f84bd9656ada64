"""The LightningModule, its objectives, optimizers and schedules, and what a run needs beside them."""

from typing import TYPE_CHECKING

from reslab.host import lazy_exports

# ruff: noqa: F401
if TYPE_CHECKING:
    from reslab.training.classifier import Classifier, Execution
    from reslab.training.objectives import BinaryCrossEntropy, CrossEntropy, Distillation, Objective
    from reslab.training.optimizers import Constant, Cosine, Linear, MultiStep, OneCycle, ParamGroups, Schedule

_MODULES = {
    "classifier": ("Classifier", "Execution"),
    "objectives": ("BinaryCrossEntropy", "CrossEntropy", "Distillation", "Objective"),
    "optimizers": ("Constant", "Cosine", "Linear", "MultiStep", "OneCycle", "ParamGroups", "Schedule"),
}
__all__ = [name for names in _MODULES.values() for name in names]
__getattr__ = lazy_exports(__name__, _MODULES)

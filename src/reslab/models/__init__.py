"""Networks: the contract, ResNet, timm's and torchvision's, pretrained weights, and the layer table."""

import importlib
from typing import TYPE_CHECKING, Any

from reslab.errors import UserError

# ruff: noqa: F401
if TYPE_CHECKING:
    from reslab.models.library import TimmNetwork, TorchvisionNetwork
    from reslab.models.network import Network, check_network
    from reslab.models.resnet import ResNet
    from reslab.models.summary import summarize
    from reslab.models.zoo import create_model, list_models, load_weights, network_of_run

_MODULES = {
    "library": ("TimmNetwork", "TorchvisionNetwork"),
    "network": ("Network", "check_network"),
    "resnet": ("ResNet",),
    "summary": ("summarize",),
    "zoo": ("create_model", "list_models", "load_weights", "network_of_run"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}
__all__ = ["ModelError", *_HOMES]


class ModelError(UserError, ValueError):
    """A network that cannot be built, or weights that do not fit it; the message says what to change."""


def __getattr__(name: str) -> Any:
    # Lazy: `reslab list models` must not import torch.
    if name in _HOMES:
        return getattr(importlib.import_module(f"reslab.models.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'reslab.models' has no attribute {name!r}")

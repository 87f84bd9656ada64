"""Networks: the contract, ResNet, timm's and torchvision's, pretrained weights, and the layer table."""

import importlib
from typing import TYPE_CHECKING, Any

from reslab.errors import UserError

if TYPE_CHECKING:
    from reslab.models.network import Network as Network
    from reslab.models.network import check_network as check_network
    from reslab.models.resnet import ResNet as ResNet
    from reslab.models.summary import summarize as summarize
    from reslab.models.timm import TimmNetwork as TimmNetwork
    from reslab.models.torchvision import TorchvisionNetwork as TorchvisionNetwork
    from reslab.models.zoo import create_model as create_model
    from reslab.models.zoo import list_models as list_models
    from reslab.models.zoo import load_weights as load_weights
    from reslab.models.zoo import network_of_run as network_of_run

_HOMES = {
    "Network": "network",
    "ResNet": "resnet",
    "TimmNetwork": "timm",
    "TorchvisionNetwork": "torchvision",
    "check_network": "network",
    "create_model": "zoo",
    "list_models": "zoo",
    "load_weights": "zoo",
    "network_of_run": "zoo",
    "summarize": "summary",
}
__all__ = ["ModelError", *_HOMES]


class ModelError(UserError, ValueError):
    """A network that cannot be built, or weights that do not fit it; the message says what to change."""


def __getattr__(name: str) -> Any:
    # Lazy: `reslab list models` must not import torch.
    if name in _HOMES:
        return getattr(importlib.import_module(f"reslab.models.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'reslab.models' has no attribute {name!r}")

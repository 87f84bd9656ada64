"""Networks: ResNet, its named variants, pretrained weights, and the layer table."""

import importlib
from typing import TYPE_CHECKING, Any

from reslab.errors import UserError

if TYPE_CHECKING:
    from reslab.models.network import Network as Network
    from reslab.models.network import check_network as check_network
    from reslab.models.resnet import ResNet as ResNet
    from reslab.models.summary import summarize as summarize
    from reslab.models.zoo import create_model as create_model
    from reslab.models.zoo import list_models as list_models
    from reslab.models.zoo import load_weights as load_weights

__all__ = [
    "ModelError",
    "Network",
    "ResNet",
    "check_network",
    "create_model",
    "list_models",
    "load_weights",
    "summarize",
]

_HOMES = {
    "Network": "network",
    "check_network": "network",
    "ResNet": "resnet",
    "create_model": "zoo",
    "list_models": "zoo",
    "load_weights": "zoo",
    "summarize": "summary",
}


class ModelError(UserError, ValueError):
    """A network that cannot be built, or weights that do not fit it; the message holds the remedy."""


def __getattr__(name: str) -> Any:
    # Lazy: the names of the variants (`reslab list models`) must not cost an import of torch.
    if name in _HOMES:
        return getattr(importlib.import_module(f"reslab.models.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'reslab.models' has no attribute {name!r}")

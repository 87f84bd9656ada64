"""Networks: the contract, ResNet, SpeedNet, timm's and torchvision's, pretrained weights, and the layer table."""

from typing import TYPE_CHECKING

from reslab.errors import UserError
from reslab.host import lazy_exports

# ruff: noqa: F401
if TYPE_CHECKING:
    from reslab.models.library import TimmNetwork, TorchvisionNetwork
    from reslab.models.network import Network, check_network
    from reslab.models.resnet import ResNet
    from reslab.models.speednet import SpeedNet
    from reslab.models.summary import summarize
    from reslab.models.zoo import create_model, list_models, load_weights, network_of_run

_MODULES = {
    "library": ("TimmNetwork", "TorchvisionNetwork"),
    "network": ("Network", "check_network"),
    "resnet": ("ResNet",),
    "speednet": ("SpeedNet",),
    "summary": ("summarize",),
    "zoo": ("create_model", "list_models", "load_weights", "network_of_run"),
}
__all__ = ["ModelError", *(name for names in _MODULES.values() for name in names)]
__getattr__ = lazy_exports(__name__, _MODULES)  # `reslab list models` must not import torch


class ModelError(UserError, ValueError):
    """A network that cannot be built, or weights that do not fit it; the message says what to change."""

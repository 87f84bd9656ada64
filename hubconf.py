"""Entry points for torch.hub: every network of `reslab list models`, from a clone or from GitHub, without installing.

net = torch.hub.load("OWNER/reslab", "resnet18", weights="IMAGENET1K_V1")
net = torch.hub.load("path/of/a/clone", "resnet8_fast", source="local", weights="runs/mine", num_classes=10)
net = torch.hub.load("OWNER/reslab", "create_model", "timm/convnext_atto", num_classes=10)  # needs timm
"""

import sys
from pathlib import Path

dependencies = ["torch", "torchvision", "safetensors", "yaml"]
sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from reslab.models import create_model, list_models  # noqa: E402


def _entry(name: str):
    def build(weights: str | None = None, **kwargs):
        return create_model(name, weights=weights, **kwargs)

    build.__name__ = name
    build.__doc__ = f"""{name}.

    Args:
        weights: A name in torchvision ("IMAGENET1K_V1"), a file, or a run directory; None for random initial values.
        kwargs: Arguments of reslab.models.ResNet: num_classes=10, in_channels=1.
    """
    return build


globals().update({name: _entry(name) for name in list_models()})

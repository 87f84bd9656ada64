"""Every image classifier of torchvision as a Network."""

import re
from typing import Any

import torchvision.models
from torch import Tensor, nn
from torchvision.models.squeezenet import SqueezeNet

from reslab.models import ModelError
from reslab.models.library import LibraryNetwork
from reslab.models.zoo import load_weights, nearest

# Auxiliary heads return a tuple in training. The published weights want the input transform: always use it, so that
# a network does not depend on where its weights came from.
INCEPTION_KWARGS = {"aux_logits": False, "init_weights": True, "transform_input": True}


class TorchvisionNetwork(LibraryNetwork):
    """A network of torchvision.models: (N, in_channels, H, W) -> (N, num_classes).

    Args:
        name: Name in torchvision: mobilenet_v3_small. `reslab list models torchvision` prints all of them.
        weights: Pretrained weights by the name of the enum's member: IMAGENET1K_V1, DEFAULT. They are downloaded once,
            to torch.hub's cache. The head is new if the number of classes differs, the first convolution if the number
            of channels does.
        num_classes: Outputs of the head; 0 for features.
        in_channels: Channels of the images.
        image_size: Height and width of the images, for architectures that depend on them (ViT, MaxViT); others ignore
            them. 224 by default.
        kwargs: Further arguments of the architecture: dropout=0.1. In a config they are in `dict_kwargs`.

    Raises:
        ModelError: Unknown name, impossible arguments, or weights that cannot be downloaded.
    """

    def __init__(
        self,
        name: str,
        weights: str | None = None,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        image_size: int | tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        if name not in self.names():
            raise ModelError(f"torchvision has no image classifier {name!r}{nearest(name, self.names())}")
        if name in ("googlenet", "inception_v3"):
            kwargs = {**INCEPTION_KWARGS, "transform_input": in_channels == 3, **kwargs}
        if image_size is not None and name.startswith(("vit_", "maxvit_")):
            kwargs |= _image_size(name, image_size)
        try:
            model = torchvision.models.get_model(name, num_classes=num_classes or 1000, **kwargs)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise ModelError(f"torchvision/{name} cannot be built with these arguments: {error}") from error
        head_name = _head_name(model)
        if in_channels != 3:
            _replace_first_conv(model, in_channels)
        super().__init__(model, [model.get_submodule(head_name)], in_channels, num_classes)
        if num_classes == 0:
            model.set_submodule(head_name, nn.Identity())
        self.name = name
        if weights is not None:
            print(*load_weights(self, weights), sep="\n")

    @staticmethod
    def names() -> list[str]:
        return torchvision.models.list_models(module=torchvision.models)

    def convert_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        # DenseNet: keys of 2017. Inception, GoogLeNet: the auxiliary heads.
        renamed = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key): v for key, v in state.items()}
        return {key: value for key, value in renamed.items() if not key.startswith(("aux1.", "aux2.", "AuxLogits."))}


def _image_size(name: str, size: int | tuple[int, int]) -> dict[str, Any]:
    height, width = (size, size) if isinstance(size, int) else size
    if name.startswith("maxvit_"):
        return {"input_size": (height, width)}
    if height != width:
        raise ModelError(f"torchvision/{name} requires square images, got image_size={size}")
    return {"image_size": height}


def _head_name(model: nn.Module) -> str:
    """Return the name of the last linear layer; SqueezeNet's is a convolution."""
    kind = nn.Conv2d if isinstance(model, SqueezeNet) else nn.Linear
    return [name for name, module in model.named_modules() if isinstance(module, kind)][-1]


def _replace_first_conv(model: nn.Module, in_channels: int) -> None:
    name, old = next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    model.set_submodule(name, new)

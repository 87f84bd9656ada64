"""Every image classifier of torchvision as a Network."""

import re
from typing import Any

import torchvision.models
from torch import Tensor, nn

from reslab.models import ModelError
from reslab.models.library import LibraryNetwork
from reslab.models.zoo import load_weights, nearest


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
            # Auxiliary heads return a tuple in training. The published weights require the input transform: always use
            # it, so that a network does not depend on where its weights came from.
            kwargs = {"aux_logits": False, "init_weights": True, "transform_input": in_channels == 3, **kwargs}
        if image_size is not None:
            height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
            if name.startswith("maxvit_"):
                kwargs["input_size"] = (height, width)
            elif name.startswith("vit_"):  # requires square images, and checks it in forward
                kwargs["image_size"] = height
        try:
            model = torchvision.models.get_model(name, num_classes=num_classes or 1000, **kwargs)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise ModelError(f"torchvision/{name} cannot be built with these arguments: {error}") from error
        if in_channels != 3:
            _change_channels(model, in_channels)
        super().__init__(model, [model], in_channels, num_classes)
        if num_classes == 0:
            model.set_submodule(self._head_names[0], nn.Identity())
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


def _change_channels(model: nn.Module, in_channels: int) -> None:
    conv = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    conv.in_channels = in_channels
    conv.weight = nn.Parameter(conv.weight.new_empty(conv.out_channels, in_channels, *conv.kernel_size))
    conv.reset_parameters()

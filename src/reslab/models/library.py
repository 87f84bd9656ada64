"""Every image classifier of timm (`pip install 'reslab[timm]'`) and torchvision as a Network."""

import os
import re
import sys
from typing import Any
from unittest.mock import patch

import torch
import torchvision.models
from torch import Tensor, nn

from reslab.errors import UserError
from reslab.models import ModelError
from reslab.models.network import Network
from reslab.models.zoo import load_weights, nearest

BUILD_ERRORS = (TypeError, ValueError, AssertionError, RuntimeError, AttributeError, KeyError)
# Arguments of timm.create_model that name files or addresses to load weights from.
REMOTE_KWARGS = {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"}


class LibraryNetwork(Network):
    """A classifier of another library: held as `model`, and run as it is.

    In the state dict, the library's keys have the prefix `model.`; `load_weights` adds and removes it.

    Args:
        model: Maps images to logits.
        heads: One module that ends with the layer that gives the logits, or several whose outputs the model averages.
        in_channels, num_classes: As in `Network`.
    """

    def __init__(self, model: nn.Module, heads: list[nn.Module], in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.in_channels, self.num_classes = in_channels, num_classes
        self.model = model
        # Some heads begin with a norm or a pooling.
        heads = [[head, *(m for m in head.modules() if isinstance(m, nn.Linear | nn.Conv2d))][-1] for head in heads]
        # Names, not modules: a module may be replaced (SyncBatchNorm, FSDP2).
        self._head_names = [name for name, module in model.named_modules() if any(module is head for head in heads)]
        inputs = getattr(heads[0], "in_features", None) or getattr(heads[0], "in_channels", None)
        self.num_features = int(inputs or getattr(model, "head_hidden_size", model.num_features))  # type: ignore[arg-type]

    @property
    def head(self) -> nn.Module:  # type: ignore[override]
        heads = [self.model.get_submodule(name) for name in self._head_names]
        return heads[0] if len(heads) == 1 else nn.ModuleList(heads)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the inputs of the head: (N, in_channels, H, W) -> (N, num_features).

        The head of a few models is a convolution. Then a feature is the mean over the positions.
        """
        features: list[Tensor] = []
        first = self.model.get_submodule(self._head_names[0])
        with first.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0])):
            self.model(x)
        return features[0].mean((2, 3)) if features[0].ndim == 4 else features[0]

    def convert_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a published state dict by the keys (and for the image size) of this version of the library."""
        return state


class TimmNetwork(LibraryNetwork):
    """A network of timm: (N, in_channels, H, W) -> (N, num_classes).

    Args:
        name: Name in timm, with or without a tag for the pretrained weights: resnet10t, convnext_atto.d2_in1k. `reslab
            list models timm` prints all of them.
        pretrained: Start from timm's weights. They are downloaded once, to the cache of the Hugging Face hub.
        num_classes: Outputs of the head; 0 for features. With another number than the weights have, the head is new.
        in_channels: Channels of the images. With another number, timm adapts the first convolution of the weights.
        image_size: Height and width of the images, for architectures that depend on them, such as ViT; others ignore
            them. By default the size that timm states for the model.
        allow_remote: Allow names with a scheme (hf-hub:, local-dir:) and arguments that name a file or address.
        kwargs: Further arguments of the architecture: drop_path_rate=0.1. In a config they are in `dict_kwargs`.

    Raises:
        ModelError: Unknown or refused name, impossible arguments, or weights that cannot be downloaded.
        UserError: timm is not installed.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        image_size: int | tuple[int, int] | None = None,
        allow_remote: bool = False,
        **kwargs: Any,
    ) -> None:
        timm = _import_timm()
        _check_timm_name(name, allow_remote, kwargs)
        options = {"num_classes": num_classes, "in_chans": in_channels, **kwargs}
        try:
            # torch.load then refuses pickles with code, also where timm or torch.hub asks for weights_only=False.
            with patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"):
                if image_size is not None and _depends_on_image_size(name):
                    options["img_size"] = image_size
                model = timm.create_model(name, pretrained=pretrained, **options)
        except Exception as error:  # of any kind: huggingface_hub raises those of its HTTP client
            raise ModelError(_explain_timm(name, pretrained, error)) from error
        if not hasattr(model, "get_classifier"):
            raise ModelError(f"timm/{name} is not a classifier with these arguments: remove features_only")
        head = model.get_classifier()
        heads = list(head) if isinstance(head, tuple | list | nn.ModuleList) else [head]
        super().__init__(model, heads, in_channels, num_classes)

    @staticmethod
    def names() -> list[str]:
        return _import_timm().list_models()

    def convert_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        convert = getattr(sys.modules[type(self.model).__module__], "checkpoint_filter_fn", None)
        return convert(state, self.model) if convert else state


def _import_timm() -> Any:
    try:
        import timm
    except ModuleNotFoundError:
        raise UserError("timm is not installed: pip install 'reslab[timm]'") from None
    return timm


def _check_timm_name(name: str, allow_remote: bool, kwargs: dict[str, Any]) -> None:
    remote = [f"name {name!r}"] if ":" in name else sorted(REMOTE_KWARGS & kwargs.keys())
    if remote and not allow_remote:
        raise ModelError(
            f"{', '.join(remote)} loads a model from outside of timm's own list: "
            "set allow_remote to true if you trust its source"
        )
    base, known = name.partition(".")[0], TimmNetwork.names()
    if ":" not in name and base not in known:
        raise ModelError(f"timm has no model {name!r}{nearest(base, known)}")


def _depends_on_image_size(name: str) -> bool:
    timm = _import_timm()
    if ":" not in name:
        return getattr(timm.models.get_pretrained_cfg(name), "fixed_input_size", False)
    with torch.device("meta"):
        return timm.create_model(name).pretrained_cfg.get("fixed_input_size", False)


def _explain_timm(name: str, pretrained: bool, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if not pretrained or (isinstance(error, BUILD_ERRORS) and not isinstance(error, OSError)):
        return f"timm/{name} cannot be built with these arguments: {reason}"
    config = _import_timm().models.get_pretrained_cfg(name)
    source = config and (f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url)
    return (
        f"the weights of timm/{name} cannot be loaded ({reason}). Download the file yourself from {source or name}, "
        "then set pretrained to false and model.weights to the file"
    )


class TorchvisionNetwork(LibraryNetwork):
    """A network of torchvision.models: (N, in_channels, H, W) -> (N, num_classes).

    Args:
        name: Name in torchvision: mobilenet_v3_small. `reslab list models torchvision` prints all of them.
        weights: Pretrained weights by the name of the enum's member: IMAGENET1K_V1, DEFAULT. They are downloaded once,
            to torch.hub's cache; layers that do not fit are new, as in `load_weights`.
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
        except BUILD_ERRORS as error:
            raise ModelError(f"torchvision/{name} cannot be built with these arguments: {error}") from error
        if in_channels != 3:
            conv = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
            conv.in_channels = in_channels
            conv.weight = nn.Parameter(conv.weight.new_empty(conv.out_channels, in_channels, *conv.kernel_size))
            conv.reset_parameters()
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

"""Every image classifier of timm as a Network: `pip install 'reslab[timm]'`."""

import os
import sys
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from reslab.errors import UserError
from reslab.models import ModelError
from reslab.models.library import LibraryNetwork
from reslab.models.zoo import nearest

BUILD_ERRORS = (TypeError, ValueError, AssertionError, RuntimeError, AttributeError, KeyError)
# Arguments of timm.create_model that name files or addresses to load weights from.
REMOTE_KWARGS = {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"}


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
        _check_name(name, allow_remote, kwargs)
        options = {"num_classes": num_classes, "in_chans": in_channels, **kwargs}
        try:
            # torch.load then refuses pickles with code, also where timm or torch.hub asks for weights_only=False.
            with patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"):
                if image_size is not None and _depends_on_image_size(name):
                    options["img_size"] = image_size
                model = timm.create_model(name, pretrained=pretrained, **options)
        except Exception as error:  # of any kind: huggingface_hub raises those of its HTTP client
            raise ModelError(_explain(name, pretrained, error)) from error
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


def _check_name(name: str, allow_remote: bool, kwargs: dict[str, Any]) -> None:
    remote = [f"name {name!r}"] if ":" in name else sorted(REMOTE_KWARGS & kwargs.keys())
    if remote and not allow_remote:
        raise ModelError(
            f"{', '.join(remote)} loads a model from outside of timm's own list: "
            "set allow_remote to true if you trust its source"
        )
    base = name.partition(".")[0]
    if ":" not in name and base not in TimmNetwork.names():
        raise ModelError(f"timm has no model {name!r}{nearest(base, TimmNetwork.names())}")


def _depends_on_image_size(name: str) -> bool:
    timm = _import_timm()
    if ":" not in name:
        return getattr(timm.models.get_pretrained_cfg(name), "fixed_input_size", False)
    with torch.device("meta"):
        return timm.create_model(name).pretrained_cfg.get("fixed_input_size", False)


def _explain(name: str, pretrained: bool, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if not pretrained or (isinstance(error, BUILD_ERRORS) and not isinstance(error, OSError)):
        return f"timm/{name} cannot be built with these arguments: {reason}"
    config = _import_timm().models.get_pretrained_cfg(name)
    source = config and (f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url)
    return (
        f"the weights of timm/{name} cannot be loaded ({reason}). Download the file yourself from {source or name}, "
        "then set pretrained to false and model.weights to the file"
    )

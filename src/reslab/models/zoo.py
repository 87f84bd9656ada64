"""Networks by name, and pretrained weights.

The names import no torch: `reslab list models` reads VARIANTS alone.
"""

import difflib
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reslab.models import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from reslab.models.resnet import ResNet

_STAGES = {  # blocks a stage: He et al. 2015, table 1
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
}


def _variant(depth: str, *, stem: str = "imagenet", groups: int = 1, width_per_group: int = 64) -> dict[str, Any]:
    block, layers = _STAGES[depth]
    return {
        "block": block,
        "layers": layers,
        "width": 64,
        "stem": stem,
        "shortcut": "identity",
        "groups": groups,
        "width_per_group": width_per_group,
    }


def _cifar_variant(depth: int) -> dict[str, Any]:
    """6n + 2 layers (He et al. 2015, section 4.2): three stages of n basic blocks, option A shortcuts."""
    return {
        "block": "basic",
        "layers": ((depth - 2) // 6,) * 3,
        "width": 16,
        "stem": "cifar",
        "shortcut": "A",
        "groups": 1,
        "width_per_group": 64,
    }


VARIANTS: dict[str, dict[str, Any]] = (
    {name: _variant(name) for name in _STAGES}
    | {f"{name}_cifar": _variant(name, stem="cifar") for name in _STAGES}
    | {f"resnet{depth}": _cifar_variant(depth) for depth in (20, 32, 44, 56, 110)}
    # For a CPU: no block at full resolution, and wider than the paper's where images are small.
    | {"resnet8_fast": {**_cifar_variant(8), "layers": (0, 1, 1, 1), "width": 32, "shortcut": "identity"}}
    | {
        "wide_resnet50_2": _variant("resnet50", width_per_group=128),
        "wide_resnet101_2": _variant("resnet101", width_per_group=128),
        "resnext50_32x4d": _variant("resnet50", groups=32, width_per_group=4),
        "resnext101_32x8d": _variant("resnet101", groups=32, width_per_group=8),
        "resnext101_64x4d": _variant("resnet101", groups=64, width_per_group=4),
    }
)


def list_models() -> list[str]:
    """The names `create_model` knows; it takes resnet<6n+2> for any n besides."""
    return list(VARIANTS)


def create_model(name: str, *, weights: str | Path | None = None, **kwargs: Any) -> "ResNet":
    """A network by its name.

    Args:
        name: One of `list_models()`, or resnet<6n+2>, a CIFAR net of He et al. 2015, section 4.2.
        weights: Pretrained weights, as `load_weights` takes them; its remarks are printed.
        kwargs: Arguments of `ResNet` that differ from the variant's: num_classes=10, shortcut="none".

    Raises:
        ModelError: (a ValueError) Unknown name, impossible kwargs, or weights that do not fit.
    """
    from reslab.models.resnet import ResNet

    cifar = re.fullmatch(r"resnet(\d+)", name)
    if name in VARIANTS:
        variant = VARIANTS[name]
    elif cifar and int(cifar[1]) > 2 and int(cifar[1]) % 6 == 2:
        variant = _cifar_variant(int(cifar[1]))
    else:
        raise ModelError(f"no model is called {name!r}{_nearest(name, VARIANTS)}")
    net = ResNet(**{**variant, **kwargs})
    if weights is not None:
        print(*load_weights(net, weights), sep="\n")
    return net


def load_weights(net: "ResNet", weights: str | Path) -> list[str]:
    """Fill a network with pretrained weights, and say in a line or two what was loaded and what is new.

    The head stays as it was initialised where the number of classes differs, the stem's convolution where
    the number of channels does. Anything else that differs is an error.

    Args:
        net: The network; changed in place.
        weights: A file (.safetensors; .pth or .pt, of which tensors alone are read, never code), a run's folder, or
            a name of torchvision's: "IMAGENET1K_V2" (of the network's own variant), "ResNet50_Weights.IMAGENET1K_V2".

    Raises:
        ModelError: No such weights, a file that holds more than weights, or keys or shapes that do not fit
            (all of them are listed).
    """
    if Path(weights).is_dir():
        weights = Path(weights) / "weights.safetensors"
    is_file = Path(weights).is_file() or Path(weights).suffix in (".pth", ".pt", ".ckpt", ".safetensors")
    state = _unwrap(_read_file(Path(weights)) if is_file else _download(net, str(weights)), weights)
    own = net.state_dict()
    messages = [f"weights: {weights}"]
    classes = len(state["fc.weight"]) if "fc.weight" in state else 0
    if classes != net.num_classes:
        state = {key: value for key, value in state.items() if not key.startswith("fc.")}
        state |= {key: value for key, value in own.items() if key.startswith("fc.")}
        fate = "new" if net.num_classes else "left out"
        messages.append(f"the head is {fate}: {classes} classes in {weights}, {net.num_classes} in this network")
    theirs, ours = state.get("conv1.weight", own["conv1.weight"]).shape, own["conv1.weight"].shape
    if theirs != ours and (theirs[:1], theirs[2:]) == (ours[:1], ours[2:]):
        state["conv1.weight"] = own["conv1.weight"]
        messages.append(f"the stem is new: {theirs[1]} channels in {weights}, {ours[1]} in this network")
    try:
        net.load_state_dict(state)
    except RuntimeError as error:  # torch's text lists the missing and unexpected keys and the shapes
        raise ModelError(f"{weights} does not fit this network. {error}") from None
    return messages


def _read_file(file: Path) -> Any:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise ModelError(f"there is no weights file {file}")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).split("WeightsUnpickler error: ")[-1].strip().split("\n")[0]
        raise ModelError(
            f"{file} is not a file of weights alone, and nothing in it was run ({reason}). "
            "Save net.state_dict() with torch.save, or as .safetensors"
        ) from None


def _unwrap(state: Any, source: str | Path) -> "dict[str, Tensor]":
    """The tensors by torchvision's keys, out of a training checkpoint's and the wrappers' names."""
    import torch

    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"{source} holds no state dict (names and tensors): save net.state_dict()")
    return {re.sub(r"^((module|net|model|_orig_mod)\.)+", "", key): value for key, value in state.items()}


def _download(net: "ResNet", name: str) -> Any:
    """Torchvision's weights by their enum's name, from torch.hub's cache or the network."""
    from torchvision.models import get_model_weights

    known: dict[str, Any] = {}
    for variant, kwargs in VARIANTS.items():
        if kwargs["stem"] == "imagenet":
            enum = get_model_weights(variant)
            known |= {f"{enum.__name__}.{version}": weight for version, weight in enum.__members__.items()}
            if all(getattr(net, knob) == value for knob, value in kwargs.items()):
                known |= enum.__members__
    if name not in known:
        raise ModelError(f"no weights for this network are called {name!r}{_nearest(name, known)}")
    weight = known[name]
    try:
        return weight.get_state_dict(progress=True, check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:
        raise ModelError(
            f"{weight} could not be fetched ({error}). Download {weight.url} yourself, and name the file"
        ) from None


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=3)
    return f": did you mean {' or '.join(close)}?" if close else f"; there are {', '.join(names)}"

"""Networks by name, and loading weights into them.

This module does not import torch, so that `reslab list models` is quick.
"""

import difflib
import fnmatch
import importlib
import inspect
import json
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import reslab.models
from reslab.models import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from reslab.models.network import Network

_STAGES = {  # blocks per stage: He et al. 2015, table 1
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
}


_IMAGENET = {"width": 64, "stem": "imagenet", "shortcut": "identity", "groups": 1, "width_per_group": 64}
_CIFAR = {"block": "basic", "width": 16, "stem": "cifar", "shortcut": "A", "groups": 1, "width_per_group": 64}


def _variant(depth: str, **changes: Any) -> dict[str, Any]:
    block, layers = _STAGES[depth]
    return {"block": block, "layers": layers, **_IMAGENET, **changes}


def _cifar_variant(depth: int) -> dict[str, Any]:
    """Return a network of 6n + 2 layers (He et al. 2015, section 4.2): three stages of n blocks."""
    return {**_CIFAR, "layers": ((depth - 2) // 6,) * 3}


VARIANTS: dict[str, dict[str, Any]] = (
    {name: _variant(name) for name in _STAGES}
    | {f"{name}_cifar": _variant(name, stem="cifar") for name in _STAGES}
    | {f"resnet{depth}": _cifar_variant(depth) for depth in (20, 32, 44, 56, 110)}
    # For CPUs: no block at full resolution, and wider than the paper's network where the images are small.
    | {"resnet8_fast": {**_cifar_variant(8), "layers": (0, 1, 1, 1), "width": 32, "shortcut": "identity"}}
    | {
        "wide_resnet50_2": _variant("resnet50", width_per_group=128),
        "wide_resnet101_2": _variant("resnet101", width_per_group=128),
        "resnext50_32x4d": _variant("resnet50", groups=32, width_per_group=4),
        "resnext101_32x8d": _variant("resnet101", groups=32, width_per_group=8),
        "resnext101_64x4d": _variant("resnet101", groups=64, width_per_group=4),
    }
)

LIBRARIES = {"timm": "TimmNetwork", "torchvision": "TorchvisionNetwork"}  # in reslab.models
WEIGHTS_FILE = "weights.safetensors"  # of a run directory
WRAPPERS = re.compile(r"^(module|net|model|_orig_mod)\.")  # DDP, Classifier, LibraryNetwork and others, torch.compile
SHOWN_KEYS = 3  # of each kind of mismatch


def list_models(pattern: str | None = None) -> list[str]:
    """Return the names that `create_model` accepts.

    Args:
        pattern: None for reslab's own names (`create_model` also accepts resnet<6n+2> for any n); timm or torchvision
            for those of a library; or a shell pattern: resnet5*, timm/convnext*.
    """
    library, slash, _ = (pattern or "").partition("/")
    if library not in LIBRARIES:
        return fnmatch.filter(VARIANTS, pattern) if pattern else list(VARIANTS)
    names = [f"{library}/{name}" for name in getattr(reslab.models, LIBRARIES[library]).names()]
    return fnmatch.filter(names, pattern) if slash and pattern else names


def create_model(name: str, *, weights: str | Path | None = None, **kwargs: Any) -> "Network":
    """Build a network by its name.

    Args:
        name: One of `list_models()`; resnet<6n+2>, a CIFAR network of He et al. 2015, section 4.2; timm/NAME; or
            torchvision/NAME.
        weights: Pretrained weights, as `load_weights` accepts them; prints what was loaded.
        kwargs: Arguments of `ResNet` that differ from the variant's (num_classes=10, shortcut="none"), or arguments of
            `TimmNetwork` or `TorchvisionNetwork`.

    Raises:
        ModelError: (a ValueError) Unknown name, impossible kwargs, or weights that do not fit.
    """
    library, _, short = name.partition("/")
    cifar = re.fullmatch(r"resnet(\d+)", name)
    if library in LIBRARIES:
        net = getattr(reslab.models, LIBRARIES[library])(short, **kwargs)
    elif name in VARIANTS:
        net = reslab.models.ResNet(**{**VARIANTS[name], **kwargs})
    elif cifar and int(cifar[1]) > 2 and int(cifar[1]) % 6 == 2:
        net = reslab.models.ResNet(**{**_cifar_variant(int(cifar[1])), **kwargs})
    else:
        raise ModelError(f"there is no model {name!r}{nearest(name, VARIANTS)}, timm/NAME, torchvision/NAME")
    if weights is not None:
        print(*load_weights(net, weights), sep="\n")
    return net


def load_weights(net: "nn.Module", weights: str | Path) -> list[str]:
    """Load pretrained weights into a network, and return a line or two on what was loaded and what is new.

    The head keeps its initial values if the number of classes differs, and the first convolution if the number of
    channels does. Any other difference is an error. Prefixes of wrappers (module., net., model., _orig_mod.) are
    removed only as far as the network's own keys require.

    Args:
        net: The network; changed in place. A module that is not a `Network` must fit exactly.
        weights: A file (.safetensors; .pth or .pt, from which only tensors are read and no code is run), a run
            directory, or for ResNet and TorchvisionNetwork a name in torchvision: IMAGENET1K_V2 (of the same network),
            ResNet50_Weights.IMAGENET1K_V2.

    Raises:
        ModelError: No such weights, a file that holds more than weights, or keys or shapes that do not fit.
    """
    from reslab.models.network import Network

    if Path(weights).is_dir():
        weights = Path(weights) / WEIGHTS_FILE
    is_file = Path(weights).is_file() or Path(weights).suffix in (".pth", ".pt", ".ckpt", ".safetensors")
    state = _tensors(_read_file(Path(weights)) if is_file else _download(net, str(weights)), weights)
    state, resized = _rename(net, state)
    messages = [f"weights: {weights}"]
    if resized:
        messages.append(f"resized to this image size: {', '.join(resized)}")
    if isinstance(net, Network):
        messages += _keep_new_layers(net, state, str(weights))
    _load(net, state, weights)
    return messages


def network_of_run(run_dir: str | Path, **overrides: Any) -> "Network":
    """Build the network of a finished run, with the weights that the run tested.

    Class count, channels and image size are those of the run's data.

    Args:
        run_dir: The run directory: config.yaml, manifest.json and weights.safetensors.
        overrides: Arguments of the network that differ from the config's.

    Raises:
        ModelError: The run is not finished, or its network is not a class of reslab: anything else is not imported.
    """
    import torch

    run_dir = Path(run_dir)
    try:
        leaf = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))["model"]["net"]
        data = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))["data"]
        class_path, init_args = leaf["class_path"], {**leaf.get("init_args", {}), **leaf.get("dict_kwargs", {})}
        channels, size, _ = data["image_shape"]
        from_data = {"num_classes": len(data["class_names"]), "in_channels": channels, "image_size": size}
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ModelError(f"{run_dir} is not a finished run of one network: {error!r}") from None
    cls = _network_class(class_path)
    known = inspect.signature(cls).parameters
    init_args |= {name: value for name, value in from_data.items() if name in known}
    init_args |= {name: value for name, value in {"pretrained": False, "weights": None}.items() if name in known}
    with torch.random.fork_rng(devices=[]):  # what is built next must not depend on this network's initialization
        net = cls(**{**init_args, **overrides})
    _load(net, _tensors(_read_file(run_dir / WEIGHTS_FILE), run_dir), run_dir)
    return net


def _network_class(class_path: str) -> "type[Network]":
    from reslab.models.network import Network

    module, _, name = class_path.rpartition(".")
    if not module and name in reslab.models.__all__:
        module = "reslab.models"
    if module.partition(".")[0] != "reslab":
        raise ModelError(f"network {class_path!r} is not a class of reslab, and is not imported")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise ModelError(f"there is no class {class_path!r}") from None
    if not (isinstance(cls, type) and issubclass(cls, Network)):
        raise ModelError(f"{class_path} is not a subclass of reslab.models.Network")
    return cls


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
            f"{file} is not a file of weights only; no code in it was run ({reason}). "
            "Save net.state_dict() with torch.save, or as .safetensors"
        ) from None


def _tensors(content: Any, source: str | Path) -> "dict[str, Tensor]":
    """Return the state dict inside a file's content, such as a training checkpoint."""
    import torch

    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ModelError(f"{source} holds no state dict (names and tensors): save net.state_dict()")
    return dict(content)


def _rename(net: "nn.Module", state: "dict[str, Tensor]") -> "tuple[dict[str, Tensor], list[str]]":
    """Return the state by the network's own keys, and the keys whose tensors the library resized to the image size."""
    from reslab.models.library import LibraryNetwork

    prefix = "model." if isinstance(net, LibraryNetwork) else ""
    own = {key.removeprefix(prefix): value.shape for key, value in net.state_dict().items()}
    state = max(_unwrapped(state), key=lambda candidate: len(candidate.keys() & own.keys()))  # the first of equals
    shapes = {key: value.shape for key, value in state.items()}
    if isinstance(net, LibraryNetwork) and shapes != own:
        state = net.convert_state(state)
    resized = [prefix + key for key, value in state.items() if shapes.get(key, value.shape) != value.shape]
    return {prefix + key: value for key, value in state.items()}, resized


def _unwrapped(state: "dict[str, Tensor]") -> "Iterator[dict[str, Tensor]]":
    """Yield the state with its keys as they are, then with one wrapper's prefix less each time."""
    while True:
        yield state
        shorter = {WRAPPERS.sub("", key): value for key, value in state.items()}
        if shorter.keys() == state.keys() or len(shorter) < len(state):
            return
        state = shorter


def _keep_new_layers(net: "Network", state: "dict[str, Tensor]", source: str) -> list[str]:
    """Put the network's own head or first convolution into the state where the class or channel count differs."""
    own, messages = net.state_dict(), []
    heads = {*net.head.modules()}
    prefixes = tuple(f"{name}." for name, module in net.named_modules() if module in heads)
    ours, theirs = ([key for key in keys if key.startswith(prefixes)] for keys in (own, state))
    classes = len(state[(ours or theirs)[-1]]) if theirs else 0
    if classes != net.num_classes:
        for key in theirs:
            del state[key]
        state |= {key: own[key] for key in ours}
        fate = "new" if net.num_classes else "left out"
        messages.append(f"the head is {fate}: {classes} classes in {source}, {net.num_classes} in this network")
    for key in _stem_keys(net):
        shape, wanted = state.get(key, own[key]).shape, own[key].shape
        if shape != wanted and (shape[:1], shape[2:]) == (wanted[:1], wanted[2:]):
            state[key] = own[key]
            messages.append(f"the stem is new: {shape[1]} channels in {source}, {wanted[1]} in this network")
    return messages


def _stem_keys(net: "Network") -> list[str]:
    """Return the keys of the first convolution's weight, or of several side by side."""
    from torch import nn

    first = next(iter(net.layer_groups().values()))
    inside = {module for layer in first if isinstance(layer, nn.Module) for module in layer.modules()}
    convs = {name: m for name, m in net.named_modules() if isinstance(m, nn.Conv2d) and m in inside}
    return [f"{name}.weight" for name, conv in convs.items() if conv.in_channels == net.in_channels]


def _load(net: "nn.Module", state: "dict[str, Tensor]", source: str | Path) -> None:
    own = net.state_dict()
    # Files of before 2018 have no num_batches_tracked; torch fills it in.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} {list(state[key].shape)} in the file, {list(own[key].shape)} in the network"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if missing or unexpected or shapes:
        name = f"{type(net).__name__} {getattr(net, 'name', '')}".strip()
        lines = [f"{source} does not fit this network", f"file: {_size(state)}", f"network: {name}, {_size(own)}"]
        for kind, keys in (("missing in the file", missing), ("only in the file", unexpected), ("other shape", shapes)):
            if keys:
                more = ", …" if len(keys) > SHOWN_KEYS else ""
                lines.append(f"{kind} ({len(keys)}): {', '.join(keys[:SHOWN_KEYS])}{more}")
        raise ModelError("\n  ".join(lines))
    net.load_state_dict(state)


def _size(state: "Mapping[str, Tensor]") -> str:
    return f"{len(state)} tensors, {sum(value.numel() for value in state.values()):,} values"


def _download(net: "nn.Module", name: str) -> Any:
    """Return torchvision's weights by their enum's name, from torch.hub's cache or the network."""
    known = _published(net)
    if name not in known:
        none = "; there are none for it by name: give a file or a run directory"
        raise ModelError(f"no weights for this network are called {name!r}{nearest(name, known) if known else none}")
    weight = known[name]
    try:
        return weight.get_state_dict(progress=True, check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ModelError(
            f"{weight} could not be downloaded ({error}). Download {weight.url} yourself, and give the file"
        ) from None


def _published(net: "nn.Module") -> dict[str, Any]:
    """Return torchvision's weights for this kind of network, by the names a user may give."""
    from torchvision.models import get_model_weights

    from reslab.models.resnet import ResNet
    from reslab.models.torchvision import TorchvisionNetwork

    fits: dict[str, bool] = {}  # name in torchvision: whether the network is just this one
    if isinstance(net, TorchvisionNetwork):
        fits = {net.name: True}
    elif isinstance(net, ResNet):
        for variant, kwargs in VARIANTS.items():
            if kwargs["stem"] == "imagenet":
                fits[variant] = all(getattr(net, key) == value for key, value in kwargs.items())
    known: dict[str, Any] = {}
    for variant, same in fits.items():
        enum = get_model_weights(variant)
        known |= {f"{enum.__name__}.{version}": weight for version, weight in enum.__members__.items()}
        known |= enum.__members__ if same else {}
    return known


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the end of a message on an unknown name: up to three similar names, or all of them."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=3)
    if close:
        return f": did you mean {' or '.join(close)}?"
    return f"; there are {', '.join(names[:40])}{', …' if len(names) > 40 else ''}"

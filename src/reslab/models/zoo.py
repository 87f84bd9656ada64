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
import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import reslab.models
from reslab.models import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from reslab.models.network import Network

_IMAGENET = {"width": 64, "stem": "imagenet", "shortcut": "identity", "groups": 1, "width_per_group": 64}
_RESNETS: dict[str, dict[str, Any]] = {  # He et al. 2015, table 1
    "resnet18": {"block": "basic", "layers": (2, 2, 2, 2), **_IMAGENET},
    "resnet34": {"block": "basic", "layers": (3, 4, 6, 3), **_IMAGENET},
    "resnet50": {"block": "bottleneck", "layers": (3, 4, 6, 3), **_IMAGENET},
    "resnet101": {"block": "bottleneck", "layers": (3, 4, 23, 3), **_IMAGENET},
    "resnet152": {"block": "bottleneck", "layers": (3, 8, 36, 3), **_IMAGENET},
}


def _cifar_variant(depth: int) -> dict[str, Any]:
    """Return a network of 6n + 2 layers (He et al. 2015, section 4.2): three stages of n blocks."""
    layers = ((depth - 2) // 6,) * 3
    return {**_RESNETS["resnet18"], "layers": layers, "width": 16, "stem": "cifar", "shortcut": "A"}


VARIANTS: dict[str, dict[str, Any]] = {
    **_RESNETS,
    **{f"{name}_cifar": {**kwargs, "stem": "cifar"} for name, kwargs in _RESNETS.items()},
    **{f"resnet{depth}": _cifar_variant(depth) for depth in (20, 32, 44, 56, 110)},
    # For CPUs: no block at full resolution, and wider than the paper's network where the images are small.
    "resnet8_fast": {**_cifar_variant(8), "layers": (0, 1, 1, 1), "width": 32, "shortcut": "identity"},
    "wide_resnet50_2": {**_RESNETS["resnet50"], "width_per_group": 128},
    "wide_resnet101_2": {**_RESNETS["resnet101"], "width_per_group": 128},
    "resnext50_32x4d": {**_RESNETS["resnet50"], "groups": 32, "width_per_group": 4},
    "resnext101_32x8d": {**_RESNETS["resnet101"], "groups": 32, "width_per_group": 8},
    "resnext101_64x4d": {**_RESNETS["resnet101"], "groups": 64, "width_per_group": 4},
}

LIBRARIES = {"timm": "TimmNetwork", "torchvision": "TorchvisionNetwork"}  # in reslab.models
WEIGHTS_FILE = "weights.safetensors"  # of a run directory
WRAPPERS = re.compile(r"^(module|net|model|_orig_mod)\.")  # DDP, Classifier, LibraryNetwork and others, torch.compile


def list_models(pattern: str | None = None) -> list[str]:
    """Return the names that `create_model` accepts.

    Args:
        pattern: None for reslab's own names (`create_model` also accepts resnet<6n+2> for any n); timm or torchvision
            for those of a library; or a shell pattern: resnet5*, timm/convnext*.
    """
    pattern = f"{pattern}/*" if pattern in LIBRARIES else pattern or "*"
    library, slash, _ = pattern.partition("/")
    names = list(VARIANTS)
    if slash and library in LIBRARIES:
        names = [f"{library}/{name}" for name in getattr(reslab.models, LIBRARIES[library]).names()]
    return fnmatch.filter(names, pattern)


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
    file = Path(weights) / WEIGHTS_FILE if Path(weights).is_dir() else Path(weights)
    is_file = file.is_file() or file.suffix in (".pth", ".pt", ".ckpt", ".safetensors")
    state, resized = _rename(net, _read_file(file) if is_file else _download(net, str(weights)))
    source = str(file)
    messages = [f"weights: {source}"]
    if resized:
        messages.append(f"resized to this image size: {', '.join(resized)}")
    if isinstance(net, reslab.models.Network):
        messages += _keep_new_layers(net, state, source)
    _load(net, state, source)
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
        fixed = {"num_classes": len(data["class_names"]), "in_channels": channels, "image_size": size}
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ModelError(f"{run_dir} is not a finished run of one network: {error!r}") from None
    cls = _network_class(class_path)
    fixed |= {"pretrained": False, "weights": None}
    init_args |= {name: fixed[name] for name in inspect.signature(cls).parameters if name in fixed}
    with torch.random.fork_rng(devices=[]):  # what is built next must not depend on this network's initialization
        net = cls(**{**init_args, **overrides})
    _load(net, _read_file(run_dir / WEIGHTS_FILE), str(run_dir))
    return net


def _network_class(class_path: str) -> "type[Network]":
    module, _, name = class_path.rpartition(".")
    if module.partition(".")[0] not in ("", "reslab"):
        raise ModelError(f"network {class_path!r} is not a class of reslab, and is not imported")
    try:
        cls = getattr(importlib.import_module(module or "reslab.models"), name)
    except (ImportError, AttributeError):
        raise ModelError(f"reslab has no class {class_path!r}") from None
    if not (isinstance(cls, type) and issubclass(cls, reslab.models.Network)):
        raise ModelError(f"{class_path} is not a subclass of reslab.models.Network")
    return cls


def _read_file(file: Path) -> "dict[str, Tensor]":
    """Return the state dict in a file: the content, or the part of a training checkpoint."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise ModelError(f"there is no weights file {file}")
    try:
        is_pickle = file.suffix != ".safetensors"
        state = torch.load(file, map_location="cpu", weights_only=True) if is_pickle else load_file(file)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).split("WeightsUnpickler error: ")[-1].strip().split("\n")[0]
        raise ModelError(
            f"{file} is not a file of weights only; no code in it was run ({reason}). "
            "Save net.state_dict() with torch.save, or as .safetensors"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"{file} holds no state dict (names and tensors): save net.state_dict()")
    return dict(state)


def _rename(net: "nn.Module", state: "dict[str, Tensor]") -> "tuple[dict[str, Tensor], list[str]]":
    """Return the state by the network's own keys, and the keys whose tensors the library resized to the image size."""
    from reslab.models.library import LibraryNetwork

    prefix = "model." if isinstance(net, LibraryNetwork) else ""
    own = {key.removeprefix(prefix): value.shape for key, value in net.state_dict().items()}
    candidates = [state]
    while any(map(WRAPPERS.match, candidates[-1])):
        candidates.append({WRAPPERS.sub("", key): value for key, value in candidates[-1].items()})
    state = max(candidates, key=lambda candidate: len(candidate.keys() & own.keys()))  # the first of equals
    shapes = {key: value.shape for key, value in state.items()}
    if isinstance(net, LibraryNetwork) and shapes != own:
        state = net.convert_state(state)
    resized = [prefix + key for key, value in state.items() if shapes.get(key, value.shape) != value.shape]
    return {prefix + key: value for key, value in state.items()}, resized


def _keep_new_layers(net: "Network", state: "dict[str, Tensor]", source: str) -> list[str]:
    """Put the network's own head or first convolution into the state where the class or channel count differs."""
    from reslab.models.network import params

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
    stem = params(next(iter(net.layer_groups().values())))
    for key, p in net.named_parameters():  # one first convolution, or several side by side
        loaded = state.get(key, p).shape
        is_first = p in stem and p.ndim == 4 and p.shape[1] == net.in_channels
        if is_first and loaded != p.shape and (loaded[:1], loaded[2:]) == (p.shape[:1], p.shape[2:]):
            state[key] = own[key]
            messages.append(f"the stem is new: {loaded[1]} channels in {source}, {net.in_channels} in this network")
    return messages


def _load(net: "nn.Module", state: "dict[str, Tensor]", source: str) -> None:
    own = net.state_dict()
    differences = {
        # Files of before 2018 have no num_batches_tracked; torch fills it in.
        "missing in the file": [k for k in own if k not in state and not k.endswith("num_batches_tracked")],
        "only in the file": [k for k in state if k not in own],
        "other shape": [
            f"{k} {list(state[k].shape)} in the file, {list(v.shape)} in the network"
            for k, v in own.items()
            if k in state and state[k].shape != v.shape
        ],
    }
    if any(differences.values()):
        lines = [f"{source} does not fit this network"]
        for name, tensors in (("file", state), (f"network ({type(net).__name__})", own)):
            lines.append(f"{name}: {len(tensors)} tensors, {sum(v.numel() for v in tensors.values()):,} values")
        for kind, keys in differences.items():
            if keys:
                lines.append(f"{kind} ({len(keys)}): {textwrap.shorten(', '.join(keys), 200, placeholder=' …')}")
        raise ModelError("\n  ".join(lines))
    net.load_state_dict(state)


def _download(net: "nn.Module", name: str) -> "dict[str, Tensor]":
    """Return torchvision's weights by their enum's name, from torch.hub's cache or the network."""
    known = _published(net)
    if name not in known:
        hint = nearest(name, known) if known else "; there are none for it by name: give a file or a run directory"
        raise ModelError(f"no weights for this network are called {name!r}{hint}")
    weight = known[name]
    try:
        return dict(weight.get_state_dict(progress=True, check_hash=True, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ModelError(
            f"{weight} could not be downloaded ({error}). Download {weight.url} yourself, and give the file"
        ) from None


def _published(net: "nn.Module") -> dict[str, Any]:
    """Return torchvision's weights for this kind of network, by the names a user may give."""
    from torchvision.models import get_model_weights

    fits: dict[str, bool] = {}  # name in torchvision: whether the network is just this one
    if isinstance(net, reslab.models.TorchvisionNetwork):
        fits = {net.name: True}
    elif isinstance(net, reslab.models.ResNet):
        imagenet = {name: kwargs for name, kwargs in VARIANTS.items() if kwargs["stem"] == "imagenet"}
        fits = {name: all(getattr(net, k) == v for k, v in kwargs.items()) for name, kwargs in imagenet.items()}
    known: dict[str, Any] = {}
    for name, same in fits.items():
        enum = get_model_weights(name)
        known |= {f"{enum.__name__}.{version}": weight for version, weight in enum.__members__.items()}
        known |= enum.__members__ if same else {}
    return known


def nearest(name: str, names: Collection[str]) -> str:
    """Return the end of a message on an unknown name: up to three similar names, or the first of them."""
    close = difflib.get_close_matches(name, names, n=3)
    if close:
        return f": did you mean {' or '.join(close)}?"
    return f"; there are {textwrap.shorten(', '.join(names), 600, placeholder=' …')}"

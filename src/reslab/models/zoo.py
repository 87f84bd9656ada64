"""Networks by name, and loading weights into them.

This module does not import torch, so that `reslab list models` is quick.
"""

import difflib
import fnmatch
import importlib
import inspect
import json
import os
import pickle
import re
import textwrap
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

import reslab.models
from reslab.files import sha256_file
from reslab.models import ModelError

if TYPE_CHECKING:
    import torch
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
HUB = "hf://"  # begins an address on the Hugging Face Hub


def list_models(pattern: str | None = None) -> list[str]:
    """Return the names that `create_model` accepts.

    Args:
        pattern: None for reslab's own names (`create_model` also accepts resnet<6n+2> for any n); timm or torchvision
            for those of a library; or a shell pattern: `resnet5*`, `timm/convnext*`.
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
    """Load pretrained weights into a network, and return a few lines on what was loaded, left out and new.

    A file may be a training checkpoint of another project: the tensors whose names fit the network best are loaded,
    below any key and prefix; of several that fit equally, an EMA. The head keeps its initial values if the number of
    classes differs, and the first convolution if the number of channels does. Any other difference is an error.

    Args:
        net: The network; changed in place. A module that is not a `Network` must fit exactly.
        weights: A file (.safetensors, or any file of torch.save, from which only tensors are read and no code is run),
            a run directory, `hf://OWNER/NAME[@REVISION][/FILE]` for a file of the Hugging Face Hub, or for ResNet and
            TorchvisionNetwork a name in torchvision: IMAGENET1K_V2 (of the same network),
            ResNet50_Weights.IMAGENET1K_V2.

    Raises:
        ModelError: No such weights, a file that cannot be read without running code, or names or shapes that do not
            fit.
    """
    source = find_weights(weights)
    states = _read_states(source.file) if source.file else {"": _download(net, source.name)}
    state, messages = _select(net, states, source.name)
    if isinstance(net, reslab.models.Network):
        messages += _keep_new_layers(net, state, source.name)
    load_state(net, state, source.name)
    return messages


class WeightsSource(NamedTuple):
    """Where pretrained weights are.

    Attributes:
        name: The file; hf://OWNER/NAME@COMMIT/FILE on the Hugging Face Hub; or a name in torchvision.
        file: The file, in the cache if it is of the Hub; None for a name in torchvision.
    """

    name: str
    file: Path | None

    def record(self) -> dict[str, str]:
        """Return what identifies the weights, for a manifest."""
        record = {"source": self.name}
        if self.name.startswith(HUB):
            record["revision"] = self.name.partition("@")[2].partition("/")[0]
        return {**record, "sha256": sha256_file(self.file)} if self.file else record


def find_weights(weights: str | Path) -> WeightsSource:
    """Return where the weights are that `load_weights` would load, downloaded if they are on the Hugging Face Hub."""
    if str(weights).startswith(HUB):
        from reslab.models.weights import hub_file

        return WeightsSource(*hub_file(str(weights)))
    if "://" in str(weights):
        raise ModelError(f"weights must be a file: download {weights} yourself, and give the file")
    path = Path(os.path.expanduser(weights))  # noqa: PTH111 - Path raises for an unknown user, and for a long name below
    if not os.path.exists(path) and not _is_path(str(weights)):  # noqa: PTH110
        return WeightsSource(str(weights), None)
    file = path / WEIGHTS_FILE if os.path.isdir(path) else path  # noqa: PTH112
    return WeightsSource(str(file), file)


def _is_path(weights: str) -> bool:
    """Whether this is not a name of torchvision's: DEFAULT, ResNet18_Weights.DEFAULT."""
    return not re.fullmatch(r"(\w+_Weights\.)?\w+", weights)


def _read_states(file: Path) -> "dict[str, dict[str, Tensor]]":
    from reslab.models.weights import read_states

    return read_states(file)


def network_of_run(run_dir: str | Path, **overrides: Any) -> "Network":
    """Build the network of a finished run, with the weights that the run tested.

    Class count, channels and image size are those of the run's data.

    Args:
        run_dir: The run directory: config.yaml, manifest.json and weights.safetensors.
        overrides: Arguments of the network that differ from the config's.

    Raises:
        ModelError: The run is not finished, or its network is not a class of reslab: anything else is not imported.
    """
    net = build_network_of_run(run_dir, **overrides)
    load_state(net, _read_states(Path(run_dir) / WEIGHTS_FILE)[""], str(run_dir))
    return net


def build_network_of_run(run_dir: str | Path, **overrides: Any) -> "Network":
    """Build the network of a run, as `network_of_run`, without loading weights: the run need not be finished."""
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
        return cls(**{**init_args, **overrides})


def create_from_config(path: Path, **shape: Any) -> "Network":
    """Build the network that a config file describes (`class_path`, `init_args`); `shape` as far as it accepts it."""
    leaf = yaml.safe_load(path.read_text(encoding="utf-8"))
    cls = _network_class(leaf["class_path"])
    shape = {name: shape[name] for name in inspect.signature(cls).parameters if name in shape}
    return cls(**{**leaf.get("init_args", {}), **leaf.get("dict_kwargs", {}), **shape})


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


def _select(
    net: "nn.Module", states: "dict[str, dict[str, Tensor]]", source: str
) -> "tuple[dict[str, Tensor], list[str]]":
    """Return the tensors for a network by its own keys, and messages on where they are in the file."""
    from reslab.models.library import LibraryNetwork
    from reslab.models.weights import find_branch, left_out, take_head

    inner = "model." if isinstance(net, LibraryNetwork) else ""
    expected = {key.removeprefix(inner): value.shape for key, value in net.state_dict().items()}
    branch, rivals = find_branch(expected, states)
    shapes = {key: value.shape for key, value in branch.state.items()}
    if isinstance(net, LibraryNetwork) and shapes != expected:
        branch = branch._replace(state=net.convert_state(branch.state))
    head = {key.removeprefix(inner): shape for key, shape in _head_shapes(net).items()}
    head_state = take_head(branch, expected, head)
    state = {**branch.state, **head_state}
    rest = left_out(branch, rivals, state)
    is_choice = branch.name and (branch.is_average or rest)
    messages = [f"weights: {branch.label} of {source}" if is_choice else f"weights: {source}"]
    if rest:
        messages.append(f"left out: {', '.join(rest)}")
    resized = [inner + key for key, value in state.items() if shapes.get(key, value.shape) != value.shape]
    if resized:
        messages.append(f"resized to this image size: {', '.join(resized)}")
    return {inner + key: value for key, value in state.items()}, messages


def _head_keys(net: "nn.Module", keys: Iterable[str]) -> list[str]:
    """Return the keys of a network's head; none if it is no `Network`."""
    heads = {*net.head.modules()} if isinstance(net, reslab.models.Network) else set()
    prefixes = tuple(f"{name}." for name, module in net.named_modules() if module in heads)
    return [key for key in keys if key.startswith(prefixes)]


def _head_shapes(net: "nn.Module") -> "dict[str, torch.Size]":
    """Return the shapes of a network's head by key; of a network without a head, those that it would have."""
    import torch

    tensors = net.state_dict()
    shapes = {key: tensors[key].shape for key in _head_keys(net, tensors)}
    if not shapes and isinstance(net, reslab.models.Network):
        names = [name for name, module in net.named_modules() if module is net.head]
        ends = {"weight": (0, net.num_features), "bias": (0,)}
        shapes = {f"{name}.{end}": torch.Size(shape) for name in names for end, shape in ends.items()}
    return shapes


def _keep_new_layers(net: "Network", state: "dict[str, Tensor]", source: str) -> list[str]:
    """Put the network's own head or first convolution into the state where the class or channel count differs."""
    from reslab.models.network import params

    current, messages = net.state_dict(), []
    ours, theirs = _head_keys(net, current), _head_keys(net, state)
    classes = len(state[theirs[-1]]) if theirs else 0
    same_layers = not (ours and theirs) or {*ours} == {*theirs}
    if classes != net.num_classes or not same_layers:
        fate = "new" if net.num_classes else "left out"
        sides = (f"{classes} classes", str(net.num_classes)) if same_layers else (", ".join(theirs), ", ".join(ours))
        messages.append(f"the head is {fate}: {sides[0]} in {source}, {sides[1]} in this network")
        for key in theirs:
            del state[key]
        state |= {key: current[key] for key in ours}
    stem = params(next(iter(net.layer_groups().values())))
    for key, p in net.named_parameters():  # one first convolution, or several side by side
        loaded = state.get(key, p).shape
        is_first = p in stem and p.ndim == 4 and p.shape[1] == net.in_channels
        if is_first and loaded != p.shape and (loaded[:1], loaded[2:]) == (p.shape[:1], p.shape[2:]):
            state[key] = current[key]
            messages.append(f"the stem is new: {loaded[1]} channels in {source}, {net.in_channels} in this network")
    return messages


def load_state(net: "nn.Module", state: "Mapping[str, Tensor]", source: str) -> None:
    """Load a state dict by the network's own keys; raise a ModelError as `check_state` does."""
    check_state(net, state, source)
    net.load_state_dict(state)


def check_state(net: "nn.Module", state: "Mapping[str, Tensor]", source: str) -> None:
    """Raise a short ModelError if the names or shapes of a state dict are not those of the network."""
    current = net.state_dict()
    differences = {
        # Files of before 2018 have no num_batches_tracked; torch fills it in.
        "missing in the file": [k for k in current if k not in state and not k.endswith("num_batches_tracked")],
        "only in the file": [k for k in state if k not in current],
        "other shape": [
            f"{k} {list(state[k].shape)} in the file, {list(v.shape)} in the network"
            for k, v in current.items()
            if k in state and state[k].shape != v.shape
        ],
    }
    if any(differences.values()):
        raise ModelError(_misfit(net, state, source, differences))


def _misfit(net: "nn.Module", state: "Mapping[str, Tensor]", source: str, differences: dict[str, list[str]]) -> str:
    from reslab.models.weights import describe_resnets

    if sides := describe_resnets(state, net.state_dict()):
        return f"{source} is ResNet {sides[0]}; this network is {sides[1]}"
    lines = [f"{source} does not fit this network"]
    for name, tensors in (("file", state), (f"network ({type(net).__name__})", net.state_dict())):
        lines.append(f"{name}: {len(tensors)} tensors, {sum(v.numel() for v in tensors.values()):,} values")
    for kind, keys in differences.items():
        if keys:
            lines.append(f"{kind} ({len(keys)}): {textwrap.shorten(', '.join(keys), 200, placeholder=' …')}")
    return "\n  ".join(lines)


def _download(net: "nn.Module", name: str) -> "dict[str, Tensor]":
    """Return torchvision's weights by their enum's name, from torch.hub's cache or the network."""
    known = _published(net)
    if name not in known:
        hint = nearest(name, known) if known else "; there are none for it by name: give a file or a run directory"
        raise ModelError(f"there is no file {name!r}, and no weights for this network have that name{hint}")
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

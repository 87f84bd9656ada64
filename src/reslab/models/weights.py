"""State dicts in checkpoints of any origin: read them without running code, and find the network in them.

A training checkpoint may hold several networks (EMA, momentum encoder, teacher) beside the one to load, below keys
(state_dict, model_ema) and prefixes (module., backbone., encoder_q.) that differ from project to project. No table of
projects is kept: the tensors whose names and shapes fit the network best are its weights.
"""

import os
import pickle
import re
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import torch
from safetensors.torch import load_file
from torch import Tensor

from reslab.models import ModelError

# Classes that training checkpoints hold beside tensors: settings, metrics, paths. They are not imported or called.
METADATA = re.compile(
    r"argparse\.Namespace|collections\.defaultdict|datetime\.\w+|pathlib\.[\w.]*Path|typing\.Any|uuid\.UUID"
    r"|(numpy|omegaconf|torch\.optim)\..+|torchvision\.transforms\.functional\.InterpolationMode"
    r"|bool|complex|dict|float|frozenset|int|list|object|range|slice|str|tuple"  # of builtins
)
# Modules that wrap another one in place: torch.compile, FSDP, activation checkpointing.
WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
HUB_ADDRESS = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/@]+))?(/(?P<file>[^@]+[^/@]))?/?")
HUB_FILES = ("weights.safetensors", "model.safetensors", "pytorch_model.bin")  # of reslab push; of timm and others
AVERAGE = re.compile(r"(^|[._])ema([._]|$)", re.IGNORECASE)


class _Metadata:
    """Stands for an object of a class in METADATA, without its content."""

    def __new__(cls, *args: Any) -> Any:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def _empty_dict(*args: Any) -> dict[Any, Any]:
    return OrderedDict()  # the only mapping that torch lets a pickle fill and give attributes


def read_states(file: Path) -> dict[str, dict[str, Tensor]]:
    """Return all state dicts in a file by their place in it: "" for the content itself, state_dict, model_ema, ...

    Raises:
        ModelError: There is no such file, it needs code to be loaded, or it holds no tensors by name.
    """
    if not os.path.isfile(file):  # noqa: PTH113 - Path raises for a name that is too long
        raise ModelError(f"there is no weights file {file}{_similar_file(file)}")
    try:
        content = load_file(file) if file.suffix == ".safetensors" else _load_pickle(file)
    except Exception as error:  # damaged files raise many types
        reason = str(error).split("WeightsUnpickler error: ")[-1].strip().split("\n")[0].split(". ")[0]
        raise ModelError(
            f"{file} is not a file of weights only; no code in it was run ({reason or type(error).__name__}). "
            "Save net.state_dict() with torch.save, or as .safetensors"
        ) from None
    states = dict(_state_dicts(content))
    if not states:
        raise ModelError(f"{file} holds no state dict (names and tensors): save net.state_dict()")
    return states


def _load_pickle(file: Path) -> Any:
    """Return the content of a file of torch.save, with objects of METADATA replaced by empty ones."""
    empty: dict[str, Any] = {}
    while True:
        try:
            with torch.serialization.safe_globals([(value, name) for name, value in empty.items()]):
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            match = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
            name = match[1] if match else ""
            full = name if "." in name else f"builtins.{name}"  # the message leaves builtins out
            if not METADATA.fullmatch(name) or full in empty:
                raise
            # One class each: torch compares with the values.
            empty[full] = _empty_dict if name == "collections.defaultdict" else _Metadata


def _similar_file(file: Path) -> str:
    from reslab.models.zoo import nearest

    if os.path.isfile(last := file.parent / "checkpoints" / "last.ckpt"):  # noqa: PTH113
        return f": the run is not finished; its last checkpoint is {last}"
    names = [path.name for path in file.parent.iterdir()] if os.path.isdir(file.parent) else []  # noqa: PTH112
    hint = nearest(file.name, names)
    return hint if "did you mean" in hint else ""


def _state_dicts(content: Any, place: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    if not isinstance(content, Mapping):
        return
    named = {key: value for key, value in content.items() if isinstance(key, str)}
    tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
    if tensors:
        yield place, tensors
    for key, value in named.items():
        yield from _state_dicts(value, f"{place}.{key}" if place else key)


class Branch(NamedTuple):
    """The tensors of a state dict below one prefix.

    Attributes:
        name: Place of the state dict in the file, and the prefix.
        state: Tensors by their names without the prefix.
        others: Tensors of the same state dict with other prefixes, by their names without what they share with it.
        siblings: First components of the others, by full name.
        fit: Number of names that are the network's with the same shape, and with any shape.
    """

    name: str
    state: dict[str, Tensor]
    others: dict[str, Tensor]
    siblings: dict[str, str]
    fit: tuple[int, int]

    @property
    def is_average(self) -> bool:
        return bool(AVERAGE.search(self.name))

    @property
    def label(self) -> str:
        return f"{self.name} (EMA)" if self.is_average else self.name or "keys without a prefix"


def find_branch(
    expected: Mapping[str, torch.Size], states: Mapping[str, dict[str, Tensor]]
) -> tuple[Branch, list[Branch]]:
    """Return the branch that fits a network best, and all others of which most of the network fits.

    Of branches that fit equally well, an EMA comes first, since evaluation uses it; then the first in the file, and
    names that fit as they are before names with a prefix.
    """
    branches = [branch for place, state in states.items() for branch in _branches(expected, place, state)]
    some_fit = any(branch.fit[1] for branch in branches)  # if none does, the largest may be converted by its library
    chosen = max(branches, key=lambda b: (*b.fit, b.is_average, 0 if some_fit else len(b.state)))
    return chosen, [b for b in branches if b is not chosen and b.fit[1] >= len(expected) / 2]


def _branches(expected: Mapping[str, torch.Size], place: str, state: dict[str, Tensor]) -> Iterator[Branch]:
    """Yield the branches of a state dict: without a prefix, and with each below which most of a network is found."""
    if not any(map(WRAPPERS.search, expected)):
        state = {WRAPPERS.sub("", key): value for key, value in state.items()}
    names = Counter(key[:i] for key in state for i in _starts(key) if key[i:] in expected)
    least = min(len(expected), len(state)) / 2
    common = _common_prefix([*state]) if not names else ""  # other names throughout: the library may convert them
    prefixes = [*dict.fromkeys(["", common, *(prefix for prefix, count in names.items() if count >= least)])]
    for prefix in prefixes:
        nested = tuple(other for other in prefixes if other.startswith(prefix) and other != prefix)
        inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
                  and (key.removeprefix(prefix) in expected or not key.startswith(nested))}  # fmt: skip
        same = sum(expected.get(key) == value.shape for key, value in inside.items())
        outside = {key: value for key, value in state.items() if key.removeprefix(prefix) not in inside}
        name = f"{place}.{prefix}".strip(".")
        yield Branch(name, inside, *_relative(outside, place, prefix), (same, names[prefix]))


def _relative(outside: Mapping[str, Tensor], place: str, prefix: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return `Branch.others` and `Branch.siblings`."""
    parents = [prefix[:i] for i in reversed(_starts(prefix))]  # module.model., module., ""
    others, siblings = {}, {}
    for key, value in outside.items():
        parent = next(p for p in parents if key.startswith(p))
        name = key.removeprefix(parent)
        first = name.partition(".")[0]
        others[name], siblings[first] = value, f"{place}.{parent}{first}".lstrip(".")
    return others, siblings


def _starts(key: str) -> list[int]:
    return [0, *(match.end() for match in re.finditer(r"\.", key))]


def _common_prefix(keys: Sequence[str]) -> str:
    first, last = min(keys), max(keys)
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    return first[: first.rfind(".", 0, shared) + 1]


def left_out(branch: Branch, rivals: Sequence[Branch], used: Collection[str]) -> list[str]:
    """Return the names of other branches, and of tensors beside the branch that are not used; scalars are counters."""
    unused = {key.partition(".")[0] for key, value in branch.others.items() if key not in used and value.ndim}
    siblings = [name for first, name in branch.siblings.items() if first in unused]
    covered = [f"{rival.name}." for rival in rivals]
    rest = [name for name in siblings if not any(rival.startswith(f"{name}.") for rival in covered)]
    return [*(rival.label for rival in rivals), *rest]


def take_head(branch: Branch, expected: Collection[str], head: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Take the tensors of the network's head from where they are outside of the branch, or have another name.

    Another name (linear, classifier, head.fc) is accepted if it is the only one whose shapes are those of the head,
    apart from the number of classes.

    Args:
        branch: The branch that was found; the head is removed from it.
        expected: The network's keys.
        head: Shapes of the network's head by its keys; with any number of classes.
    """
    if not head or any(key in branch.state for key in head):
        return {}
    elsewhere = {key: branch.others[key] for key in head if key in branch.others}
    if elsewhere:
        return elsewhere if _same_but_classes(elsewhere, head) else {}
    groups: dict[str, dict[str, Tensor]] = {}  # by first component: a head is all of its group
    for key, value in [*branch.state.items(), *branch.others.items()]:
        if key not in expected and value.ndim:
            groups.setdefault(key.partition(".")[0], {})[key] = value
    ends = {key.rpartition(".")[2]: key for key in head}  # weight, bias
    renamed = {name: {ends.get(key.rpartition(".")[2], key): value for key, value in group.items()}
               for name, group in groups.items()}  # fmt: skip
    fits = [name for name, new in renamed.items() if new.keys() == {*head} and len(new) == len(groups[name])
            and _same_but_classes(new, head)]  # fmt: skip
    if len(fits) != 1:
        return {}
    for key in groups[fits[0]]:
        branch.state.pop(key, None)
        branch.others.pop(key, None)
    return renamed[fits[0]]


def _same_but_classes(state: Mapping[str, Tensor], head: Mapping[str, torch.Size]) -> bool:
    return all(value.ndim and value.shape[1:] == head[key][1:] for key, value in state.items())


def describe_resnets(file: Mapping[str, Tensor], network: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Describe two ResNets by their state dicts; None if one is no ResNet, or no difference is known."""
    theirs, ours = _resnet(file), _resnet(network)
    if not theirs or not ours or theirs == ours:
        return None
    shown = [name for name in ours if name in ("layers", "width") or theirs[name] != ours[name]]
    one, other = (", ".join(f"{'' if n == 'layers' else n + ' '}{r[n]}" for n in shown) for r in (theirs, ours))
    return one, other


def _resnet(state: Mapping[str, Tensor]) -> dict[str, Any]:
    state = {key.removeprefix("model."): value for key, value in state.items()}  # of a LibraryNetwork
    blocks = [match for key in state if (match := re.fullmatch(r"layer(\d+)\.\d+\.conv1\.weight", key))]
    if not blocks or "conv1.weight" not in state or state["conv1.weight"].ndim != 4:
        return {}
    per_stage, stem = Counter(int(match[1]) for match in blocks), state["conv1.weight"].shape
    return {
        "layers": [per_stage[i + 1] for i in range(max(per_stage))],
        "width": stem[0],
        "block": "bottleneck" if any(".conv3." in key for key in state) else "basic",
        "stem": f"{stem[2]}×{stem[3]}",
        "projections": sum(key.endswith("downsample.0.weight") for key in state),
        "running statistics": "yes" if any(key.endswith("running_mean") for key in state) else "no",
    }


class HubFile(NamedTuple):
    """A weights file of the Hugging Face Hub, downloaded into its cache.

    Attributes:
        address: hf://OWNER/NAME@COMMIT/FILE.
        path: In the cache.
    """

    address: str
    path: Path


def hub_file(address: str) -> HubFile:
    """Return the weights file at hf://OWNER/NAME[@REVISION][/FILE]; without a network, from the cache.

    Args:
        address: REVISION is a commit, branch or tag (default: main), with %2F for a slash; FILE is by default the one
            of HUB_FILES that the repository has, else its only weights file.

    Raises:
        ModelError: huggingface_hub is not installed, or there is no such file, or it cannot be reached.
    """
    if not (match := HUB_ADDRESS.fullmatch(address)):
        raise ModelError(f"{address} must be hf://OWNER/NAME[@REVISION][/FILE]")
    try:
        import huggingface_hub as hub
    except ImportError:
        raise ModelError(f"{address} requires huggingface_hub: pip install 'reslab[hub]'") from None
    repo, revision = match["repo"], unquote(match["revision"] or "main")
    try:
        name = match["file"] or _only_weights(address, _hub_listing(hub, repo, revision))
        path = Path(hub.hf_hub_download(repo, name, revision=revision))
    except hub_errors(hub) as error:
        raise ModelError(_why_not_downloaded(hub, address, error)) from None
    commit = path.parents[name.count("/")].name  # of the file in hand: a branch may have moved since the listing
    return HubFile(f"hf://{repo}@{commit}/{name}", path)


def hub_errors(hub: Any) -> tuple[type[Exception], ...]:
    """Return what calls of huggingface_hub raise: refusals, a missing connection, a full disk."""
    return OSError, ValueError, hub.errors.HTTPError  # of httpx, whose name depends on the version


def _hub_listing(hub: Any, repo: str, revision: str) -> list[str]:
    """Return the files of a repository; without a network, the weights in the cache."""
    try:
        return [file.rfilename for file in hub.HfApi().model_info(repo, revision=revision).siblings]
    except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError):
        raise
    except hub_errors(hub):  # no network, a server that fails, or HF_HUB_OFFLINE
        cached = [
            name for name in HUB_FILES if isinstance(hub.try_to_load_from_cache(repo, name, revision=revision), str)
        ]
        if not cached:
            raise
        return cached


def _only_weights(address: str, names: Sequence[str]) -> str:
    """Return the file of a repository to load where the address names none."""
    endings = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
    candidates = [name for name in HUB_FILES if name in names][:1] or [n for n in names if n.endswith(endings)]
    if len(candidates) == 1:
        return candidates[0]
    files = f"it has {', '.join(sorted(candidates or names)[:10]) or 'no files'}"
    raise ModelError(f"{address} does not say which file to load: {files}; append /FILE")


def _why_not_downloaded(hub: Any, address: str, error: Exception) -> str:
    known = {  # subclasses first
        hub.errors.GatedRepoError: "access is restricted: accept its terms on the Hub, and run `hf auth login`",
        hub.errors.RepositoryNotFoundError: "there is no such repository, or it is private: run `hf auth login`",
        hub.errors.RevisionNotFoundError: "there is no such revision (a commit, branch or tag)",
        hub.errors.LocalEntryNotFoundError: "",  # no network either
        hub.errors.EntryNotFoundError: "there is no such file in the repository",
    }
    reason = next((reason for kind, reason in known.items() if isinstance(error, kind)), "")
    text = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
    offline = f"no connection, and it is not in the cache ({text}). Download it elsewhere, and give the file"
    return f"{address} could not be loaded: {reason or offline}"

"""Config files resolved as `reslab fit` does it (stacked, leaves read, classes changed), without importing torch."""

import copy
import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from reslab.ablation.signatures import ROOTS, parameters
from reslab.errors import UserError

Config = dict[str, Any]


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML as config files mean it: 1e-3 is a number."""


Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*[eE][-+]?\d+$"), list("-+0123456789"))


def read_mapping(path: Path) -> Config:
    """The keys and values of a YAML file; raises UserError where it holds none."""
    try:
        text = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(text, dict):
        raise UserError(f"{path} holds no keys and values")
    return text


def options(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names and values of --KEY VALUE and --KEY=VALUE."""
    words = iter(overrides)
    for word in words:
        key, equals, value = word.partition("=")
        if not key.startswith("--"):
            raise UserError(f"{word!r} is no option: --KEY VALUE or --config FILE")
        if not equals and (value := next(words, None)) is None:  # type: ignore[assignment]
            raise UserError(f"{word} has no value")
        yield key[2:], value


def read_config(path: Path) -> Config:
    """A config file with the leaves that it names by path in their places."""
    return {key: loaded(value, path.parent) for key, value in read_mapping(path).items()}


def loaded(value: Any, folder: Path) -> Any:
    """The value, paths of YAML files in it (relative to `folder`) replaced by what they hold."""
    if isinstance(value, dict):
        return {key: loaded(inner, folder) for key, inner in value.items()}
    if isinstance(value, str) and value.endswith((".yaml", ".yml")):
        return read_config(folder / value)
    return value


def nested(key: str, value: Any) -> Config:
    """A config with one dotted key."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def merge(old: Any, new: Any) -> Any:
    """`new` over `old`, as stacked config files do it: mappings are merged, all else is replaced.

    Where the class changes, arguments are kept only if the new class takes them; `KEY+` adds to the list KEY.
    """
    if not isinstance(old, dict) or not isinstance(new, dict):
        return copy.deepcopy(new)
    merged = dict(old)
    if _class(old) != _class(new) and "class_path" in new and "init_args" in old:
        taken = parameters(new["class_path"]) or {}
        merged["init_args"] = {key: value for key, value in old["init_args"].items() if key in taken}
    for key, value in new.items():
        if str(key).endswith("+"):
            merged[key[:-1]] = [*(merged.get(key[:-1]) or []), *(value if isinstance(value, list) else [value])]
        else:
            merged[key] = merge(merged.get(key), value)
    return merged


def _class(node: Config) -> str:
    return str(node.get("class_path", "")).rpartition(".")[2]


def flat(changes: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; a mapping is followed, unless it is empty or names a class."""
    for key, value in changes.items():
        if isinstance(value, dict) and value and "class_path" not in value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def leaves(node: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of all values."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix


def check_key(key: str, config: Config) -> None:
    """Refuses a dotted key that nothing in the config takes, as far as the sources of its classes tell."""
    node: Any = config
    at, owner = "", None  # the class whose arguments stand here
    for part in key.split("."):
        taken = list(parameters(owner) or {}) if owner else _takes(at, node)
        if taken and part not in taken:
            near = difflib.get_close_matches(part, taken, 3, 0.5)
            hint = f"; nearest: {', '.join(f'{at}.{n}' if at else n for n in near)}" if near else ""
            raise UserError(f"{key}: no such key{hint}")
        owner = node.get("class_path") if part == "init_args" and isinstance(node, dict) else None
        node = node.get(part) if isinstance(node, dict) else None
        at = f"{at}.{part}" if at else part


def _takes(at: str, node: Any) -> list[str] | None:
    """The names that may stand at a place of the config; None where that is not known."""
    if not at:
        return [*(root for root in ROOTS if "." not in root), "seed_everything"]
    if at in ROOTS:
        return list(parameters(ROOTS[at]) or {})
    return ["class_path", "init_args"] if isinstance(node, dict) and "class_path" in node else None


def with_defaults(config: Config) -> Config:
    """The config with what its classes take by default, as far as their sources tell."""

    def filled(node: Any, place: str) -> Any:
        if not isinstance(node, dict):
            return node
        defaults: Config = parameters(ROOTS[place]) or {} if place in ROOTS else {}
        complete = {**defaults, **node}
        if "class_path" in node:
            complete["class_path"] = _class(node)
            complete["init_args"] = {**(parameters(node["class_path"]) or {}), **(node.get("init_args") or {})}
        return {key: filled(value, f"{place}.{key}" if place else key) for key, value in complete.items()}

    groups = {root: config.get(root) or {} for root in ROOTS if "." not in root}
    groups["data"] = {"augment": {}, **groups["data"]}
    return {**filled(groups, ""), "seed_everything": config.get("seed_everything")}


def prune(config: Config, keys: Sequence[str]) -> Config:
    """The config without some dotted keys."""
    pruned = copy.deepcopy(config)
    for key in keys:
        *groups, last = key.split(".")
        node: Any = pruned
        for group in groups:
            node = node.get(group) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node.pop(last, None)
    return pruned

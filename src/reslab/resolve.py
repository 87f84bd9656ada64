"""Resolve config files as `reslab fit` does (stacking, files named in values, class changes), without torch."""

import copy
import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from reslab import names
from reslab.errors import UserError
from reslab.signatures import CONFIG, Parameter, parameters

Config = dict[str, Any]
CLASS_KEYS = ["class_path", "init_args", "dict_kwargs"]  # of an object built from the config


# What people change most, and may write on the command line instead of the full key.
SHORT_KEYS = {
    "lr": "model.optimizer.init_args.lr", "epochs": "trainer.max_epochs", "batch_size": "data.batch_size",
    "seed": "seed_everything", "devices": "trainer.devices", "precision": "trainer.precision",
}  # fmt: skip


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML loader that reads 1e-3 as a number, as jsonargparse does."""


Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*[eE][-+]?\d+$"), list("-+0123456789"))


def read_mapping(path: Path) -> Config:
    """Return the mapping in a YAML file; raise UserError if it holds none."""
    try:
        text = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or no valid date
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(text, dict):
        raise UserError(f"{path} must hold keys and values")
    return text


def parse_value(text: str) -> Any:
    """Return a value of the command line, which is YAML."""
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{text!r} is not valid YAML; quote it") from error


def _is_null(text: str) -> bool:
    """Return whether text is a null of YAML, as in `~` or `Null`; nothing but spaces is not."""
    try:
        return text.strip() != "" and parse_value(text) is None
    except UserError:
        return False


def options(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the names and values of --KEY VALUE and --KEY=VALUE."""
    words = iter(overrides)
    for word in words:
        key, equals, value = word.partition("=")
        if not key.startswith("--"):
            raise UserError(f"{word!r} is not an option; expected --KEY VALUE or --config FILE")
        if not equals and (value := next(words, None)) is None:  # type: ignore[assignment]
            raise UserError(f"{word} has no value")
        yield key[2:], value


def read_config(path: Path) -> Config:
    """Return a config file, with the config files that its values name loaded in their places."""
    return {key: loaded(value, path.parent, key) for key, value in with_paths(read_mapping(path)).items()}


def with_paths(config: Any) -> Any:
    """Return a config in which the names of config files (net: resnet18) are absolute paths.

    The arguments of classes are left alone: there, `net: resnet18` may mean anything.
    """
    if not isinstance(config, dict) or "class_path" in config:
        return config
    named = ((key, names.leaf(str(key), value)) for key, value in config.items() if isinstance(value, str))
    paths = {key: str(path.absolute()) for key, path in named if path}
    return {key: with_paths(value) for key, value in config.items()} | paths


def loaded(value: Any, folder: Path, key: str = "") -> Any:
    """Return the value with the config files that it names replaced by their content.

    They are named by paths relative to `folder`; as the value of a key such as model.net, also by their names.
    """
    if isinstance(value, dict):
        return {name: loaded(inner, folder) for name, inner in value.items()}
    if isinstance(value, str) and value.endswith((".yaml", ".yml")):
        return read_config(folder / value)
    if isinstance(value, str) and (path := names.leaf(key, value)) is not None:
        return read_config(path)
    return value


def change(config: Config, changes: Config, folder: Path) -> Config:
    """Return the config with some dotted keys changed; paths of YAML files are relative to `folder`.

    Keys may leave out `init_args`, see `full_key`. Two spellings of one key are refused.
    """
    spelled: dict[str, str] = {}
    for key, value in changes.items():
        full = full_key(key, config)
        nested = loaded(value, folder, full)
        if full in spelled:
            raise UserError(f"{spelled[full]} and {key} are the same key: keep one of them")
        spelled[full] = key
        for part in reversed(full.split(".")):
            nested = {part: nested}
        config = merge(config, nested)
    return config


def set_option(config: Config, key: str, text: str) -> Config:
    """Return the config with --KEY VALUE; a value of a text argument stays as written, all others are YAML."""
    append = key.endswith("+")
    full = full_key(key.removesuffix("+"), config)
    type_ = parameter(full, config).type
    is_text = type_.names == ("str",) and not type_.others and not type_.items
    value = text if is_text and not (None in type_.choices and _is_null(text)) else parse_value(text)
    return change(config, {f"{full}+" if append else full: value}, Path())


def parameter(key: str, config: Config) -> Parameter:
    """Return the parameter that a full key sets."""
    node: Any = config
    owner: str | None = CONFIG
    *groups, name = key.split(".")
    for part in groups:
        owner, node = below(owner, node, part)
    return parameters(owner).get(name, Parameter()) if owner is not None else Parameter()


def full_key(key: str, config: Config) -> str:
    """Return a dotted key with the `init_args` that it leaves out: `fit` accepts model.optimizer.lr, too.

    Arguments in `dict_kwargs` are found likewise. Raise UserError if both fit.
    """
    node: Any = config
    owner: str | None = CONFIG
    at: list[str] = []
    for part in SHORT_KEYS.get(key, key).split("."):
        steps = [part]
        if _names_a_class(node):
            groups = _groups_with(node, part)
            if len(groups) > 1:
                raise UserError(f"{key} is ambiguous: {' or '.join('.'.join([*at, *g, part]) for g in groups)}")
            steps = [*groups[0], part] if groups else ["init_args", part]
        for step in steps:
            owner, node = below(owner, node, step)
        at += steps
    return ".".join(at)


def _groups_with(node: Config, part: str) -> list[list[str]]:
    """Return where a class's config may hold `part`: at the class itself, in `init_args`, in `dict_kwargs`."""
    arguments = {*parameters(str(node["class_path"])), *(node.get("init_args") or {})}
    groups: list[list[str]] = [[]] if part in CLASS_KEYS else []
    groups += [["init_args"]] if part in arguments else []
    return groups + ([["dict_kwargs"]] if part in (node.get("dict_kwargs") or {}) else [])


def short_key(key: str) -> str:
    """Return a dotted key without `init_args` and `dict_kwargs`."""
    return ".".join(part for part in key.split(".") if part not in CLASS_KEYS[1:])


def merge(old: Any, new: Any) -> Any:
    """Return `new` stacked on `old`, as config files are: mappings are merged, everything else is replaced.

    If the class changes, only arguments that the new class accepts are kept. `KEY+` appends to the list KEY.
    """
    if isinstance(old, list) and old and isinstance(new, dict) and not _names_a_class(new):  # KEY.ARGUMENT after KEY+
        return [*old[:-1], merge(_as_class(old[-1]), new)]
    if isinstance(old, dict) and isinstance(new, str) and "class_path" in old:  # KEY CLASS: its arguments may follow
        new = _as_class(new)
    if isinstance(old, str) and isinstance(new, dict) and not _names_a_class(new) and {*new} & {*CLASS_KEYS}:
        old = _as_class(old)
    if not isinstance(old, dict) or not isinstance(new, dict):
        return copy.deepcopy(new)
    merged = dict(old)
    if _names_a_class(new) and _class(old) != _class(new):
        merged.pop("dict_kwargs", None)
        if "init_args" in old:
            accepted = parameters(str(new["class_path"]))
            merged["init_args"] = {key: value for key, value in old["init_args"].items() if key in accepted}
    for key, value in new.items():
        if str(key).endswith("+"):
            merged[key[:-1]] = [*(merged.get(key[:-1]) or []), *(value if isinstance(value, list) else [value])]
        else:
            merged[key] = merge(merged.get(key), value)
    return merged


def _as_class(value: Any) -> Any:
    return {"class_path": value} if isinstance(value, str) else value


def _class(node: Config) -> str:
    return str(node.get("class_path", "")).rpartition(".")[2]


def flat(config: Config, classes: bool = False, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values; mappings that are empty are values, as are those that name a class by default."""
    for key, value in config.items():
        if isinstance(value, dict) and value and (classes or "class_path" not in value):
            yield from flat(value, classes, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_key(key: str, config: Config) -> None:
    """Raise UserError for a dotted key that the config does not accept, as far as the source of its classes shows."""
    node: Any = config
    owner: str | None = CONFIG  # the class whose parameters are the keys here; None if unknown
    at = ""
    for part in key.split("."):
        accepted = accepted_keys(node, owner)
        part = part.removesuffix("+")  # appends to a list
        if accepted and part not in accepted:
            near = difflib.get_close_matches(part, [*accepted, *(() if at else SHORT_KEYS)], 3, 0.5)
            hint = f"; nearest: {', '.join(f'{at}.{n}' if at else n for n in near)}" if near else ""
            raise UserError(f"{key}: no such key{hint}")
        owner, node = below(owner, node, part)
        at = f"{at}.{part}" if at else part


def accepted_keys(node: Any, owner: str | None) -> list[str]:
    """Return the keys that a node may have; empty if that is not known."""
    return CLASS_KEYS if _names_a_class(node) else list(parameters(owner))


def _names_a_class(node: Any) -> bool:
    return isinstance(node, dict) and "class_path" in node


def below(owner: str | None, node: Any, part: str) -> tuple[str | None, Any]:
    """Return the owner and node below `part`; the node is the default if the config omits it and it is a class."""
    inner = node.get(part) if isinstance(node, dict) else None
    if isinstance(inner, list) and inner:  # KEY.ARGUMENT after KEY+ is an argument of the last item
        inner = _as_class(inner[-1])
    if isinstance(inner, str) and (parameter := parameters(owner).get(part)) and parameter.only_class:
        inner = _as_class(inner)
    if inner is None and not _names_a_class(node):
        inner = parameters(owner).get(part, Parameter(None)).default
    return _owner(owner, node, part), inner if isinstance(inner, dict) else None


def _owner(owner: str | None, node: Any, part: str) -> str | None:
    """Return the class whose parameters are the keys below `part` of a node; None if unknown."""
    if _names_a_class(node):
        return str(node["class_path"]) if part == "init_args" else None
    return parameters(owner).get(part, Parameter(None)).group


def with_defaults(config: Config) -> Config:
    """Return the config with the defaults of its classes, as far as their source shows."""

    def filled(node: Any, owner: str | None) -> Any:
        if isinstance(node, list):
            return [filled(item, None) for item in node]
        if not isinstance(node, dict):
            return node
        if _names_a_class(node):
            node = {"init_args": {}, **node}
        else:
            node = merge({name: p.default for name, p in parameters(owner).items()}, node)
            accepted = parameters(owner)
            node = {k: _as_class(v) if k in accepted and accepted[k].only_class else v for k, v in node.items()}
        complete = {key: filled(value, _owner(owner, node, key)) for key, value in node.items()}
        return {**complete, "class_path": _class(node)} if _names_a_class(node) else complete

    return filled(config, CONFIG)


def prune(config: Config, keys: Sequence[str], prefix: str = "") -> Config:
    """Return the config without some dotted keys."""
    kept = {key: value for key, value in config.items() if f"{prefix}{key}" not in keys}
    return {k: prune(v, keys, f"{prefix}{k}.") if isinstance(v, dict) else v for k, v in kept.items()}

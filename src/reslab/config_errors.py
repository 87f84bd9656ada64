"""Turn jsonargparse's errors into one message: the key, where it is set, and the nearest valid names."""

import contextlib
import importlib
import inspect
import pydoc
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from reslab.errors import UserError, last_line, raised_in
from reslab.host import NAMESPACES
from reslab.training.compatibility import known_refusal

# Modules whose classes a config may name. All others are refused before the import: importing runs code.
ALLOWED = [
    "reslab", "torch.optim", "timm.optim", "torchvision.transforms.v2",
    "lightning.pytorch.callbacks", "lightning.pytorch.loggers", "lightning.pytorch.plugins",
    "lightning.pytorch.profilers", "lightning.pytorch.strategies",
]  # fmt: skip


def explain(message: str, known_keys: Sequence[str], args: Sequence[str], base: Path) -> str:
    """Return what is wrong, where, and what was probably meant.

    `message` is jsonargparse's. `args`, the command line, names the config files; `base` is read before all of them.
    """
    for path in _files(args, base):
        try:
            yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except (OSError, yaml.YAMLError) as error:
            reason = " ".join(str(error).replace('"<unicode string>", ', "").split())
            return f"cannot read the config file {path}: {reason}"
    key, near = _key(message), []
    message = _without_other_attempts(message)
    if refusal := _refusal(message):
        return one_line(key.partition(".init_args.")[0], f": {refusal}", args, base)
    if failure := _import_failure(message):
        return f"{key}: {explain_failure(None, failure, Namespace(), args, base)}"
    if (leaf := _first(r"Expected a path but (\S+\.ya?ml) either", message)) and not Path(leaf).exists():
        reason = f"no such file: {leaf}"
    elif "import path denylist" in message:
        name = _first(r"Importing '([^']+)'", message)
        reason = f"a config must not name {name!r}; it may name classes of {', '.join(ALLOWED)}"
    elif name := _first(r"No module named '(\w+)", message):
        reason = f"{name} is not installed: pip install {name}"
    elif name := _first(r"the following arguments are required: (\w+)", message):
        reason = f"init_args.{name} is required"
    elif unknown := _unknown_key(message):
        key, reason = unknown, "no such key"
        near = _nearest(key, [*known_keys, *_class_keys(key, message)])
    elif match := re.search(r"Import path (\S* ?)does not correspond to a subclass of (\w+)", message):
        name = match[1].strip() or _first(r"Given value: (\S+)", message) or "it"
        reason = f"{name} is not a {match[2]}"
    elif name := _first(r"but ([\w.]+) is abstract", message):
        missing = sorted(getattr(pydoc.locate(name), "__abstractmethods__", ()))
        reason = f"{name} is abstract: it does not define {', '.join(missing)}"
    elif name := _unknown_class(message):
        reason, near = f"no class {name!r}", _nearest_classes(name)
    else:
        reason, near = _wrong_value(message)
    return _at(key, reason, args, base) + (f"\n  nearest: {', '.join(near)}" if near else "")


def _refusal(message: str) -> str | None:
    """Return why the class that a message is about does not work with reslab, if so: its arguments do not matter."""
    about = (
        r"Problem with given class_path '([\w.]+)'", r"but ([\w.]+) is abstract",
        r"Import path ([\w.]+) does not correspond", r"Given value: ([\w.]+)$",
    )  # fmt: skip
    names = [name.rpartition(".")[2] for pattern in about for name in re.findall(pattern, message, re.MULTILINE)]
    return next(filter(None, map(known_refusal, names)), None)


def _import_failure(message: str) -> Exception | None:
    """Return why a module of the user's cannot be imported: jsonargparse takes some exceptions for a wrong type."""
    for module in dict.fromkeys(re.findall(r"\b(reslab(?:\.\w+)*)\.\w+", message)):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            continue  # the message already names the place
        except Exception as error:
            return error
    return None


def _without_other_attempts(message: str) -> str:
    """Drop what jsonargparse tried besides: to read a value as a path, and to build the base class of a list."""
    message = re.sub(
        r"Expected a path but (?!\S+\.ya?ml either).*? either not accessible or invalid", "", message, flags=re.S
    )
    other = re.sub(r"Problem with given class_path '[^']+':\n\s+Importing .*", "", message)
    _, left = _innermost(other)
    return other if "Problem with" in other and _without_keys(left) else message


def _without_keys(message: str) -> str:
    """Return what is wrong as one line, without jsonargparse's introductions."""
    return " ".join(re.sub(r'Parser key "[^"]+":', "", message).split())


def _unknown_class(message: str) -> str | None:
    name = _first(r"Expected a dot import path string: (\S+)", message)
    if name and name[:1].islower() and re.search("Expected a <class '(?!NoneType)", message):
        return None  # a wrong value rather than a class: the key accepts both
    return name or _first(r"has no attribute '(\w+)'", message)


def _nearest_classes(name: str) -> list[str]:
    """Return the nearest names of classes; for a class that only goes by its full name, that."""
    modules = [importlib.import_module(namespace) for namespace in NAMESPACES]
    classes = {c: m for m in modules for c in getattr(m, "__all__", dir(m)) if c[:1].isupper()}
    return [f"{classes[name].__name__}.{name}"] if name in classes else get_close_matches(name, classes, 3, 0.5)


def explain_failure(cls: type | None, error: Exception, config: Namespace, args: Sequence[str], base: Path) -> str:
    """Return which class of the config could not be imported or built, why, and where it is set.

    Add where the code failed, unless a check of reslab or of a library refused a value.
    """
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    checked = isinstance(error, UserError | ValueError | MisconfigurationException)
    reason = str(error) if isinstance(error, UserError) else last_line(error, named=not checked)
    raised = "".join(f"\n  raised in: {place}" for place in raised_in(error, with_reslab=not checked)[-1:])
    group = class_key(cls, config) if cls else None
    keys = [key for key, _ in config.items() if group is None or key.startswith(f"{group}.")]
    if cls is None or key_in(reason, keys) or (group is None and cls.__module__.startswith("reslab.")):
        return located(reason, keys, args, base) + raised
    return _at(group, f"{cls.__name__}: {reason}", args, base) + raised


def class_key(cls: type, config: Namespace) -> str | None:
    """Return the config key whose value names a class."""
    for key, value in config.items():
        paths = [getattr(item, "class_path", "") for item in value] if isinstance(value, list) else [value]
        if (isinstance(value, list) or key.endswith(".class_path")) and cls in map(pydoc.locate, filter(None, paths)):
            return key.removesuffix(".class_path")
    return None


def key_in(message: str, known_keys: Sequence[str]) -> str | None:
    """Return the config key whose last part a constructor's message mentions, if any."""
    words = set(re.findall(r"[\w.]+", message))
    named = [key for key in known_keys if key in words or key.rpartition(".")[2] in words]
    return max(named, key=lambda key: (key in words, len(key.rpartition(".")[2])), default=None)


def located(message: str, known_keys: Sequence[str], args: Sequence[str], base: Path) -> str:
    """Return a constructor's message with its key, and the file and line where that is set."""
    key = key_in(message, known_keys)
    name = _first(r"^([\w.]+)[ :]", message)
    if key and name and f".{key}".endswith(f".{name}"):  # the message begins with its key, or with the key's last parts
        return _at(key, message.removeprefix(name), args, base, colon="")
    return _at(key, message, args, base)


def one_line(key: str, problem: str, args: Sequence[str], base: Path) -> str:
    """Return a message of one line: the key, the problem, and the last place that sets the key."""
    return key + problem + "".join(f" (set in: {place})" for place in [*places(key, args, base)][-1:])


def _at(key: str | None, reason: str, args: Sequence[str], base: Path, colon: str = ": ") -> str:
    """Return `key: reason`, and the last place that sets the key."""
    last = [*places(key, args, base)][-1:] if key else []
    return "\n".join([f"{key}{colon}{reason}" if key else reason, *(f"  set in: {place}" for place in last)])


def _first(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text, re.MULTILINE)
    return match.group(1) if match else None


def _key(message: str) -> str:
    """Return the dotted key of a message; nested messages each name a part of it."""
    return ".init_args.".join(re.findall(r'Parser key "([^"]+)"', message))


def _unknown_key(message: str) -> str | None:
    if name := _first(r"unrecognized arguments: (?:--)?([^\s=]+)", message):
        return name
    if match := re.search(r"Group '([^']+)' does not accept option '([^']+)'", message):
        return ".".join(match.groups())
    key, name = _key(message), _first(r"Option '([^']+)' is not accepted", message)
    return f"{key}.init_args.{name}" if key and name else name


def _class_keys(key: str, message: str) -> list[str]:
    """Return the keys that the class named in the message accepts."""
    module, _, name = (_first(r"class_path[= ]'([\w.]+)'", message) or "").rpartition(".")
    if not module:
        return []
    taken = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    group, _, last = key.rpartition(".")
    passed_on = [f"{group.removesuffix('init_args')}dict_kwargs.{last}"] if "kwargs" in taken else []
    return [*passed_on, *(f"{group}.{p}" for p in taken if p not in ("self", "params", "args", "kwargs"))]


def _nearest(key: str, known: Sequence[str]) -> list[str]:
    """Return the nearest keys of the same group; if there are none, the nearest keys of all."""
    group, _, name = key.rpartition(".")
    names = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == group]
    near = get_close_matches(name, names, 3, 0.5)
    near = [f"{group}.{n}" if group else n for n in near] or get_close_matches(key, known, 3, 0.6)
    return [*(k for k in known if k.endswith(f"dict_kwargs.{name}")), *near]  # arguments that a class passes on


def _wrong_value(message: str) -> tuple[str, list[str]]:
    """Return a sentence with the expected type and the rejected value, and the nearest of the allowed values."""
    class_path, message = _innermost(message)
    value = _first(r"(?:Got value|Given value): (.+?)(?:\. Got value: .*)?$", message) or ""
    types = dict.fromkeys(re.findall(r"Expected an? (?!dot import path)(.+?)(?:\. Got value|$)", message, re.MULTILINE))
    if callable_wanted := _first(r"(Type \S+ expects .+?)\.* Got value", message):
        reason = callable_wanted
    elif types:
        expected = " or ".join(types).replace("NoneType", "null").replace("typing.Literal", "one of ")
        expected = re.sub(r"<class '([\w.]+)'>", r"\1", expected)
        reason = f"expected {expected}" + (f", got {value}" if value else "")
    else:
        reason = _without_keys(message)
        reason = f"{class_path.rpartition('.')[2]}: {reason}" if class_path else reason
    choices = re.findall(r"'([^']+)'", " ".join(re.findall(r"Literal\[([^\]]+)\]", message)))
    return reason, get_close_matches(value, {*choices}, 3, 0.5)


def _innermost(message: str) -> tuple[str, str]:
    """Return the innermost class that could not be built, and what was wrong with it; else '' and the message."""
    name = ""
    while match := re.search(
        r"^( *)(?:- )?Problem with given class_path '([^']+)':\n((?:\1 +.*(?:\n|$))+)", message, re.M
    ):
        _, name, message = match.groups()
    return name, message


def _files(args: Sequence[str], base: Path) -> list[Path]:
    """Return the config files of a command line in reading order."""
    words = [word for arg in args for word in arg.split("=", 1)]
    return [base, *(Path(value) for option, value in pairwise(words) if option in ("--config", "-c"))]


def places(key: str, args: Sequence[str], base: Path) -> Iterator[str]:
    """Yield the places that set a key, in reading order: files with their lines, then the command line."""
    parts = [part for part in key.split(".") if part != "init_args"]
    for path in _files(args, base):
        yield from _lines(path, parts)
    options = [arg.partition("=")[0].lstrip("-").removesuffix("+").removesuffix(".class_path") for arg in args]
    if any(option.replace("init_args.", "") == ".".join(parts) for option in options):
        yield "the command line"


def _lines(path: Path, parts: list[str]) -> Iterator[str]:
    with contextlib.suppress(OSError, yaml.YAMLError):
        yield from _walk(yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader), parts, path)


def _walk(node: Any, parts: list[str], path: Path) -> Iterator[str]:
    """Follow a key through one file, and into the files that it references by path."""
    if isinstance(node, yaml.ScalarNode) and str(node.value).endswith((".yaml", ".yml")):
        yield from _lines(path.parent / node.value, parts)
    if not isinstance(node, yaml.MappingNode):
        return
    for name, value in node.value:
        if name.value == "init_args":
            yield from _walk(value, parts, path)
        elif name.value == parts[0] and len(parts) == 1:
            yield f"{path}, line {name.start_mark.line + 1}"
        elif name.value == parts[0]:
            yield from _walk(value, parts[1:], path)

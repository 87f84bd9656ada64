"""Turn jsonargparse's errors into one message: the key, where it is set, and the nearest valid names."""

import difflib
import importlib
import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

# Modules whose classes a config may name without their module.
NAMESPACES = (
    "reslab.models",
    "reslab.data",
    "reslab.training",
    "torch.optim",
    "torchvision.transforms.v2",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
)


def explain(message: str, known_keys: Sequence[str], args: Sequence[str], base: Path) -> str:
    """Return what is wrong, where, and what was probably meant.

    Args:
        message: jsonargparse's message.
        known_keys: Every dotted key of the configuration.
        args: The command line, which names the config files.
        base: The config file that is read before all others.
    """
    if broken := _syntax_error(args, base):
        return broken
    key: str | None
    near: list[str]
    if "import path denylist" in message:
        name = _first(r"Importing '([^']+)'", message)
        reason, key, near = f"a config must not name {name!r}", _key(message), []
        reason += "; allowed are reslab, torch.optim, timm.optim, torchvision.transforms.v2, and lightning's "
        reason += "callbacks, loggers, strategies, profilers and plugins"
    elif name := _first(r"No module named '(\w+)", message):
        reason, key, near = f"{name} is not installed: pip install {name}", _key(message), []
    elif (key := _unknown_key(message)) is not None:
        reason, near = "no such key", _nearest(key, [*known_keys, *_class_keys(key, message)])
    elif (
        name := _first(r"Expected a dot import path string: (\S+)", message)
        or _first(r"has no attribute '(\w+)'", message)
    ) is not None:
        reason, key, near = (
            f"no class {name!r}",
            _key(message),
            difflib.get_close_matches(name, _class_names(), 3, 0.5),
        )
    else:
        reason, key, near = *_wrong_value(message), _nearest_choices(message)
    lines = [f"{key}: {reason}" if key else reason]
    if key and (found := list(places(key, args, base))):
        lines.append(f"  set in: {found[-1]}")
    if near:
        lines.append(f"  nearest: {', '.join(near)}")
    return "\n".join(lines)


def key_in(message: str, known_keys: Sequence[str]) -> str | None:
    """Return the config key whose last part a constructor's message mentions, if any."""
    words = set(re.findall(r"[\w.]+", message))
    named = [key for key in known_keys if key in words or key.rpartition(".")[2] in words]
    return max(named, key=lambda key: (key in words, len(key.rpartition(".")[2])), default=None)


def located(message: str, known_keys: Sequence[str], args: Sequence[str], base: Path) -> str:
    """Return a constructor's message with its key, and the file and line where that is set."""
    # For a union type, jsonargparse wraps it: the constructor's message is in the list of errors.
    own = [line for line in re.findall(r"^\s*- (.+)$", message, re.MULTILINE) if not line.startswith("Expected a")]
    message = own[0] if own else message
    key = key_in(message, known_keys)
    if key is None:
        return message
    rest, name = f": {message}", _first(r"^([\w.]+)[ :]", message)
    if name and f".{key}".endswith(f".{name}"):  # the message begins with its key, or with the key's last parts
        rest = message.removeprefix(name)
    return "\n".join([key + rest, *(f"  set in: {place}" for place in [*places(key, args, base)][-1:])])


def _first(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match.group(1) if match else None


def _key(message: str) -> str:
    """Return the dotted key of a message; nested messages each name a part of it."""
    parts = re.findall(r'Parser key "([^"]+)"', message)
    return ".init_args.".join(parts)


def _unknown_key(message: str) -> str | None:
    if name := _first(r"unrecognized arguments: (?:--)?([^\s=]+)", message):
        return name
    if match := re.search(r"Group '([^']+)' does not accept option '([^']+)'", message):
        return f"{match.group(1)}.{match.group(2)}"
    if name := _first(r"Option '([^']+)' is not accepted", message):
        return f"{_key(message)}.init_args.{name}" if _key(message) else name
    return None


def _class_keys(key: str, message: str) -> list[str]:
    """Return the keys that the class named in the message accepts."""
    path = _first(r"class_path[= ]'([\w.]+)'", message)
    if path is None:
        return []
    module, _, name = path.rpartition(".")
    taken = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    return [f"{key.rpartition('.')[0]}.{p}" for p in taken if p not in ("self", "params", "args", "kwargs")]


def _nearest(key: str, known: Sequence[str]) -> list[str]:
    """Return the nearest keys of the same group; if there are none, the nearest keys of all."""
    group, _, name = key.rpartition(".")
    names = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == group]
    near = difflib.get_close_matches(name, names, 3, 0.5)
    return [f"{group}.{n}" if group else n for n in near] or difflib.get_close_matches(key, known, 3, 0.6)


def _class_names() -> list[str]:
    names: set[str] = set()
    for namespace in NAMESPACES:
        module = importlib.import_module(namespace)
        names |= {n for n in getattr(module, "__all__", dir(module)) if n[:1].isupper()}
    return sorted(names)


def _wrong_value(message: str) -> tuple[str, str]:
    """Return a sentence with the expected type and the given value, and the key."""
    expected = dict.fromkeys(re.findall(r"Expected an? (.+?)(?:\. Got value|$)", message, re.MULTILINE))
    plain = [re.sub(r"<class '([\w.]+)'>|typing\.Literal", lambda m: m.group(1) or "one of ", e) for e in expected]
    given = _first(r"(?:Got value|Given value): (.+)", message)
    if not plain:
        return " ".join(re.sub(r'Parser key "[^"]+":', "", message).split()), _key(message)
    wanted = " or ".join(plain).replace("NoneType", "null")
    return f"expected {wanted}" + (f", got {given}" if given else ""), _key(message)


def _nearest_choices(message: str) -> list[str]:
    choices = re.findall(r"'([^']+)'", " ".join(re.findall(r"Literal\[([^\]]+)\]", message)))
    given = _first(r"(?:Got value|Given value): (.+)", message)
    return difflib.get_close_matches(given, list(dict.fromkeys(choices)), 3, 0.5) if given else []


def _files(args: Sequence[str], base: Path) -> list[Path]:
    """Return the config files of a command line in reading order."""
    flags = ("--config", "-c")
    apart = [args[i + 1] for i, arg in enumerate(args[:-1]) if arg in flags]
    joined = [arg.partition("=")[2] for arg in args if arg.startswith(("--config=", "-c="))]
    return [base, *map(Path, apart + joined)]


def _syntax_error(args: Sequence[str], base: Path) -> str | None:
    for path in _files(args, base):
        try:
            yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except OSError as error:
            return f"cannot read the config file {path}: {error.strerror}"
        except yaml.YAMLError as error:
            return f"{path} is not YAML: " + " ".join(str(error).replace('"<unicode string>", ', "").split())
    return None


def places(key: str, args: Sequence[str], base: Path) -> Iterator[str]:
    """Yield the places that set a key, in reading order: files with their lines, then the command line."""
    wanted = [part for part in key.split(".") if part != "init_args"]
    for path in _files(args, base):
        yield from _lines(path, wanted)
    options = [arg.partition("=")[0].lstrip("-").removesuffix(".class_path") for arg in args]
    if any(option.replace("init_args.", "") == ".".join(wanted) for option in options):
        yield "the command line"


def _lines(path: Path, wanted: list[str]) -> Iterator[str]:
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, yaml.YAMLError):
        return
    yield from _walk(root, wanted, path)


def _walk(node: Any, wanted: list[str], path: Path) -> Iterator[str]:
    """Follow a key through one file, and into the files that it references by path."""
    if isinstance(node, yaml.ScalarNode) and str(node.value).endswith((".yaml", ".yml")):
        yield from _lines(path.parent / node.value, wanted)
    if not isinstance(node, yaml.MappingNode):
        return
    for name, value in node.value:
        if name.value == "init_args":
            yield from _walk(value, wanted, path)
        elif name.value == wanted[0] and len(wanted) == 1:
            yield f"{path}, line {name.start_mark.line + 1}"
        elif name.value == wanted[0]:
            yield from _walk(value, wanted[1:], path)

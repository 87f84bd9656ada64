"""All keys of a config with type, default and documentation, read from the source. Imports no torch."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from reslab import resolve
from reslab.host import CONFIGS
from reslab.signatures import CONFIG, parameters, subclasses
from reslab.training.compatibility import known_refusal
from reslab.value_types import in_yaml

NOT_LISTED = ("trainer.accelerator", "trainer.plugins", "trainer.profiler")  # classes that hardly anyone sets


class Key(NamedTuple):
    """A key of a config.

    Args:
        key: The dotted key, such as model.optimizer.init_args.lr. `init_args` may be left out on the command line.
        type: What it accepts, such as "int | null".
        default: Its default as in YAML, such as null; "required" if it has none.
        doc: What it means.
        of: The class that has this argument, if the key exists for that class only.
    """

    key: str
    type: str
    default: str
    doc: str
    of: str = ""

    @property
    def short(self) -> str:
        """The key as it may be written on the command line."""
        return resolve.short_key(self.key)


def all_keys() -> list[Key]:
    """Return every key of a config, and the arguments of every class that a config may name by its short name."""
    return list(_keys(CONFIG, "", resolve.read_config(CONFIGS / "base.yaml"), ""))


def _keys(owner: str, prefix: str, base: Any, of: str) -> Iterator[Key]:
    for name, parameter in parameters(owner).items():
        key, set_in_base = f"{prefix}{name}", base.get(name) if isinstance(base, dict) else None
        if parameter.group:
            yield from _keys(parameter.group, f"{key}.", set_in_base, of)
            continue
        default = parameter.default if set_in_base is None else set_in_base
        text = "required" if parameter.required else _shown(default)
        yield Key(key, str(parameter.type), text, parameter.doc, of)
        if parameter.base and key not in NOT_LISTED and not of:
            for path in subclasses(parameter.base):
                if not known_refusal(name := path.rpartition(".")[2]):
                    yield from _keys(path, f"{key}.init_args.", None, name)


def _shown(value: Any) -> str:
    is_class = isinstance(value, dict) and "class_path" in value
    return str(value["class_path"]).rpartition(".")[2] if is_class else in_yaml(value)


def default_of(key: str, config: resolve.Config) -> str:
    """Return the value of a key in a config, or its default; "" if the class that decides is not known."""
    full = resolve.full_key(key, config)
    value, parameter = config, resolve.parameter(full, config)
    for part in full.split("."):
        value = value.get(part, {}) if isinstance(value, dict) else {}
    return _shown(value if value != {} else parameter.default if parameter.default != {} else None)


def matching(word: str) -> list[Key]:
    """Return the keys that contain a word, or belong to a class of that name; if there are none, whose doc does."""
    rows, word = all_keys(), word.lower().removeprefix("--")
    named = [row for row in rows if word in row.key.lower() or word in row.short.lower() or word == row.of.lower()]
    return named or [row for row in rows if re.search(rf"\b{re.escape(word)}", row.doc.lower())]

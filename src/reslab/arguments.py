"""The short forms of the command line: names of config files, and short keys. Imports no torch."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from reslab import names
from reslab.errors import UserError
from reslab.resolve import SHORT_KEYS, parse_value, short_key

FLAGS = ("print_config", "help", "h")  # options whose value is optional


def words(args: Sequence[str]) -> Iterator[tuple[str, str | None, str]]:
    """Yield (key, value, joiner) for each option, and ("", word, "") for each word that is no option.

    The joiner is "=" or " ", as on the command line. The value is None if it is missing.
    """
    rest = list(args)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.partition("=")
        key = {"-c": "--config", "-h": "--help"}.get(key, key)
        if not key.startswith("--"):
            yield "", word, ""
        elif equals or key[2:].partition(".")[0] in FLAGS or not rest or rest[0].startswith("--"):
            yield key[2:], value if equals else None, "="
        else:
            yield key[2:], rest.pop(0), " "


def expand(args: Sequence[str], experiment: bool = True) -> list[str]:
    """Return a command line with paths for names and with the long keys, as the typed parser requires.

    With `experiment`, a word that is no option is the name or path of an experiment: the first config file.
    """
    first: list[str] = []
    rest: list[str] = []
    for key, value, joiner in _consistent(words(args)):
        if not key and experiment:
            if first:
                raise UserError(f"{value!r} is not an option: give one experiment, then --config NAME or --KEY VALUE")
            first = ["--config", str(_path(str(value), lambda name: names.find("experiment", name)))]
        else:
            rest += _option(SHORT_KEYS.get(key, key), value, joiner)
    return [*first, *rest]


def _option(key: str, value: str | None, joiner: str) -> list[str]:
    if not key:
        return [str(value)]
    if value is None:
        return [f"--{key}"]
    if key == "config":
        value = str(_path(value, names.find_stacked))
    elif (path := names.leaf(key, value)) is not None:
        value = str(path)
    return [f"--{key}={value}"] if joiner == "=" else [f"--{key}", value]


def _path(text: str, find: Callable[[str], Path]) -> str | Path:
    return find(text) if names.is_name(text) else text


def _consistent(options: Iterator[tuple[str, str | None, str]]) -> Iterator[tuple[str, str | None, str]]:
    """Yield the options; raise UserError if a short key and its long key have different values."""
    values: dict[str, dict[str, str | None]] = {}
    for key, value, joiner in options:
        spellings = values.setdefault(short_key(SHORT_KEYS.get(key, key)), {})
        for other, before in spellings.items():
            if other != key and {other, key} & {*SHORT_KEYS} and parse_value(str(before)) != parse_value(str(value)):
                raise UserError(f"--{other} {before} and --{key} {value} set the same key: keep one of them")
        spellings[key] = value
        yield key, value, joiner

"""Check a config in a second, without torch: keys, types, choices, bounds, names and files.

What this module cannot know it lets pass: the typed parser (`reslab.config`) checks everything again.
"""

import ast
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from reslab import names, resolve
from reslab.arguments import expand, words
from reslab.config_errors import ALLOWED, places
from reslab.errors import UserError
from reslab.host import CONFIGS, NAMESPACES
from reslab.signatures import (
    CONFIG,
    Parameter,
    Unknown,
    accepts_more,
    constructor_checks,
    find_class,
    lists_its_names,
    parameters,
    subclasses,
)
from reslab.training.compatibility import FLAGS, NAMES, Flag, known_refusal
from reslab.value_types import in_yaml

BASE = CONFIGS / "base.yaml"
MOST = 10  # problems in one message


class Problem(NamedTuple):
    """What is wrong with the value of a key."""

    key: str
    reason: str
    nearest: Sequence[str] = ()


def check(args: Sequence[str], experiment: bool = True) -> resolve.Config | None:
    """Check a command line: [EXPERIMENT] [--config FILE ...] [--KEY VALUE ...].

    Returns:
        The config, as far as it is known without torch; None if the command only prints, as --print_config does.

    Raises:
        UserError: A name, file, key or value is wrong. The message lists all wrong keys and values.
    """
    args = expand(args, experiment)
    present = {key for key, _, _ in words(args)}
    if any(key.partition(".")[2].endswith("help") for key in present):
        return None  # --model.net.help CLASS, which the typed parser answers
    config = resolved(args)
    problems = [*_problems(config, CONFIG, "")]
    if not problems and "print_config" not in present:  # which calls no constructor
        problems = [*_out_of_range(config)]
    if problems:
        raise UserError(_message(problems, args))
    return None if "print_config" in present else config


def resolved(args: Sequence[str]) -> resolve.Config:
    """Return the config of a command line."""
    config = resolve.read_config(BASE)
    options = ((key, value) for key, value, _ in words(expand(args)) if key != "print_config")
    for key, value in options:
        if not key:
            raise UserError(f"{value!r} is not an option: give --config NAME or --KEY VALUE")
        if value is None:
            raise UserError(f"--{key} has no value")
        if key == "config":
            config = resolve.merge(config, resolve.read_config(Path(value)))
        else:
            config = resolve.set_option(config, key, value)
    return config


def _message(problems: Sequence[Problem], args: Sequence[str]) -> str:
    several = len(problems) > 1
    lines = [f"{len(problems)} mistakes:"] if several else []
    for problem in problems[:MOST]:
        # The reason may name no argument: then it is not known where the wrong one is set.
        where = [] if problem.key.endswith("init_args") else [*places(problem.key, args, BASE)][-1:]
        hints = [f"set in: {place}" for place in where]
        hints += [f"nearest: {', '.join(problem.nearest)}"] if problem.nearest else []
        text = f"{problem.key}{problem.reason}"
        lines += (
            [f"  {text} ({'; '.join(hints)})" if hints else f"  {text}"]
            if several
            else [text, *map("  {}".format, hints)]
        )
    return "\n".join(lines + (["  ..."] if len(problems) > MOST else []))


def _problems(node: Any, owner: str | None, at: str) -> Iterator[Problem]:
    """Yield what is wrong below the key `at`, whose keys are the parameters of `owner` (None: unknown)."""
    for item in node if isinstance(node, list) else ():
        yield from _problems(item, None, at)
    if not isinstance(node, dict):
        return
    if "class_path" in node:
        owner = None
        yield from _class_problems(node, at)
    accepted = resolve.accepted_keys(node, owner)
    for name, value in node.items():
        key = f"{at}.{name}" if at else str(name)
        if accepted and name not in accepted and not (owner and accepts_more(owner)):
            near = get_close_matches(str(name), [*accepted, *(() if at else resolve.SHORT_KEYS)], 3, 0.5)
            yield Problem(key, ": no such key", [f"{at}.{n}" if at else n for n in near])
            continue
        parameter = parameters(owner).get(name, Parameter()) if owner is not None else Parameter()
        yield from _value_problems(key, value, parameter)
        below, _ = resolve.below(owner, node, name)
        yield from _problems(value, below, key)


def _value_problems(key: str, value: Any, parameter: Parameter) -> Iterator[Problem]:
    if key in ("trainer", "model", "data", "run") and not isinstance(value, dict):
        yield Problem(key, f" must hold keys and values, got {in_yaml(value)}")
    elif not parameter.type.accepts(value):
        near = get_close_matches(str(value), [str(c) for c in parameter.type.choices if isinstance(c, str)], 3, 0.5)
        yield Problem(key, f": expected {parameter.type}, got {in_yaml(value)}", near)
    elif isinstance(value, str) and parameter.base and "str" not in parameter.type.names:
        wrong = _class_problems({"class_path": value}, key)
        is_number = {"int", "float"} & {*parameter.type.names}
        yield from (Problem(key, f": expected {parameter.type}, got {value}") for _ in wrong) if is_number else wrong


def _class_problems(node: Mapping[str, Any], key: str) -> Iterator[Problem]:
    """Yield what is wrong with a class and its arguments: its name, missing arguments."""
    path, arguments = str(node["class_path"]), node.get("init_args") or {}
    if known_refusal(path.rpartition(".")[2]):
        return  # the typed parser explains it
    if find_class(path) is None:
        if not _may_exist(path):
            candidates = _candidates(key)
            near = get_close_matches(path.rpartition(".")[2], candidates, 3, 0.4)
            yield Problem(key, f": no class or config file {path!r}", near or candidates[:8])
    elif "dict_kwargs" not in node and isinstance(arguments, dict):
        for name, parameter in parameters(path).items():
            if parameter.required and name not in arguments:
                yield Problem(key, f": init_args.{name} is required")


def _candidates(key: str) -> list[str]:
    """Return the names of the classes and config files that a key accepts."""
    base = next((p.base for k, p in _class_keys() if k == key.replace("init_args.", "")), None)
    leaves = names.LEAVES.get(key.rpartition(".")[2])
    return [*(names.files(leaves) if leaves else ()), *(p.rpartition(".")[2] for p in subclasses(base or ""))]


def _class_keys() -> Iterator[tuple[str, Parameter]]:
    for group, root in parameters(CONFIG).items():
        for name, parameter in parameters(root.group).items():
            yield f"{group}.{name}", parameter


def _may_exist(path: str) -> bool:
    """Return whether a class that the sources do not show may exist after its module has been imported."""
    module, _, name = path.rpartition(".")
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        return True
    if module:  # a module outside of these is refused before it is imported, by the typed parser
        listed = any(f"{module}.".startswith(f"{space}.") for space in (*ALLOWED, *NAMESPACES))
        return not listed or not lists_its_names(module)
    sources = (file.read_text(encoding="utf-8") for file in Path(__file__).parent.rglob("*.py"))
    defined = re.compile(rf"^\s*class {name}\b|^{name} *=", re.MULTILINE)
    return any(map(defined.search, sources)) or any(name in getattr(m, "__dict__", ()) for m in [*sys.modules.values()])


def _out_of_range(config: resolve.Config) -> Iterator[Problem]:
    """Yield the values that the constructors, and reslab's rules for the Trainer, would refuse."""
    trainer, data, run = (config.get(group, {}) for group in ("trainer", "data", "run"))
    for name, value in trainer.items():
        flag, names_of = FLAGS.get(name), NAMES.get(name, {})
        if flag and not _accepts(flag, value):
            remedy = f": {flag.remedy}" if flag.remedy else ""
            yield Problem(f"trainer.{name}", f" must be {flag.values}, got {in_yaml(value)}{remedy}")
        elif (entry := names_of.get(str(value))) and not entry.works:
            yield Problem(f"trainer.{name}", f": {value} {entry.note}")
    seeds = {"seed_everything": config.get("seed_everything"), "data.split_seed": data.get("split_seed")}
    seeds |= {f"run.seeds.{name}": seed for name, seed in (run.get("seeds") or {}).items()}
    for key, seed in seeds.items():
        if seed is not None and (reason := wrong_seed(seed)):
            yield Problem(key, reason)
    yield from _refused(config, CONFIG, "")


def _accepts(flag: Flag, value: Any) -> bool:
    try:
        return flag.accepts(value)
    except TypeError:  # not a type that the flag compares: the typed parser refuses or converts it
        return True


def wrong_seed(seed: Any) -> str:
    """Return why a value is no seed; "" if it is one."""
    valid = not isinstance(seed, bool) and isinstance(seed, int) and 0 <= seed < 2**32
    return "" if valid else f" must be a whole number from 0 to {2**32 - 1}, got {in_yaml(seed)}"


def _refused(node: Any, owner: str | None, at: str) -> Iterator[Problem]:
    """Yield what the constructors of the config's classes would refuse."""
    if not isinstance(node, dict):
        return
    cls, values = (str(node["class_path"]), node.get("init_args") or {}) if "class_path" in node else (owner, node)
    if cls and isinstance(values, dict) and (reason := _refusal(cls, values)):
        named = [name for name in sorted(values, key=len) if re.search(rf"\b{name}\b", reason)]
        key = ".".join(filter(None, (at, "init_args" if "class_path" in node else "", *named[-1:])))
        name = re.match(r"[\w.]+(?= )", reason)
        same = name is not None and f".{key}".endswith(f".{name[0]}")
        yield Problem(key, reason.removeprefix(name[0]) if same and name else f": {reason}")
    for name, value in node.items():
        below, _ = resolve.below(owner if "class_path" not in node else None, node, name)
        yield from _refused(value, below if name != "init_args" else None, f"{at}.{name}" if at else str(name))


class _Refused(Exception):
    """Stands for the exceptions that a constructor raises."""


_EXCEPTIONS = dict.fromkeys(("ValueError", "TypeError", "UserError", "ModelError", "DataError"), _Refused)
_BUILTINS = {
    f.__name__: f for f in (all, any, len, sorted, list, tuple, set, getattr, min, max, abs, int, float, str, bool, zip)
}


def _refusal(class_path: str, values: Mapping[str, Any]) -> str | None:
    """Run the checks at the start of a constructor, as they stand in the source; return the first refusal."""
    accepted = parameters(class_path)
    arguments = {name: values.get(name, p.default) for name, p in accepted.items()}
    arguments = {
        k: v for k, v in arguments.items() if not isinstance(v, dict | Unknown) and accepted[k].type.accepts(v)
    }
    for statement in constructor_checks(class_path):
        scope = {**_EXCEPTIONS, **arguments, "self": SimpleNamespace(**arguments), "math": math, "re": re}
        module = ast.Module([statement], [])
        try:
            exec(compile(module, class_path, "exec"), {"__builtins__": _BUILTINS, **scope})
        except _Refused as refusal:
            return str(refusal)
        except Exception:
            continue  # it depends on more than the arguments
    return None

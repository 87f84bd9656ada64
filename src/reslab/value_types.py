"""Types of config values, as far as an annotation in the source shows them. Imports no torch."""

from dataclasses import dataclass
from typing import Any, Optional


def in_yaml(value: Any) -> str:
    """Return a value as a config file spells it."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


FALSE_OR_TRUE = ("false", "true", "no", "yes", "off", "on", "0", "1")


@dataclass(frozen=True)
class Type:
    """The union of what a key accepts.

    Args:
        names: Of int, float, bool and str.
        choices: Literal values; None stands for null.
        items: The type of a list's items, if a list is accepted.
        others: Other annotations, such as classes: any value may be right.
    """

    names: tuple[str, ...] = ()
    choices: tuple[Any, ...] = ()
    items: Optional["Type"] = None
    others: tuple[str, ...] = ()

    def __or__(self, other: "Type") -> "Type":
        names, choices = dict.fromkeys(self.names + other.names), dict.fromkeys(self.choices + other.choices)
        return Type(tuple(names), tuple(choices), self.items or other.items, self.others + other.others)

    def __str__(self) -> str:
        literals = [in_yaml(value) for value in self.choices if value is not None]
        parts = [*self.names, *literals, *([f"list of {self.items}"] if self.items else []), *self.others]
        return " | ".join(dict.fromkeys([*parts, *(["null"] if None in self.choices else [])]))

    def accepts(self, value: Any) -> bool:
        """Return False if the typed parser would certainly refuse a value; True also for a doubtful one."""
        if value is None or not isinstance(value, bool | int | float | str | list):
            return True  # jsonargparse accepts null for any argument of a class
        if self.others or "str" in self.names:
            return True
        if isinstance(value, list):
            return self.items is not None and all(map(self.items.accepts, value))
        return self._accepts_text(str(value).lower()) or str(value) in map(str, self.choices)

    def _accepts_text(self, text: str) -> bool:
        """Return whether a scalar, written as text, is a number or a truth value that the type accepts."""
        if "bool" in self.names and text in FALSE_OR_TRUE:
            return True
        try:
            number = float(text)
        except ValueError:
            return False
        return "float" in self.names or ("int" in self.names and number.is_integer())


ANYTHING = Type(others=("any",))

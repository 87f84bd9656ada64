"""Differences between nested mappings: configs, manifests."""

from collections.abc import Iterator
from typing import Any


def differences(there: Any, here: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, value there, value here) for every leaf in which two nested mappings differ.

    A value is None where its mapping lacks the key.
    """
    if isinstance(there, dict) and isinstance(here, dict):
        for name in sorted({*there, *here}):
            yield from differences(there.get(name), here.get(name), f"{key}.{name}" if key else name)
    elif there != here:
        yield key, there, here

"""Run directories: record, metrics, provenance, figures, report, tracking, verification, and the table of all runs."""

from typing import TYPE_CHECKING

from reslab.host import lazy_exports

if TYPE_CHECKING:
    from reslab.runs.listing import table

__all__ = ["table"]
__getattr__ = lazy_exports(__name__, {"listing": ["table"]})

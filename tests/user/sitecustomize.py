"""Make user_code.py importable as reslab.user_code, as if it lay in src/reslab; Python runs this file at start."""

import importlib.util
import sys
from pathlib import Path

FILE = Path(__file__).with_name("user_code.py")


class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):  # type: ignore[no-untyped-def]
        return importlib.util.spec_from_file_location(name, FILE) if name == "reslab.user_code" else None


sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]

"""Rename the package everywhere in this checkout: python scripts/rename.py NEWNAME.

Undo with `git checkout . && git clean -d src`.
"""

import importlib.util
import keyword
import re
import subprocess
import sys
from pathlib import Path

OLD = "reslab"
ROOT = Path(__file__).resolve().parents[1]
KEEP = {"LICENSE"}  # the license requires its notice to be kept


def invalid_reason(new: str) -> str | None:
    """Return why `new` cannot be the name of the package, or None if it can."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", new) or keyword.iskeyword(new):
        return f"a package name consists of lower-case letters, digits and _, and starts with a letter; got {new!r}"
    if importlib.util.find_spec(new) is not None:
        return f"a package named {new!r} already exists"
    return None


def rename(root: Path, new: str) -> int:
    """Replace the name in the contents and paths of all files in the checkout; return the number of changed files."""
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    changed = 0
    for name in filter(None, files.split("\0")):
        path = root / name
        if name not in KEEP and path.is_file():
            changed += _rename_in(path, new)
            target = root / name.replace(OLD, new)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    return changed


def _rename_in(path: Path, new: str) -> bool:
    data = path.read_bytes()
    if b"\0" in data:  # binary
        return False
    renamed = data.replace(OLD.encode(), new.encode()).replace(OLD.upper().encode(), new.upper().encode())
    if renamed != data:
        path.write_bytes(renamed)  # in place, to keep the file mode
    return renamed != data


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: make rename NAME=newname")
    new = sys.argv[1]
    if reason := invalid_reason(new):
        sys.exit(reason)
    count = rename(ROOT, new)
    print(f"renamed {OLD} to {new} in {count} files; next: rm -rf .venv && make setup")


if __name__ == "__main__":
    main()

"""Gives the package another name, everywhere in this checkout: python scripts/rename.py NEWNAME.

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
KEEP = {"LICENSE"}  # the licence asks for its notice to stay


def refusal(new: str) -> str | None:
    """Why `new` cannot be the package's name, if it cannot."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", new) or keyword.iskeyword(new):
        return f"a package's name is lower-case letters, digits and _, beginning with a letter, not {new!r}"
    if importlib.util.find_spec(new) is not None:
        return f"there is a package {new!r} already"
    return None


def rename(root: Path, new: str) -> int:
    """Replaces the name in the text and in the path of every file of the checkout; returns their number."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    changed = 0
    for name in filter(None, listed.split("\0")):
        path = root / name
        if name not in KEEP and path.is_file():
            changed += _rename_in(path, new)
            target = root / name.replace(OLD, new)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    return changed


def _rename_in(path: Path, new: str) -> bool:
    data = path.read_bytes()
    if b"\0" in data:  # no text
        return False
    renamed = data.replace(OLD.encode(), new.encode()).replace(OLD.upper().encode(), new.upper().encode())
    if renamed != data:
        path.write_bytes(renamed)  # in place: the file keeps its mode
    return renamed != data


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: make rename NAME=newname")
    new = sys.argv[1]
    if reason := refusal(new):
        sys.exit(reason)
    count = rename(ROOT, new)
    print(f"{OLD} is {new} now, in {count} files. Next: rm -rf .venv && make setup")


if __name__ == "__main__":
    main()

"""Rename the package everywhere in this checkout: python scripts/rename.py NEWNAME.

Undo with `git checkout . && git clean -d src`.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import keyword
import os
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

OLD = "reslab"
ROOT = Path(__file__).resolve().parents[1]
KEEP = {"LICENSE"}  # the license requires its notice to be kept


def tracked(root: Path) -> list[str]:
    """Return the names of all files that git does not ignore; exit with a message outside of a git repository."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=root, capture_output=True, check=False)
    if listing.returncode:
        sys.exit(f"{root} must be a git repository: {os.fsdecode(listing.stderr).strip()}")
    return [name for name in os.fsdecode(listing.stdout).split("\0") if name and (root / name).is_file()]


def invalid_reason(new: str, root: Path) -> str | None:
    """Return why `new` cannot be the name of the package, or None if it can."""
    if not re.fullmatch(r"[a-z]([a-z0-9_]*[a-z0-9])?", new):
        rule = "lower-case letters, digits and _, begins with a letter and does not end with _"
        return f"a package name consists of {rule}; got {new!r}"
    if new == OLD:
        return f"the package is already called {new!r}"
    if keyword.iskeyword(new) or keyword.issoftkeyword(new):
        return f"{new!r} is a keyword of Python"
    if new in sys.stdlib_module_names or importlib.util.find_spec(new) is not None:
        return f"a package named {new!r} already exists"
    sources = [root / name for name in tracked(root) if name.endswith(".py")]
    if new in {path.stem for path in sources} or (root / new).exists() or any(new in identifiers(p) for p in sources):
        return f"the code uses the name {new!r} already"  # `import data` would be hidden by a variable called data
    return None


def identifiers(source: Path) -> set[str]:
    """Return the names that a Python file uses: variables, attributes, modules."""
    tokens = tokenize.generate_tokens(io.StringIO(source.read_text(encoding="utf-8")).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME}


def rename(root: Path, new: str) -> int:
    """Replace the name in the contents and paths of all files in the checkout; return the number of changed files."""
    changed, left = 0, set()
    for name in tracked(root):
        path, target = root / name, root / name.replace(OLD, new)
        if name not in KEEP:
            changed += _rename_in(path, new) or target != path
        if target != path:
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
            left.update(folder for folder in path.parents if folder.is_relative_to(root) and OLD in str(folder))
    for folder in sorted(left, reverse=True):  # the deepest first
        shutil.rmtree(folder / "__pycache__", ignore_errors=True)
        with contextlib.suppress(OSError):  # it holds files that git ignores
            folder.rmdir()
    shutil.rmtree(root / "src" / f"{OLD}.egg-info", ignore_errors=True)  # of an editable installation
    for manifest in (root / "weights").glob("*/manifest.json"):  # the config names classes of the package
        text, config = manifest.read_text(encoding="utf-8"), (manifest.parent / "config.yaml").read_bytes()
        digest = hashlib.sha256(config).hexdigest()
        manifest.write_text(text.replace(json.loads(text)["config_sha256"], digest), encoding="utf-8")
    return changed


def _rename_in(path: Path, new: str) -> bool:
    data = path.read_bytes()
    if b"\0" in data:  # binary
        return False
    renamed = re.sub(OLD.encode(), lambda match: in_case_of(match[0].decode(), new).encode(), data, flags=re.IGNORECASE)
    if renamed != data:
        path.write_bytes(renamed)  # in place, to keep the file mode
    return renamed != data


def in_case_of(old: str, new: str) -> str:
    """Return the new name written like the old one: RESLAB -> MYLAB, Reslab and ResLab -> Mylab."""
    if old.isupper():
        return new.upper()
    return new if old.islower() else new.capitalize()


def tidy(root: Path, new: str) -> bool:
    """Sort imports and wrap lines by the new name; return False if there is no ruff to do it."""
    if len(new) > len(OLD):  # no tool wraps comments and docstrings
        settings = root / "pyproject.toml"
        settings.write_text(re.sub(r"^ignore = \[", 'ignore = ["E501", ', settings.read_text(), flags=re.MULTILINE))
    if not (ruff := shutil.which("ruff", path=os.pathsep.join([f"{root}/.venv/bin", os.environ.get("PATH", "")]))):
        return False
    for arguments in (["check", "--select=I", "--fix"], ["format"]):
        subprocess.run([ruff, *arguments, "--quiet", "."], cwd=root, check=True)
    return True


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: make rename NAME=newname")
    new = sys.argv[1]
    if reason := invalid_reason(new, ROOT):
        sys.exit(reason)
    count = rename(ROOT, new)
    print(f"renamed {OLD} to {new} in {count} files; LICENSE keeps the name of its authors")
    print(f"next: rm -rf .venv && make {'setup' if tidy(ROOT, new) else 'format'}")


if __name__ == "__main__":
    main()

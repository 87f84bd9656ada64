"""The command `reslab runs clean`: remove checkpoints that finished runs no longer need. No torch at import."""

import os
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reslab.errors import Exit, UserError
from reslab.host import CONFIGS
from reslab.runs import manifest as manifests
from reslab.runs.folder import RunFolder
from reslab.runs.listing import WRONG, Listed, config_values, find_runs
from reslab.runs.listing_text import printable, runs_of
from reslab.runs.query import select

REMOVED = "checkpoints_removed"  # the manifest's record, which `reslab verify` reads
PATTERNS = ("*.ckpt", "*.ckpt.damaged", ".*.part")  # in checkpoints/; all other files are the user's
BEST = "best.ckpt"


class Plan(NamedTuple):
    """Checkpoints of a finished run: those to remove, and those to keep with the reason."""

    run: Listed
    remove: dict[Path, int]  # size in bytes
    keep: dict[Path, str]

    @property
    def size(self) -> int:
        return sum(self.remove.values())


def clean(dirs: Sequence[str], where: Sequence[str], best: bool, yes: bool, dry_run: bool) -> int:
    """Show which checkpoints of finished runs can be removed, ask, and remove them; return the exit status.

    Removed are last.ckpt and previous.ckpt, from which no finished run is resumed, and best.ckpt where it holds the
    weights of weights.safetensors. A checkpoint named by another config is kept, and so is everything of a run that is
    not complete, is in use, or has no intact weights.safetensors.
    """
    everything = find_runs(dirs)
    runs = select(everything, where, None)
    needed = named_checkpoints([*dirs, *(["runs"] if Path("runs").is_dir() else [])])
    plans = [plan(run, needed, best) for run in runs if run.facts["status"] == "complete"]
    _show(runs, plans)
    plans = [p for p in plans if p.remove]
    if not plans or dry_run:
        print("nothing to remove" if not plans else "nothing was removed (--dry-run)")
        return Exit.OK
    if not yes and not _agreed():
        print("nothing was removed")
        return Exit.OK
    return _remove_all(plans)


def plan(run: Listed, needed: Iterable[str], best: bool) -> Plan:
    """Decide about each checkpoint of a finished run; `best` gives up the only copy of its best weights."""
    remove, keep = dict[Path, int](), dict[Path, str]()
    for path in sorted(path for pattern in PATTERNS for path in run.folder.checkpoints.glob(pattern)):
        status = path.lstat()
        if _is_named(path, needed):
            keep[path] = "a config names it"
        elif path.name == BEST and not best and run.config.get("run.test_weights") != "best":
            keep[path] = "the only copy of the best weights (--best removes it, too)"
        elif stat.S_ISREG(status.st_mode):
            remove[path] = status.st_size
    return Plan(run, remove, keep)


def named_checkpoints(dirs: Iterable[str | Path]) -> set[str]:
    """Return all .ckpt files that a config names: of a run or an arm of a study in `dirs`, or in configs/."""
    files = {file for top in dirs for name in ("config.yaml", "arm.yaml") for file in Path(top).rglob(name)}
    files |= {file for top in {CONFIGS, Path("configs")} for file in top.rglob("*.yaml")}
    return {os.path.normpath(Path(text).expanduser()) for file in files for text in _checkpoints_in(file)}


def _checkpoints_in(config: Path) -> list[str]:
    try:
        return [text for text in _texts(config_values(config)) if text.endswith(".ckpt")]
    except WRONG:
        return []


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _is_named(path: Path, names: Iterable[str]) -> bool:
    """Whether a name is that of the file; nobody knows to which directory a relative name is relative."""
    paths = {os.path.abspath(path), os.path.realpath(path)}  # noqa: PTH100
    return any(p == name or p.endswith(f"/{name}") for name in names for p in paths)


def _show(runs: Sequence[Listed], plans: Sequence[Plan]) -> None:
    for p in plans:
        if p.remove:
            names = ", ".join(path.name for path in p.remove)
            print(f"{size(p.size):>9}  {printable(p.run.path)}: {printable(names)}")
    files = sum(len(p.remove) for p in plans)
    if files:
        total = size(sum(p.size for p in plans))
        print(f"{total:>9} in {files} file{'s' * (files > 1)} of {runs_of(sum(bool(p.remove) for p in plans))}")
    kept = Counter((path.name, reason) for p in plans for path, reason in p.keep.items())
    for (name, reason), count in kept.items():
        print(f"kept: {printable(name)} of {runs_of(count)}: {reason}")
    others = Counter(run.facts["status"] for run in runs if run.facts["status"] not in ("complete", "no run"))
    if others:
        print("not touched: " + ", ".join(f"{count} {printable(status)}" for status, count in others.items()))


def size(count: float) -> str:
    """Format a number of bytes: 3.1 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise UserError("there is no terminal to ask on: --yes removes the files, --dry-run only lists them")
    try:
        return input("Remove these files? They cannot be restored. [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _remove_all(plans: Sequence[Plan]) -> int:
    freed, skipped = 0, 0
    for p in plans:
        try:
            freed += remove(p)
        except (UserError, *WRONG) as error:
            skipped += 1
            print(f"skipped {printable(p.run.path)}: {error}", file=sys.stderr)
    print(f"freed {size(freed)}" + (f"; {runs_of(skipped)} skipped, see above" if skipped else ""))
    return Exit.FAILED if skipped else Exit.OK


def remove(plan: Plan) -> int:
    """Remove the checkpoints of a plan and record that in the manifest; return the number of bytes freed.

    The run is locked meanwhile. Raises UserError if it is in use, no longer complete, or its weights are not intact:
    then a checkpoint may be the only copy of them.
    """
    folder = RunFolder(plan.run.path)
    with folder.lock():
        manifest = manifests.read(folder.manifest)
        if manifest["status"] != "complete":
            raise UserError(f"its status is now {manifest['status']}")
        _check_weights(folder, manifest)
        removed = {path.name for path in plan.remove} | set(manifest.get(REMOVED, {}).get("files", []))
        # First the record: if this process is killed here, a checkpoint that is still there is verified as before.
        manifest[REMOVED] = {"at": manifests.now(), "files": sorted(removed)}
        manifests.write(folder.manifest, manifest)
        for path in plan.remove:
            path.unlink(missing_ok=True)
    return plan.size


def _check_weights(folder: RunFolder, manifest: dict[str, Any]) -> None:
    from reslab.runs.verify import weights_digest

    if not os.access(folder.weights, os.R_OK) or weights_digest(folder.weights) != manifest["weights_sha256"]:
        raise UserError(f"{folder.weights.name} is missing or damaged: its checkpoints may be the only copy")

"""Whether a finished run is still what its manifest says, and whether it comes out the same again."""

import csv
import os
import shlex
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from reslab.diff import differences
from reslab.errors import Exit, UserError
from reslab.files import sha256_file
from reslab.host import STOP_SIGNALS
from reslab.runs import manifest as manifests
from reslab.runs.folder import RunFolder

RECORDED = ("config_sha256", "weights_sha256", "data", "environment", "git")
CODE = ("sha", "dirty", "diff_sha256")  # of the manifest's `git`: the same code has the same three
OF_THE_CLOCK = ("step", "images_per_second")  # columns of metrics.csv that no two runs need to share

Steps = Mapping[int, str]  # a metric's values, as they were logged, by optimizer step


@dataclass(frozen=True)
class Check:
    """An item of a run's folder against what was recorded of it; `unknown` where that could not be found out."""

    item: str
    state: Literal["ok", "differs", "missing", "unknown"]
    detail: str = ""


@dataclass(frozen=True)
class Divergence:
    """Where a metric of two runs parts: the first step with different values (None: nothing was logged)."""

    metric: str
    step: int
    there: str | None
    here: str | None


def verify(run: str, overrides: Sequence[str] = ()) -> int:
    """Recomputes every hash of a finished run and prints a line an item; 0 if all are as recorded, else 1.

    Args:
        run: The run folder.
        overrides: Of the run's config, such as --data.root DIR.

    Raises:
        UserError: it is no finished run's folder, or the manifest is damaged.
    """
    folder, manifest = _finished(run)
    found = []
    for check in checks(folder, manifest, overrides):
        print(f"{check.state:<8} {check.item}" + (f": {check.detail}" if check.detail else ""), flush=True)
        found.append(check)
    wrong = [f"{check.item} ({check.state})" for check in found if check.state != "ok"]
    print(f"not as recorded: {', '.join(wrong)}" if wrong else f"all {len(found)} are as recorded in {folder.manifest}")
    return 1 if wrong else 0


def checks(folder: RunFolder, manifest: Mapping[str, Any], overrides: Sequence[str]) -> Iterator[Check]:
    """Config, kept diff, checkpoints, weights and data of a run against its manifest."""
    config = _file(folder.config, manifest["config_sha256"])
    yield config
    git = manifest["git"] or {}
    if git.get("diff"):
        yield _file(folder.path / git["diff"], git["diff_sha256"])
    yield from _checkpoints(folder.checkpoints)
    yield _weights(folder.weights, manifest["weights_sha256"])
    if config.state == "ok":
        yield from _data(folder.config, manifest["data"], overrides)
    else:
        yield Check("data", "unknown", "which they are stands in config.yaml, and that is not the run's")


def _finished(run: str) -> tuple[RunFolder, dict[str, Any]]:
    folder = RunFolder.existing(run)
    manifest = manifests.read(folder.manifest)
    if not isinstance(manifest, dict) or "status" not in manifest:
        raise UserError(f"{folder.manifest} is damaged: it is no run's manifest")
    if manifest["status"] != "complete":
        remedy = shlex.join(["reslab", "fit", "--config", str(folder.config), "--run.dir", run])
        raise UserError(f"{run} is not finished (status: {manifest['status']}). To go on with it: {remedy}")
    if lacking := [name for name in RECORDED if name not in manifest]:
        raise UserError(f"{folder.manifest} is damaged: it lacks {', '.join(lacking)}")
    return folder, manifest


def _same(item: str, recorded: str, found: str) -> Check:
    if found == recorded:
        return Check(item, "ok")
    return Check(item, "differs", f"SHA-256 {_short(recorded)} recorded, {_short(found)} found")


def _short(digest: str | None) -> str:
    return f"{digest[:12]}…" if digest else "none"


def _file(path: Path, recorded: str) -> Check:
    return _same(path.name, recorded, sha256_file(path)) if path.exists() else Check(path.name, "missing")


def _checkpoints(folder: Path) -> Iterator[Check]:
    from reslab.training.checkpoint import SUMS, checksum_matches, read_sums

    if not (folder / SUMS).exists():
        yield Check(f"{folder.name}/{SUMS}", "missing")
    for name in sorted({*read_sums(folder), *(path.name for path in folder.glob("*.ckpt"))}):
        item = f"{folder.name}/{name}"
        if not (folder / name).exists():
            yield Check(item, "missing")
        elif checksum_matches(folder / name):
            yield Check(item, "ok")
        else:
            yield Check(item, "differs", f"its SHA-256 is not in {SUMS}")


def _weights(path: Path, recorded: str) -> Check:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from reslab.training.checkpoint import weights_sha256

    if not path.exists():
        return Check(path.name, "missing")
    try:
        return _same(path.name, recorded, weights_sha256(load_file(path)))
    except SafetensorError as error:
        return Check(path.name, "differs", f"it cannot be read: {error}")


def _data(config: Path, recorded: Mapping[str, str], overrides: Sequence[str]) -> Iterator[Check]:
    from reslab.config import Experiment

    experiment = Experiment(["--config", str(config), *overrides])
    try:
        found = experiment.build()[0].fingerprint()
    except (UserError, OSError) as error:
        yield Check("data", "missing", str(error))
        return
    for name, digest in found.items():
        yield _same(f"data: {name}", recorded.get(name, ""), digest)


def reproduce(run: str, out: str | None = None, overrides: Sequence[str] = ()) -> int:
    """Runs a finished run's config again in a new folder and compares weights and metrics.

    An unfinished reproduction in that folder is continued, a finished one only compared.

    Args:
        run: The run folder.
        out: The new folder; by default RUN-reproduced, beside it.
        overrides: Of the run's config, such as --data.root DIR.

    Returns:
        The exit status: 0 identical, 1 not or it failed, 75 preempted.

    Raises:
        UserError: it is no finished run's folder, or what is in it is not what the manifest says.
    """
    folder, manifest = _finished(run)
    again = RunFolder(out or f"{folder.path.resolve()}-reproduced")
    if again.path.resolve() == folder.path.resolve():
        raise UserError(f"--out {out} is the run itself: give another folder")
    config = _file(folder.config, manifest["config_sha256"])
    if config.state != "ok":
        raise UserError(f"{folder.config} is not the config of this run any more: {config.detail or config.state}")
    logged = _logged(folder.metrics)
    _say_where_the_code_differs(folder, manifest["git"])
    status = _fit(folder.config, again.path, overrides, manifest["environment"])
    if status:
        print(f"the reproduction itself did not come to its end (exit status {status}): see above. {again.path}")
        return Exit.PREEMPTED if status == Exit.PREEMPTED else Exit.FAILED
    return _conclude(folder, again, divergences(logged, _logged(again.metrics)))


def _say_where_the_code_differs(folder: RunFolder, then: dict[str, Any] | None) -> None:
    now = manifests.git_state(Path(__file__).parent)
    parts = list(differences(_code(then), _code(now)))
    if not parts:
        return
    print("the code is not the run's, so the weights may differ:")
    print(*(f"  {key}: {a} there, {b} here" for key, a, b in parts), sep="\n", flush=True)
    if then:
        apply = f" && git apply {shlex.quote(str(folder.path.resolve() / then['diff']))}" if then.get("diff") else ""
        print(f"  the run's code, in a clean clone: git checkout {then['sha']}{apply}", flush=True)


def _code(git: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: (git or {}).get(name) for name in CODE}


def _fit(config: Path, out: Path, overrides: Sequence[str], environment: Mapping[str, Any]) -> int:
    """Runs `reslab fit` in a process of its own; returns its exit status."""
    command = [sys.executable, "-m", "reslab", "fit", "--config", str(config), "--run.dir", str(out)]
    command += ["--trainer.logger", "false", *overrides]  # no second run in W&B
    variables = {**determinism_env(environment), **os.environ}
    # In a session of its own a signal reaches it once, through this process, also when the terminal sends it to both.
    with subprocess.Popen(command, env=variables, start_new_session=True) as process:
        handlers = {n: signal.signal(n, lambda number, _: process.send_signal(number)) for n in STOP_SIGNALS}
        try:
            return process.wait()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def determinism_env(environment: Mapping[str, Any]) -> dict[str, str]:
    """Environment variables that make this machine's threads and cuBLAS the run's, as far as it can."""
    variables = {}
    if environment["threads"] <= (os.cpu_count() or 1):  # more threads than cores would take forever
        variables["OMP_NUM_THREADS"] = str(environment["threads"])
    if workspace := environment["determinism"].get("CUBLAS_WORKSPACE_CONFIG"):
        variables["CUBLAS_WORKSPACE_CONFIG"] = workspace
    return variables


def _conclude(folder: RunFolder, again: RunFolder, parted: Sequence[Divergence]) -> int:
    there, here = (manifests.read(f.manifest)["weights_sha256"] for f in (folder, again))
    print(f"run           {folder.path}  weights {_short(there)}")
    print(f"reproduction  {again.path}  weights {_short(here)}")
    if there == here and not parted:
        print("identical: the weights, and every logged metric at every step")
        return 0
    print(f"not identical: the weights {'are the same' if there == here else 'differ'}")
    if parted:
        print(f"the metrics part at step {parted[0].step}:")
    else:
        print("no logged metric differs")
    for p in parted:
        print(f"  {p.metric:<12} from step {p.step}: {_value(p.there)} there, {_value(p.here)} here")
    explanations = list(differences(_circumstances(folder), _circumstances(again)))
    print("what may explain it:" if explanations else "nothing that the manifests record differs")
    for key, then, now in explanations:
        print(f"  {key}: {then} there, {now} here")
    return 1


def _value(logged: str | None) -> str:
    return "nothing" if logged is None else logged


def _circumstances(folder: RunFolder) -> dict[str, Any]:
    manifest = manifests.read(folder.manifest)
    config = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    del config["trainer"]["logger"]  # `_fit` has turned it off
    recorded = {name: manifest[name] for name in ("environment", "data")}
    return {"git": _code(manifest["git"]), **recorded, "config": config}


def _logged(path: Path) -> dict[str, Steps]:
    """The metrics in metrics.csv by name; raises UserError where the file is missing or broken."""
    metrics: dict[str, dict[int, str]] = defaultdict(dict)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if value and name not in OF_THE_CLOCK:
                        metrics[name][int(row["step"])] = value
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read the metrics {path}: {error}") from error
    return dict(metrics)


def divergences(there: Mapping[str, Steps], here: Mapping[str, Steps]) -> list[Divergence]:
    """Each metric that differs between two runs, with the first step where it does; the earliest first."""
    found = []
    for name in {*there, *here}:
        a, b = there.get(name, {}), here.get(name, {})
        steps = [step for step in {*a, *b} if a.get(step) != b.get(step)]
        if steps:
            found.append(Divergence(name, min(steps), a.get(min(steps)), b.get(min(steps))))
    return sorted(found, key=lambda parting: (parting.step, parting.metric))

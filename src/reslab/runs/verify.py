"""Check that a finished run matches its manifest, and that it can be reproduced bit for bit."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from reslab.diff import differences
from reslab.errors import Exit, UserError
from reslab.files import sha256_file
from reslab.host import handling_signals
from reslab.runs import manifest as manifests
from reslab.runs.folder import RunFolder
from reslab.runs.metrics import read_rows

RECORDED = ("status", "config_sha256", "weights_sha256", "data", "environment", "git")
CODE = ("sha", "dirty", "diff_sha256")  # these entries of the manifest's `git` identify the code
NOT_COMPARED = ("step", "images_per_second")  # columns of metrics.csv that are no metrics or depend on the clock

Steps = Mapping[int, str]  # a metric's values, as they were logged, by optimizer step


class Check(NamedTuple):
    """One item of a run directory compared with its record; `unknown` if it could not be compared."""

    item: str
    state: Literal["ok", "differs", "missing", "unknown"]
    detail: str = ""


class Divergence(NamedTuple):
    """The first step at which a metric of two runs differs; a value is None if the run logged none."""

    metric: str
    step: int
    original: str | None
    reproduction: str | None


def verify(run: str, overrides: Sequence[str] = ()) -> int:
    """Recompute every hash of a finished run and print one line per item; return 0 if all match, else 1.

    `overrides` change the run's config: --data.root DIR, for example. Raises UserError if the directory `run` holds
    no finished run, or its manifest is damaged.
    """
    folder, manifest = finished(run)
    items = []
    for check in checks(folder, manifest, overrides):
        print(f"{check.state:<8} {check.item}" + (f": {check.detail}" if check.detail else ""), flush=True)
        items.append(check)
    wrong = [f"{check.item} ({check.state})" for check in items if check.state != "ok"]
    print(f"not as recorded: {', '.join(wrong)}" if wrong else f"all {len(items)} are as recorded in {folder.manifest}")
    return Exit.FAILED if wrong else Exit.OK


def checks(folder: RunFolder, manifest: Mapping[str, Any], overrides: Sequence[str]) -> Iterator[Check]:
    """Compare config, saved diff, checkpoints, weights and data of a run with its manifest."""
    config = _file(folder.config, manifest["config_sha256"])
    yield config
    git = manifest["git"] or {}
    if git.get("diff"):
        yield _file(folder.path / git["diff"], git["diff_sha256"])
    yield from _checkpoints(folder.checkpoints, manifest.get("checkpoints_removed") or {})
    yield _file(folder.weights, manifest["weights_sha256"], weights_digest)
    if config.state == "ok":
        yield from _data(folder, manifest, overrides)
    else:
        yield Check("data", "unknown", "config.yaml describes the data, and it is not the run's")


def finished(run: str) -> tuple[RunFolder, dict[str, Any]]:
    """Return the directory and manifest of a run; raise UserError if it is not finished, or its manifest is damaged."""
    folder = RunFolder.existing(run)
    manifest = manifests.read(folder.manifest)
    if isinstance(manifest, dict) and (status := manifest.get("status", "complete")) != "complete":
        command = shlex.join(["reslab", "fit", "--config", str(folder.config), "--run.dir", run])
        raise UserError(f"{run} is not finished (status: {status}). To resume it: {command}")
    if missing := [name for name in RECORDED if name not in manifest]:
        raise UserError(f"{folder.manifest} is damaged: it is not the manifest of a run: it lacks {', '.join(missing)}")
    return folder, manifest


def check_weights(folder: RunFolder, manifest: Mapping[str, Any]) -> None:
    """Raise UserError if the weights of a run are not those that it tested."""
    check = _file(folder.weights, manifest["weights_sha256"], weights_digest)
    if check.state != "ok":
        raise UserError(
            f"{folder.weights} does not hold the weights that the run tested: {check.detail or check.state}"
        )


def _compare(item: str, recorded: str, digest: str) -> Check:
    if digest == recorded:
        return Check(item, "ok")
    return Check(item, "differs", f"SHA-256 is {digest:.12}..., recorded is {recorded:.12}...")


def _file(path: Path, recorded: str, digest: Callable[[Path], str] = sha256_file) -> Check:
    return _compare(path.name, recorded, digest(path)) if path.exists() else Check(path.name, "missing")


def _checkpoints(folder: Path, removed: Mapping[str, Any]) -> Iterator[Check]:
    from reslab.training.checkpoint import SUMS, checksum_matches, read_sums

    if not (folder / SUMS).exists():
        yield Check(f"{folder.name}/{SUMS}", "missing")
    for name in sorted({*read_sums(folder), *(path.name for path in folder.glob("*.ckpt"))}):
        item, path = f"{folder.name}/{name}", folder / name
        if path.exists():
            intact = checksum_matches(path)
            yield Check(item, "ok") if intact else Check(item, "differs", f"its SHA-256 is not in {SUMS}")
        elif name in removed.get("files", ()):
            yield Check(item, "ok", f"removed by `reslab runs clean`, {removed['at']}")
        else:
            yield Check(item, "missing")


def weights_digest(path: Path) -> str:
    """Return the SHA-256 of the weights in a .safetensors file, as in the manifest; "unreadable" if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from reslab.training.checkpoint import weights_sha256

    try:
        return weights_sha256(load_file(path))
    except SafetensorError:
        return "unreadable"


def _data(folder: RunFolder, manifest: Mapping[str, Any], overrides: Sequence[str]) -> Iterator[Check]:
    from reslab.config import Experiment

    experiment, recorded = Experiment(["--config", str(folder.config), *overrides]), manifest["data"]
    try:
        identity = experiment.build()[0].identity()
    except (UserError, OSError) as error:
        yield Check("data", "missing", str(error))
        return
    different, changes = identity.differs(recorded), "; ".join(identity.changes(recorded, folder.data))
    for name in identity.hashes:
        yield Check(f"data: {name}", "differs" if name in different else "ok", changes if name in different else "")
    for attempt in manifest.get("attempts", []):
        if "data_change" in attempt:
            change = f"the attempt of {attempt['started']} resumed on other data: {'; '.join(attempt['data_change'])}"
            yield Check("data: constant", "differs", change)


def reproduce(run: str, out: str | None = None, compare: str | None = None, overrides: Sequence[str] = ()) -> int:
    """Run a finished run's config again in a new directory and compare weights and metrics.

    Args:
        run: The run directory.
        out: Directory of the new run; default: RUN-reproduced, RUN-reproduced-2 and so on. An unfinished reproduction
            by the same code is resumed.
        compare: Run nothing, and compare with the finished run in this directory.
        overrides: Change the run's config: --data.root DIR, for example.

    Returns:
        Exit status: 0 identical, 1 different or failed, 75 preempted.

    Raises:
        UserError: As `verify` does, or if the metrics or the run's data are missing.
    """
    folder, manifest = finished(run)
    logged = _logged(folder.metrics)
    if compare:
        earlier, record = finished(compare)
        print(f"nothing is run: {compare} finished at {record['attempts'][-1]['ended']}")
        return _compare_runs(folder, earlier, divergences(logged, _logged(earlier.metrics)))
    copy = _reproduction(folder, out)
    if (config := _file(folder.config, manifest["config_sha256"])).state != "ok":
        raise UserError(f"{folder.config} is no longer the config of this run: {config.detail or config.state}")
    if changed := [check for check in _data(folder, manifest, overrides) if check.state != "ok"]:
        raise UserError(f"{run} cannot be reproduced: the data are not its data: {changed[0].detail}")
    _warn_if_code_differs(folder, manifest["git"])
    status = _fit(folder.config, copy.path, [*_same_revisions(manifest), *overrides], manifest["environment"])
    if status:
        print(f"the reproduction did not finish (exit status {status}): see above. {copy.path}")
        return Exit.PREEMPTED if status == Exit.PREEMPTED else Exit.FAILED
    return _compare_runs(folder, copy, divergences(logged, _logged(copy.metrics)))


def _reproduction(folder: RunFolder, out: str | None) -> RunFolder:
    """Return the directory of a new reproduction, or of an unfinished one by the same code."""
    name = f"{folder.path.resolve()}-reproduced"
    names = [out] if out else chain([name], (f"{name}-{n}" for n in count(2)))
    for path in map(Path, names):
        copy = RunFolder(path)
        if path.resolve() == folder.path.resolve():
            raise UserError(f"--out {out} is the run itself: choose another directory")
        if not copy.manifest.exists():
            return copy
        manifest = manifests.read(copy.manifest)
        same_code = _code(manifest.get("git")) == _code(manifests.git_state(Path(__file__).parent))
        if manifest.get("status") != "complete" and same_code:
            return copy
    state = "a finished run" if manifest.get("status") == "complete" else "an unfinished run of other code"
    raise UserError(f"--out {out} holds {state}: choose another directory; --compare {out} compares without running")


def _warn_if_code_differs(folder: RunFolder, git: dict[str, Any] | None) -> None:
    rows = list(differences(_code(git), _code(manifests.git_state(Path(__file__).parent))))
    if not rows:
        return
    print("the code has changed since the run, so the weights may differ:")
    print(*(f"  {key}: {old} (run) != {new} (now)" for key, old, new in rows), sep="\n", flush=True)
    if git:
        apply = f" && git apply {shlex.quote(str(folder.path.resolve() / git['diff']))}" if git.get("diff") else ""
        print(f"  to restore the run's code in a clean clone: git checkout {git['sha']}{apply}", flush=True)


def _code(git: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: (git or {}).get(name) for name in CODE}


def _same_revisions(manifest: Mapping[str, Any]) -> list[str]:
    """Return the overrides that load weights of the Hugging Face Hub from the commits that the run used."""
    sources = {
        "model.weights": manifest.get("pretrained", {}).get("source"),
        "model.objective.init_args.weights": manifest.get("objective", {}).get("teacher_weights"),
    }
    return [f"--{key}={source}" for key, source in sources.items() if source and source.startswith("hf://")]


def _fit(config: Path, out: Path, overrides: Sequence[str], environment: Mapping[str, Any]) -> int:
    """Run `reslab fit` in a new process, with the threads and cuBLAS workspace recorded; return its exit status."""
    command = [sys.executable, "-m", "reslab", "fit", "--config", str(config), "--run.dir", str(out)]
    command += ["--trainer.logger", "false", *overrides]  # no second run in W&B
    variables = dict(os.environ)
    if environment["threads"] <= (os.cpu_count() or 1):  # more threads than cores would be extremely slow
        variables.setdefault("OMP_NUM_THREADS", str(environment["threads"]))
    if workspace := environment["determinism"].get("CUBLAS_WORKSPACE_CONFIG"):
        variables.setdefault("CUBLAS_WORKSPACE_CONFIG", workspace)
    # In a new session: a signal from the terminal would otherwise reach the process twice, directly and from here.
    process = subprocess.Popen(command, env=variables, start_new_session=True)
    with process, handling_signals(lambda number, _: process.send_signal(number)):
        return process.wait()


def _compare_runs(folder: RunFolder, copy: RunFolder, diverging: Sequence[Divergence]) -> int:
    first, second = (manifests.read(f.manifest)["weights_sha256"] for f in (folder, copy))
    print(f"run           {folder.path}  weights {first:.12}...\nreproduction  {copy.path}  weights {second:.12}...")
    same = first == second
    if same and not diverging:
        print("identical: the weights, and every logged metric at every step")
        return Exit.OK
    print(f"not identical: the weights {'are the same' if same else 'differ'}")
    print(f"the metrics differ from step {diverging[0].step} on:" if diverging else "no logged metric differs")
    for d in diverging:
        print(f"  {d.metric:<12} from step {d.step}: {d.original} (run) != {d.reproduction} (reproduction)")
    causes = list(differences(_circumstances(folder), _circumstances(copy)))
    print("possible causes:" if causes else "the manifests record no difference that could explain it")
    for key, old, new in causes:
        print(f"  {key}: {old} (run) != {new} (reproduction)")
    return Exit.FAILED


def _circumstances(folder: RunFolder) -> dict[str, Any]:
    manifest = manifests.read(folder.manifest)
    config = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    del config["trainer"]["logger"]  # `_fit` has turned it off
    recorded = {name: manifest.get(name) for name in ("environment", "data", "pretrained")}
    return {"git": _code(manifest["git"]), **recorded, "config": config}


def _logged(path: Path) -> dict[str, Steps]:
    """Read the logged metrics by name; raise UserError if there are none."""
    columns, rows = read_rows(path)
    if not columns:
        raise UserError(f"{path} is missing or empty: there are no metrics to compare")
    names = [name for name in columns if name not in NOT_COMPARED]
    return {name: {int(row["step"]): row[name] for row in rows if row[name]} for name in names}


def divergences(original: Mapping[str, Steps], reproduction: Mapping[str, Steps]) -> list[Divergence]:
    """Return each metric that differs between two runs, with the first step where it does; the earliest first."""
    diverging = []
    for name in {*original, *reproduction}:
        a, b = original.get(name, {}), reproduction.get(name, {})
        if steps := [step for step in {*a, *b} if a.get(step) != b.get(step)]:
            diverging.append(Divergence(name, min(steps), a.get(min(steps)), b.get(min(steps))))
    return sorted(diverging, key=lambda d: (d.step, d.metric))

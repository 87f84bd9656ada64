"""Report of a study, finished or not: tables, a page, figures. Imports no torch."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment

from reslab.ablation import wording
from reslab.ablation.analysis import analyse, of_metric, results
from reslab.ablation.cells import State, states
from reslab.ablation.figures import CAPTIONS, draw_figures
from reslab.ablation.looks import decided_at, without_unneeded
from reslab.ablation.study import Study
from reslab.ablation.wording import Unit
from reslab.files import write_text
from reslab.runs.folder import RunFolder
from reslab.runs.manifest import duration
from reslab.runs.metrics import read_rows, series
from reslab.runs.report import embed, templates

REPORT = "report.json"


def write_report(study: Study, out: Path) -> Path:
    """Write results.csv, report.json, report.md, table.tex, figures/ and report.html; return the path of the page.

    Works at any time, and lists the cells without a result. The same results give the same results.csv, byte for byte.

    Raises:
        UserError: cells have finished, but none logged the study's metric.
    """
    out.mkdir(parents=True, exist_ok=True)
    current = _ordered_states(study, out)
    table = results(study, current)
    report = analyse(study, out, current)
    report["curve"], curves = _curves(study, current)
    write_text(out / "results.csv", table.to_csv(index=False, lineterminator="\n"))
    write_text(out / REPORT, json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    draw_figures(report, of_metric(study, table), curves, out / "figures")
    texts = _texts(report) | {"points": Unit(percent=True, decimals=2), "figures": embed(out / "figures", CAPTIONS)}
    texts["cells"] = table.reindex(columns=["arm", "seed", "status", study.metric]).to_numpy().tolist()
    environment = _environment()
    for name in ("report.md", "table.tex", "report.html"):
        write_text(out / name, environment.get_template(f"{name}.j2").render(texts))
    return out / "report.html"


def read_report(out: Path) -> tuple[dict[str, Any], str]:
    """Return the content of report.json, and its text."""
    text = (out / REPORT).read_text(encoding="utf-8")
    return json.loads(text), text


def current_report(study: Study, out: Path) -> dict[str, Any]:
    """Return the content of report.json as the cells are now; writes nothing."""
    return analyse(study, out, _ordered_states(study, out))


def sentences(report: dict[str, Any]) -> dict[str, str]:
    """Return the verdict of every arm but the baseline as a sentence."""
    module = _environment().get_template("sentences.j2").make_module(_texts(report))
    arms = {name: arm for name, arm in report["arms"].items() if name != report["baseline"]}
    return {name: " ".join(module.answer(name, arm).split()) for name, arm in arms.items()}  # type: ignore[attr-defined]


def _ordered_states(study: Study, out: Path) -> list[State]:
    order = list(study.arms)
    current = without_unneeded(study, states(study, out), decided_at(study, out))
    return sorted(current, key=lambda state: order.index(state.cell.arm))


def _texts(report: dict[str, Any]) -> dict[str, Any]:
    unit = Unit.of(report)
    arms = [wording.row(name, arm, report, unit) for name, arm in report["arms"].items()]
    return {"report": report, "unit": unit, "arms": arms, "best": wording.best(report)}


def _environment() -> Environment:
    environment = templates(Path(__file__).parent)
    environment.filters |= {"tex": wording.tex, "md": wording.markdown, "duration": duration, "equals": wording.equals}
    environment.filters |= {"named": wording.named, "counted": wording.count}
    environment.filters |= {"interval": wording.interval, "probability": wording.probability}
    environment.filters |= {"by_label": wording.by_label, "percent": wording.percent, "sd": wording.sd}
    return environment


def log_summary(study: Study, out: Path) -> None:
    """Log the report's table, page and figures to W&B as one run of the study's group, if the study's runs use W&B.

    The run's id follows from the plan, so a later report of the same plan updates the same run. Errors are not fatal.
    """
    options = _wandb_options(study)
    if options is None:
        return
    from reslab.runs.tracking import WandB  # imports torch

    report = read_report(out)[0]
    identity = hashlib.sha256(f"{study.name} {study.hash}".encode()).hexdigest()[:16]
    tracker = WandB(**options)
    about = {"plan": report["plan"], **study.about()}
    tracker.start(out, f"study-{identity}", f"{study.name} report", about, group=study.name, job_type="report")
    arms = pd.DataFrame.from_dict(report["arms"], "index").drop(columns=["levels", "changes", "cells"])
    tables = {"arms": arms.rename_axis("arm").reset_index(), "cells": pd.read_csv(out / "results.csv")}
    means = {f"{name}/{report['metric']}": arm["mean"] for name, arm in report["arms"].items()}
    tracker.finish(means, [*sorted((out / "figures").glob("*.png")), out / "report.html"], tables)


def _wandb_options(study: Study) -> dict[str, Any] | None:
    """Return the arguments of the WandB logger in any arm's config; None if there is none."""
    for arm in study.arms.values():
        loggers = (arm.config.get("trainer") or {}).get("logger")
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if isinstance(logger, dict) and str(logger.get("class_path", "")).rpartition(".")[2] == "WandB":
                return dict(logger.get("init_args") or {})
    return None


def _curves(study: Study, current: Sequence[State]) -> tuple[str, dict[str, pd.DataFrame]]:
    """Return the metric's name in training, and its values by arm: one row per step, one column per seed."""
    name = study.metric.rpartition("/")[2]
    done = [state for state in current if state.status == "complete"]
    for metric in (f"val/{name}", f"train/{name}"):
        curves: dict[str, dict[int, pd.Series]] = {}
        for state in done:
            steps, values = series(read_rows(RunFolder(state.cell.folder).metrics)[1], metric)
            if len(steps):
                curves.setdefault(state.cell.arm, {})[state.cell.seed] = pd.Series(values, steps)
        if curves:
            return metric, {arm: pd.concat(curves[arm], axis=1) for arm in study.arms if arm in curves}
    return f"val/{name}", {}

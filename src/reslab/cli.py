"""Command line interface. Commands import torch and lightning lazily, when they run."""

import argparse
import contextlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reslab import __version__
from reslab.errors import Exit, UserError
from reslab.header import print_header
from reslab.host import quick_imports
from reslab.interrupt import close, guarded, resume_hint
from reslab.lists import KINDS
from reslab.quiet import drop_unhelpful, silenced
from reslab.runs.masking import mask_command
from reslab.training.launchers import started_processes

if TYPE_CHECKING:
    from reslab.ablation.study import Study

ONE_PROCESS = (
    "predict",
    "export",
    "preview",
    "ablate",
    "search",
    "push",
)  # commands whose copies would write the same files


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status (see `reslab.errors.Exit`)."""
    return guarded(partial(_main, list(sys.argv[1:] if argv is None else argv)))


def _main(argv: list[str]) -> int:
    try:
        if argv[:1] == ["fit"]:  # LightningCLI parses its options
            return _fit(argv[1:])
        if argv[:2] == ["runs", "clean"]:
            argv = ["runs clean", *argv[2:]]
        args, overrides = _parser().parse_known_args(argv)
        _refuse_copies(argv[0])
        options = vars(args)
        if argv[:2] == ["ablate", "run"] or argv[:1] == ["search"]:
            options["command"] = mask_command(["reslab", *argv])
        if options.pop("takes_config"):
            _check(options, overrides)
            options["overrides"] = overrides
        elif overrides:
            raise UserError(f"unrecognized arguments: {' '.join(overrides)} (see `reslab {argv[0]} --help`)")
        with silenced():
            return _call(**options)
    except UserError as error:
        print(f"reslab: {error}", file=sys.stderr)
        return Exit.USAGE
    except BrokenPipeError:  # `reslab list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _fit(argv: list[str]) -> int:
    from reslab.check import check
    from reslab.help import fit_help, key_help

    if not argv:
        raise UserError("name an experiment: `reslab fit digits`; `reslab list experiments` shows all")
    for i, word in enumerate(argv):
        if word.partition("=")[0] in ("--help", "-h"):
            key = word.partition("=")[2] or next((w for w in argv[i + 1 : i + 2]), "")
            print(key_help(key) if key else fit_help())
            return Exit.OK
    if config := check(argv):
        print_header(config, argv)
    drop_unhelpful()
    return _call("experiment:fit", argv=argv)


def _check(options: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Report what is wrong with a run directory or a config in about a second, before torch is imported."""
    from reslab.check import check

    if "run" in options:
        from reslab.runs.folder import RunFolder

        folder = RunFolder.existing(options["run"])
        if overrides:
            check(["--config", str(folder.config), *overrides], experiment=False)
    elif overrides and "name" not in options:  # a study checks its own
        check(overrides)


def _refuse_copies(command: str) -> None:
    """Raise UserError if a launcher such as torchrun started several processes of a command that needs one."""
    for by, processes, _ in started_processes(os.environ):
        if command in ONE_PROCESS and processes > 1:
            raise UserError(f"{by.name} started {processes} processes, reslab {command} runs in one: start it directly")


def _call(target: str, **options: Any) -> int:
    """Import and call `module:function`; return its exit status."""
    name, function = target.split(":")
    with quick_imports():
        module = importlib.import_module(f"reslab.{name}")
    return getattr(module, function)(**options) or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reslab",
        description="Reproducible image-classification experiments with PyTorch Lightning.",
        epilog="Start with: reslab fit digits",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"reslab {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, help: str, takes_config: bool = True, **defaults: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        command.set_defaults(takes_config=takes_config, **defaults)
        return command

    def add_for_run(name: str, help: str, **defaults: Any) -> argparse.ArgumentParser:
        command = add(name, help, **defaults)
        command.add_argument("run", metavar="RUN", help="run directory")
        return command

    add("fit", "train and test: EXPERIMENT [--config NAME ...] [--KEY VALUE ...]; see fit --help")
    command = add("keys", "list the config keys that contain a word, with defaults", False, target="cli:_list_keys")
    command.add_argument("word", nargs="?", metavar="WORD", help="part of a key, or a class; default: all keys")
    _add_run_commands(add_for_run)
    _add_ablate(add("ablate", "plan, run and report an ablation study: arms × seeds in, a verdict out"))
    _add_search(
        add("search", "search hyperparameters on validation data: FILE [--KEY VALUE ...]", target="search.run:search")
    )
    help = "compare finished runs with others, or with a published number: a test, a verdict, one page"
    _add_compare(add("compare", help, False, target="ablation.compare:compare_runs"))
    _add_runs(add("runs", "list all runs: [DIR ...] [--where KEY=VALUE] [--sort KEY]", False))
    _add_runs_clean(add("runs clean", "remove checkpoints that finished runs no longer need", False))
    help = "list the names of experiments, models, data sets, recipes, studies, ..."
    command = add("list", help, False, target="lists:show_names")
    command.add_argument("what", nargs="?", choices=[*KINDS], metavar="KIND", help=f"{', '.join(KINDS)}; default: all")
    command.add_argument("pattern", nargs="?", help="with models: timm, torchvision, or 'timm/convnext*'")
    command = add("summary", "print a model's layers: shapes, parameters, FLOPs", False, target="cli:_summary")
    command.add_argument("model", help="a name from `reslab list models`, timm/NAME, torchvision/NAME, or a config")
    command.add_argument("--input", default="224", type=shape, metavar="SIZE", help="224, or C,H,W; default 3,224,224")
    command.add_argument("--classes", default=1000, type=int, metavar="N", help="default 1000")
    _add_push(add("push", "publish a finished run on the Hugging Face Hub: RUN OWNER/NAME", False, target="hub:push"))
    add("doctor", "check the machine, and an experiment's data: [EXPERIMENT]", target="doctor:examine")
    help = "plot an experiment's learning rate, augmented images, or a learning-rate range test: WHAT EXPERIMENT"
    _add_preview(add("preview", help, target="preview:preview"))
    return parser


def _add_run_commands(add_for_run: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands that use one finished run."""
    for name, split in (("validate", "validation"), ("test", "test")):
        help = f"evaluate a finished run on its {split} set: RUN [--data.root DIR]"
        command = add_for_run(name, help, target="inference:evaluate", split=split)
        if name == "test":
            _add_test_sets(command)
    command = add_for_run("predict", "classify image files with a run's weights", target="inference:predict")
    command.add_argument("--images", required=True, metavar="DIR", help="directory of images, searched recursively")
    help = "CSV file with one row per image (default: RUN/predictions-<name of DIR>.csv)"
    command.add_argument("--out", type=Path, metavar="FILE.csv", help=help)
    command.add_argument("--all", dest="all_classes", action="store_true", help="add one probability column per class")
    _add_export(add_for_run("export", "export to ONNX, torch.export (pt2) or safetensors", target="export:export"))
    add_for_run("verify", "verify a run's hashes: RUN [--data.root DIR]", target="runs.verify:verify")
    help = "repeat a finished run and compare: RUN [--KEY VALUE ...]"
    command = add_for_run("reproduce", help, target="runs.verify:reproduce")
    command.add_argument("--out", metavar="DIR", help="directory of the new run (default: RUN-reproduced, -2, ...)")
    command.add_argument("--compare", metavar="DIR", help="run nothing: compare with the finished run in DIR")


def _add_test_sets(command: argparse.ArgumentParser) -> None:
    help = "evaluate on another test set instead, and record the results; a file or name of configs/data; repeatable"
    command.add_argument("--on", action="append", default=[], metavar="SET", help=help)


def _add_push(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", metavar="RUN", help="run directory")
    command.add_argument("name", metavar="OWNER/NAME", help="repository on the Hub, created if it does not exist")
    help = "runs of the same config with other seeds: the model card reports mean ± sd"
    command.add_argument("--seeds", nargs="+", default=[], metavar="RUN", help=help)
    command.add_argument("--license", metavar="ID", help="licence of the weights, such as mit or apache-2.0")
    command.add_argument("--private", action="store_true", help="make the repository private")
    command.add_argument("--dry-run", type=Path, metavar="DIR", help="write the files into DIR and upload nothing")


def _add_export(command: argparse.ArgumentParser) -> None:
    command.add_argument("--format", required=True, choices=["onnx", "pt2", "safetensors"])
    help = "output; FILE.json describes its use (default: RUN/export/<name of the run>.<format>)"
    command.add_argument("--out", type=Path, metavar="FILE", help=help)
    command.add_argument("--with-normalization", action="store_true", help="accept uint8 images and normalize them")


def _add_preview(command: argparse.ArgumentParser) -> None:
    command.add_argument("what", choices=["lr", "augment", "lr-range"])
    command.add_argument("--out", type=Path, metavar="FILE.png", help="output (default: preview-WHAT.png)")
    test = command.add_argument_group("lr-range: train with a growing learning rate, and suggest one")
    test.add_argument("--steps", type=int, default=100, metavar="N", help="optimizer steps (default: 100)")
    test.add_argument("--min", dest="low", type=float, default=1e-5, metavar="LR", help="first rate (default: 1e-5)")
    test.add_argument("--max", dest="high", type=float, default=10.0, metavar="LR", help="last rate (default: 10)")


def _add_compare(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", nargs="+", metavar="RUN", help="run directory, directory of runs, or glob")
    others = command.add_mutually_exclusive_group(required=True)
    others.add_argument("--against", nargs="+", metavar="RUN", help="the runs to compare with")
    others.add_argument("--published", metavar="X", help="a published result, such as 91.25, 91.25%% or 0.9125")
    others.add_argument("--published-error", metavar="X", help="a published error rate, such as 8.75")
    command.add_argument("--published-sd", metavar="S", help="its sd over runs; requires --published-n")
    command.add_argument("--published-n", type=int, metavar="N", help="its number of runs; requires --published-sd")
    command.add_argument("--metric", default="test/acc", metavar="NAME", help="default: test/acc")
    command.add_argument("--margin", type=float, metavar="M", help="differences below it do not matter, such as 0.002")
    command.add_argument("--json", dest="as_json", action="store_true", help="print one JSON object")
    command.add_argument("--out", type=Path, metavar="FILE.html", help="also write one page with the curves")


def _add_runs(command: argparse.ArgumentParser) -> None:
    command.set_defaults(target="runs.listing_text:show_runs")
    command.epilog = "`reslab runs clean` removes checkpoints that finished runs no longer need."
    command._negative_number_matcher = re.compile("-[^-].")  # `--sort -time`: argparse takes it for an option
    _add_selection(command)
    command.add_argument("--sort", metavar="KEY", help="column to sort by; -KEY: largest first (default: start)")
    command.add_argument("--columns", metavar="KEY,...", help="columns to show instead of the default ones")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--csv", dest="as_csv", action="store_true", help="print CSV with all metrics and all digits")
    form.add_argument("--json", dest="as_json", action="store_true", help="print a JSON list with one object per run")
    form.add_argument("--html", type=Path, metavar="FILE", help="write a page with sorting, filters and curves")


def _add_selection(command: argparse.ArgumentParser) -> None:
    command.add_argument("dirs", nargs="*", default=["runs"], metavar="DIR", help="run directories, or above them")
    help = "condition, such as data.dataset=cifar10 or 'test/acc>0.9' (= != < <= > >= ~); repeat it for several"
    command.add_argument("--where", action="append", default=[], metavar="KEY=VALUE", help=help)


def _add_runs_clean(command: argparse.ArgumentParser) -> None:
    command.set_defaults(target="runs.clean:clean")
    _add_selection(command)
    command.add_argument("--best", action="store_true", help="also remove best.ckpt, the only copy of the best weights")
    answer = command.add_mutually_exclusive_group()
    answer.add_argument("--yes", action="store_true", help="do not ask")
    answer.add_argument("--dry-run", action="store_true", help="only print what would be removed")


def _add_search(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", metavar="FILE", help="search file, or its name in configs/sweep")
    command.add_argument("--out", metavar="DIR", help="search directory (default: runs/searches/<name>)")
    command.add_argument("--check", action="store_true", help="check the file, print the plan, and run nothing")
    _add_resources(command)


def _add_resources(command: argparse.ArgumentParser) -> None:
    help = "concurrent runs (default: one per visible GPU; 1 on CPU)"
    command.add_argument("--jobs", type=int, metavar="N", help=help)
    command.add_argument(
        "--jobs-per-gpu", type=int, default=1, metavar="K", help="runs that share one GPU (default: 1)"
    )
    help = "start a new Python for each run, instead of forking one that has imported everything"
    command.add_argument("--fresh-processes", action="store_true", help=help)
    command.add_argument("--retries", type=int, default=1, metavar="N", help="retries per failed run (default: 1)")


def _add_ablate(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="STEP")

    def add(name: str, help: str, target: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        command.set_defaults(takes_config=True, target=target)
        command.add_argument("name", metavar="STUDY", help="study file, or its name in configs/ablation")
        command.add_argument("--out", metavar="DIR", help="study directory (default: runs/ablations/<name>)")
        return command

    help = "write a commented study file: NAME --base EXPERIMENT [--arm NAME:KEY=VALUE ...]"
    new = commands.add_parser("new", help=help, description=help, allow_abbrev=False)
    new.set_defaults(takes_config=False, target="cli:_new_study")
    new.add_argument("name", metavar="NAME", help="name of the study")
    new.add_argument("--base", required=True, action="append", metavar="EXPERIMENT", help="config file or its name")
    new.add_argument("--arm", default=[], action="append", metavar="NAME:KEY=VALUE", help="an arm and its change")
    new.add_argument("--out", type=Path, metavar="FILE", help="study file (default: configs/ablation/NAME.yaml)")
    plan = add("plan", "list runs, changes, cost and what they can find: STUDY [--KEY VALUE ...]", "cli:_plan_study")
    plan.add_argument("--check", action="store_true", help="also check every value against its type (imports torch)")
    plan.add_argument(
        "--find", type=positive, metavar="D", help="seeds and hours to find this difference in the metric"
    )
    run = add("run", "start or resume all runs, then report: STUDY [--KEY VALUE ...]", "cli:_run_and_report")
    _add_resources(run)
    run.add_argument("--launcher", choices=["local", "slurm"], default="local", help="where to run (default: local)")
    slurm = run.add_argument_group("with --launcher slurm")
    slurm.add_argument("--detach", action="store_true", help="submit the jobs and return without waiting")
    slurm.add_argument("--slurm", metavar="FILE", help="YAML file with the options below (partition, minutes, ...)")
    slurm.add_argument("--partition", metavar="NAME", help="default: the cluster's default partition")
    slurm.add_argument("--minutes", type=int, metavar="N", help="time limit per job, then requeued (default: 240)")
    slurm.add_argument("--gpus", type=int, metavar="N", help="GPUs per node (default: trainer.devices, if on GPUs)")
    slurm.add_argument("--cpus", type=int, metavar="N", help="CPUs per process (default: 1)")
    slurm.add_argument("--memory", type=int, metavar="GB", help="memory per node (default: the cluster's default)")
    slurm.add_argument("--sbatch", type=_pair, action="append", metavar="KEY=VALUE", help="any other sbatch option")
    help = "write statistics, tables and figures of the finished runs: STUDY [--KEY VALUE ...]"
    report = add("report", help, "cli:_report_study")
    for command in (run, report):
        command.add_argument(
            "--json", dest="as_json", action="store_true", help="print only the content of report.json"
        )
    help = "print an arm's verdict: STUDY ARM; exit status 0 better, 3 equivalent, 4 worse, 5 inconclusive or none yet"
    add("verdict", help, "cli:_print_verdict").add_argument("arm", metavar="ARM", help="an arm of the study")


def _pair(text: str) -> tuple[str, str | bool]:
    key, equals, value = text.lstrip("-").partition("=")
    return key, value if equals else True


def positive(text: str) -> float:  # argparse shows this name: "invalid positive value"
    if not 0 < (number := float(text)) < float("inf"):
        raise ValueError(text)
    return number


def shape(text: str) -> tuple[int, ...]:  # argparse shows this name: "invalid shape value"
    sizes = tuple(int(part) for part in text.split(","))
    if len(sizes) not in (1, 3) or min(sizes) < 1:
        raise ValueError(text)
    return (3, *sizes, *sizes) if len(sizes) == 1 else sizes


def _list_keys(word: str | None) -> None:
    from reslab.help import key_help

    print(key_help(word))


def _summary(model: str, input: tuple[int, ...], classes: int) -> None:
    from reslab import names
    from reslab.models.zoo import VARIANTS, create_model

    path = None if model in VARIANTS else names.leaf("net", model)  # the user's own
    if path is not None:
        from reslab.models.zoo import create_from_config

        net = create_from_config(path, num_classes=classes, in_channels=input[0])
    else:
        size: dict[str, Any] = {"image_size": input[1:]} if "/" in model else {}
        net = create_model(model, num_classes=classes, in_channels=input[0], **size)
    from reslab.models import summarize

    print(summarize(net, input))


def _new_study(name: str, base: list[str], arm: list[str], out: Path | None) -> None:
    from reslab.ablation.new import argument, new_study, shown

    path = new_study(name, base, arm, out)
    print(f"wrote {shown(path)}; next: reslab ablate plan {argument(path)}")


def _read_study(name: str, out: str | None, overrides: list[str]) -> "tuple[Study, Path]":
    """Return a study and its directory."""
    from reslab.ablation.study import read_study

    study = read_study(name, overrides)
    return study, Path(out) if out else study.out


def _plan_study(name: str, out: str | None, overrides: list[str], check: bool, find: float | None) -> None:
    from reslab.ablation.launch import typed_configs
    from reslab.ablation.plan import describe

    study, folder = _read_study(name, out, overrides)
    if check:
        typed_configs(study)
    print(describe(study, folder, find))


def _run_and_report(
    name: str, out: str | None, overrides: list[str], as_json: bool, command: str, **options: Any
) -> int:
    from reslab.ablation.plan import notes
    from reslab.ablation.plan_log import PLANS

    study, folder = _read_study(name, out, overrides)
    resume_hint(lambda: f"to resume, run {command}" if (folder / PLANS).exists() else "")
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        for note in notes(study, folder):
            print(f"Note: {note}")
        status = _run_study(study, folder, **options)
    if status != Exit.PREEMPTED and not options["detach"]:
        _report(study, folder, as_json)
    return status


def _report_study(name: str, out: str | None, overrides: list[str], as_json: bool) -> None:
    _report(*_read_study(name, out, overrides), as_json)


def _report(study: "Study", folder: Path, as_json: bool) -> None:
    from reslab.ablation.report import log_summary, read_report, sentences, write_report
    from reslab.ablation.terminal import summary

    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        page = write_report(study, folder)
        report, text = read_report(folder)
        print(f"\n{summary(report, list(sentences(report).values()))}\n\nreport  {page}")
        log_summary(study, folder)
    if as_json:
        print(text, end="")


def _print_verdict(name: str, arm: str, out: str | None, overrides: list[str]) -> int:
    from reslab.ablation.report import current_report, sentences

    study, folder = _read_study(name, out, overrides)
    if arm not in study.arms or arm == study.baseline:
        others = ", ".join(other for other in study.arms if other != study.baseline)
        raise UserError(f"no arm {arm!r} to compare with the baseline {study.baseline}; arms: {others}")
    report = current_report(study, folder)
    for warning in report["warnings"]:
        print(f"Note: {warning}", file=sys.stderr)
    print(sentences(report)[arm])
    statuses = {"better": Exit.OK, "equivalent": Exit.EQUIVALENT, "worse": Exit.WORSE}
    return statuses.get(report["arms"][arm]["verdict"], Exit.INCONCLUSIVE)


def _run_study(
    study: "Study", folder: Path, jobs: int | None, jobs_per_gpu: int, fresh_processes: bool, retries: int,
    launcher: str, detach: bool, slurm: str | None, **job_options: Any,
) -> int:  # fmt: skip
    from reslab.ablation.launch import LocalResources, run_local
    from reslab.ablation.slurm import Cluster, run_slurm

    if launcher == "slurm":
        cluster = Cluster.read(slurm, **{**job_options, "sbatch": dict(job_options["sbatch"] or [])})
        return run_slurm(study, folder, cluster, jobs, retries, detach)
    if detach or slurm or any(job_options.values()):
        raise UserError("--detach, --slurm and job options require --launcher slurm")
    status = run_local(study, folder, LocalResources(jobs, jobs_per_gpu, fresh_processes), retries)
    return close() if status == Exit.PREEMPTED else status

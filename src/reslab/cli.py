"""Command line interface. Commands import torch and lightning lazily, when they run."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reslab.errors import Exit, UserError
from reslab.host import CONFIGS

if TYPE_CHECKING:
    from reslab.ablation.study import Study

Handler = Callable[[argparse.Namespace, list[str]], int | None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status (see `reslab.errors.Exit`)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["fit"]:  # LightningCLI parses its options
            _quiet()
            from reslab.experiment import fit

            return fit(argv[1:])
        args, rest = _parser().parse_known_args(argv)
        if rest and not args.takes_config:
            raise UserError(f"unrecognized arguments: {' '.join(rest)} (see `reslab {args.command} --help`)")
        _quiet()
        return args.handler(args, rest) or 0
    except UserError as error:
        print(f"reslab: {error}", file=sys.stderr)
        return Exit.USAGE
    except BrokenPipeError:  # `reslab list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _quiet() -> None:
    """Silence known library warnings that do not help the user; all others stay visible."""
    import logging
    import warnings

    noisy = "lightning.pytorch.utilities.rank_zero", "lightning.pytorch.trainer.connectors.checkpoint_connector"
    for name in noisy:
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r".*isinstance\(treespec, LeafSpec\).*",
        r".*does not have many workers.*",
        r".*smaller than the logging interval.*",
        r".*in eval mode at the start of training.*",
        r".*is intended to run from within Python.*",
        r".*`srun` command is available on your system but is not used.*",
        r".*distributed.nn.functional.all_gather is deprecated.*",  # called by Lightning
        r".*It is recommended to use `self.log\(.*sync_dist=True.*",  # torchmetrics has synchronized them already
    ):
        warnings.filterwarnings("ignore", message)


def _call(target: str, *arguments: str) -> Handler:
    """Return a handler that imports `module:function` and calls it with these parsed arguments and the overrides."""
    module, function = target.split(":")

    def handler(args: argparse.Namespace, rest: list[str]) -> int | None:
        values = [getattr(args, name) for name in arguments]
        return getattr(importlib.import_module(f"reslab.{module}"), function)(*values, rest)

    return handler


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reslab",
        description="Reproducible image-classification experiments with PyTorch Lightning.",
        epilog="Start with: reslab fit --config configs/experiment/digits.yaml",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, handler: Handler | None, help: str, takes_config: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        command.set_defaults(handler=handler, takes_config=takes_config)
        return command

    def add_for_run(name: str, handler: Handler, help: str) -> argparse.ArgumentParser:
        command = add(name, handler, help, takes_config=True)
        command.add_argument("run_dir", metavar="RUN", help="run directory")
        return command

    add("fit", None, "train and test: --config FILE [--run.dir DIR] [--KEY VALUE ...]; all keys: fit --help")
    for name, split in (("validate", "validation"), ("test", "test")):
        evaluate = _call("inference:evaluate", "run_dir", "command")
        add_for_run(name, evaluate, f"evaluate a finished run on its {split} set: RUN [--data.root DIR]")
    predict = _call("inference:predict", "run_dir", "images", "out", "all")
    command = add_for_run("predict", predict, "classify image files with a run's weights")
    command.add_argument("--images", required=True, metavar="DIR", help="directory of images, searched recursively")
    command.add_argument("--out", required=True, type=Path, metavar="FILE.csv", help="CSV file with one row per image")
    command.add_argument("--all", action="store_true", help="add one probability column per class")
    export = _call("export:export", "run_dir", "format", "out", "with_normalization")
    command = add_for_run("export", export, "export a run's network to ONNX, torch.export (pt2) or safetensors")
    command.add_argument("--format", required=True, choices=["onnx", "pt2", "safetensors"])
    command.add_argument("--out", required=True, type=Path, metavar="FILE", help="output; FILE.json describes its use")
    command.add_argument("--with-normalization", action="store_true", help="accept uint8 images and normalize them")
    add_for_run("verify", _call("runs.verify:verify", "run_dir"), "verify a run's hashes: RUN [--data.root DIR]")
    reproduce = _call("runs.verify:reproduce", "run_dir", "out")
    command = add_for_run("reproduce", reproduce, "repeat a finished run and compare: RUN [--KEY VALUE ...]")
    command.add_argument("--out", metavar="DIR", help="directory of the new run (default: RUN-reproduced)")
    _add_ablate(add("ablate", None, "plan, run and report an ablation study: arms × seeds in, a verdict out"))
    command = add("list", _list, "list models, data sets, experiments or ablation studies")
    command.add_argument("what", nargs="?", choices=[*LISTS, "models"], help="default: all of them")
    command.add_argument("pattern", nargs="?", help="with models: timm, torchvision, or 'timm/convnext*'")
    command = add("summary", _summary, "print a model's layers: shapes, parameters, FLOPs")
    command.add_argument("model", help="a name from `reslab list models`, timm/NAME or torchvision/NAME")
    command.add_argument("--input", default="3,224,224", type=_shape, metavar="C,H,W", help="default 3,224,224")
    command.add_argument("--classes", default=1000, type=int, metavar="N", help="default 1000")
    add("doctor", _call("doctor:examine"), "check the machine and data: [--config FILE ...]", takes_config=True)
    command = add("preview", _preview, "plot an experiment's learning rate or augmented images", takes_config=True)
    command.add_argument("what", choices=["lr", "augment"])
    command.add_argument("--out", metavar="FILE.png", help="output (default: preview-WHAT.png)")
    return parser


def _add_ablate(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="step", required=True, metavar="STEP")

    def add(name: str, handler: Handler, help: str) -> argparse.ArgumentParser:
        step = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        step.set_defaults(handler=handler, takes_config=True)
        step.add_argument("study", metavar="STUDY", help="study file, or its name in configs/ablation")
        step.add_argument("--out", metavar="DIR", help="study directory (default: runs/ablations/<name>)")
        return step

    step = add("plan", _ablate_plan, "list the runs, what each arm changes, and the cost: STUDY [--KEY VALUE ...]")
    step.add_argument("--check", action="store_true", help="also check every value against its type (imports torch)")
    step = add("run", _ablate_run, "start or resume all runs, then report: STUDY [--KEY VALUE ...]")
    step.add_argument("--jobs", type=int, metavar="N", help="concurrent runs (default: one per visible GPU; 1 on CPU)")
    step.add_argument("--jobs-per-gpu", type=int, default=1, metavar="K", help="runs that share one GPU (default: 1)")
    step.add_argument("--retries", type=int, default=1, metavar="N", help="retries per failed run (default: 1)")
    step.add_argument("--launcher", choices=["local", "slurm"], default="local", help="where to run (default: local)")
    _add_slurm(step.add_argument_group("with --launcher slurm"))
    add("report", _ablate_report, "write statistics, tables and figures of the finished runs: STUDY [--KEY VALUE ...]")


def _add_slurm(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--detach", action="store_true", help="submit the jobs and return without waiting")
    group.add_argument("--slurm", metavar="FILE", help="YAML file with the options below (partition, minutes, ...)")
    group.add_argument("--partition", metavar="NAME", help="default: the cluster's default partition")
    group.add_argument("--minutes", type=int, metavar="N", help="time limit per job, then requeued (default: 240)")
    group.add_argument(
        "--gpus", type=int, metavar="N", help="GPUs per node (default: trainer.devices if it trains on GPUs)"
    )
    group.add_argument("--cpus", type=int, metavar="N", help="CPUs per process (default: 1)")
    group.add_argument("--memory", type=int, metavar="GB", help="memory per node (default: the cluster's default)")
    group.add_argument("--sbatch", type=_pair, action="append", metavar="KEY=VALUE", help="any other sbatch option")


def _pair(text: str) -> tuple[str, str | bool]:
    key, equals, value = text.lstrip("-").partition("=")
    return key, value if equals else True


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected C,H,W such as 3,224,224, not {text!r}") from None


LISTS = {"data": "data", "experiments": "experiment", "recipes": "recipe", "ablations": "ablation"}


def _list(args: argparse.Namespace, rest: list[str]) -> None:
    from reslab.models.zoo import list_models

    if args.pattern and args.what != "models":
        raise UserError(f"reslab list {args.what} accepts no pattern: only `reslab list models PATTERN` does")
    for what in [args.what] if args.what else ["models", *LISTS]:
        if args.what is None:
            print(f"{what}:")
        lines = list_models(args.pattern) if what == "models" else _config_lines(LISTS[what])
        if what == "models" and args.pattern is None:
            lines += [
                "timm/NAME         every image classifier of timm: reslab list models timm, or 'timm/convnext*'",
                "torchvision/NAME  every image classifier of torchvision: reslab list models torchvision",
            ]
        for line in lines:
            print(f"  {line}" if args.what is None else line)
    if args.pattern and not lines:
        raise UserError(f"no model matches {args.pattern!r}")


def _config_lines(folder: str) -> list[str]:
    """Return one line per config file: its name and the first line of its header."""
    files = sorted((CONFIGS / folder).glob("*.yaml"))
    width = max((len(file.stem) for file in files), default=0)
    headers = [file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for file in files]
    return [f"{file.stem:<{width}}  {header}" for file, header in zip(files, headers, strict=True)]


def _summary(args: argparse.Namespace, rest: list[str]) -> None:
    from reslab.models import create_model, summarize

    size = {"image_size": args.input[1:]} if "/" in args.model and len(args.input) == 3 else {}
    net = create_model(args.model, num_classes=args.classes, in_channels=args.input[0], **size)
    print(summarize(net, args.input))


def _study(args: argparse.Namespace, rest: list[str]) -> "tuple[Study, Path]":
    """Return the study and its directory."""
    from reslab.ablation.study import read_study

    study = read_study(args.study, rest)
    return study, Path(args.out) if args.out else study.out


def _ablate_plan(args: argparse.Namespace, rest: list[str]) -> None:
    from reslab.ablation.plan import describe

    study, out = _study(args, rest)
    if args.check:
        from reslab.ablation.launch import typed_configs

        typed_configs(study)
    print(describe(study, out))


def _ablate_run(args: argparse.Namespace, rest: list[str]) -> int:
    from reslab.ablation.launch import LocalResources, run_local

    study, out = _study(args, rest)
    job_options = {key: getattr(args, key) for key in ("partition", "minutes", "gpus", "cpus", "memory", "sbatch")}
    if args.launcher == "slurm":
        from reslab.ablation.slurm import Cluster, run_slurm

        cluster = Cluster.read(args.slurm, **{**job_options, "sbatch": dict(args.sbatch or [])})
        status = run_slurm(study, out, cluster, args.jobs, args.retries, args.detach)
    elif args.detach or args.slurm or any(job_options.values()):
        raise UserError("--detach, --slurm and job options require --launcher slurm")
    else:
        status = run_local(study, out, LocalResources(args.jobs, args.jobs_per_gpu), args.retries)
    if status != Exit.PREEMPTED and not args.detach:
        _ablate_report(args, rest)
    return status


def _ablate_report(args: argparse.Namespace, rest: list[str]) -> None:
    from reslab.ablation.report import log_summary, write_report

    study, out = _study(args, rest)
    print(f"report  {write_report(study, out)}")
    log_summary(study, out)


def _preview(args: argparse.Namespace, rest: list[str]) -> None:
    from reslab.preview import preview

    preview(args.what, Path(args.out or f"preview-{args.what}.png"), rest)

"""The command line. torch and lightning are imported by the commands that need them, when they run."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from reslab.errors import Exit, UserError
from reslab.host import CONFIGS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 2 wrong usage or config, 75 preempted, 1 anything else."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["fit"]:  # its options are LightningCLI's
            _quiet()
            from reslab.experiment import fit

            return fit(argv[1:])
        args, rest = _parser().parse_known_args(argv)
        if rest and not args.takes_config:
            raise UserError(f"unrecognized arguments: {' '.join(rest)} (see `reslab {args.command} --help`)")
        _quiet()
        return args.run(args, rest) or 0
    except UserError as error:
        print(f"reslab: {error}", file=sys.stderr)
        return Exit.USAGE
    except BrokenPipeError:  # `reslab list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _quiet() -> None:
    """Leaves out what the libraries say at every start; warnings that tell something stay."""
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
        r".*distributed.nn.functional.all_gather is deprecated.*",  # Lightning's own call
        r".*It is recommended to use `self.log\(.*sync_dist=True.*",  # torchmetrics has synchronised them
    ):
        warnings.filterwarnings("ignore", message)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reslab",
        description="ResNet experiments that others can reproduce.",
        epilog="Start with: reslab fit --config configs/experiment/digits.yaml",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run, help: str, takes_config: bool = False) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]
        command = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        command.set_defaults(run=run, takes_config=takes_config)
        return command

    def add_for_run(name: str, run, help: str) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]
        command = add(name, run, help, takes_config=True)
        command.add_argument("folder", metavar="RUN", help="a run folder")
        return command

    add("fit", None, "train and test a run: --config FILE … [--run.dir DIR] [--KEY VALUE …]; all keys: fit --help")
    for split in ("validate", "test"):
        add_for_run(split, _evaluate, f"{split} a finished run's weights: RUN [--data.root DIR]")
    command = add_for_run("predict", _predict, "classify a folder of images with a run's weights")
    command.add_argument("--images", required=True, metavar="DIR", help="image files, in any folders below DIR")
    command.add_argument("--out", required=True, metavar="FILE.csv", help="a row an image: prediction, probability")
    command.add_argument("--all", action="store_true", help="a column for the probability of every class, too")
    command = add_for_run("export", _export, "write a run's network as ONNX, PyTorch program or safetensors")
    command.add_argument("--format", required=True, choices=["onnx", "pt2", "safetensors"])
    command.add_argument("--out", required=True, metavar="FILE", help="FILE.json beside it says how to use it")
    command.add_argument(
        "--with-normalization", action="store_true", help="the graph takes uint8 images, 0 to 255, not normalised ones"
    )
    add_for_run("verify", _verify, "check a run against its hashes: RUN [--data.root DIR]")
    command = add_for_run("reproduce", _reproduce, "run a finished run again, and compare: RUN [--KEY VALUE …]")
    command.add_argument("--out", metavar="DIR", help="the new run's folder, default RUN-reproduced")
    _add_ablate(add("ablate", None, "plan, run or report a study: arms × seeds in, a verdict out"))
    command = add("list", _list, "list models, data sets, experiments or ablation studies")
    command.add_argument("what", nargs="?", choices=[*LISTS, "models"], help="default: all of them")
    command.add_argument("pattern", nargs="?", help="with models: timm, torchvision, or 'timm/convnext*'")
    command = add("summary", _summary, "print a model's layers: shapes, parameters, FLOPs")
    command.add_argument("model", help="a name from `reslab list models`, timm/NAME or torchvision/NAME")
    command.add_argument("--input", default="3,224,224", type=_shape, metavar="C,H,W", help="default 3,224,224")
    command.add_argument("--classes", default=1000, type=int, metavar="N", help="default 1000")
    add("doctor", _doctor, "check the machine, and the data of an experiment: [--config FILE …]", takes_config=True)
    command = add("preview", _preview, "draw an experiment's learning rate or augmented images", takes_config=True)
    command.add_argument("what", choices=["lr", "augment"])
    command.add_argument("--out", metavar="FILE.png", help="default preview-WHAT.png")
    return parser


def _add_ablate(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="step", required=True, metavar="STEP")

    def add(name: str, run, help: str) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]
        step = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        step.set_defaults(run=run, takes_config=True)
        step.add_argument("study", metavar="STUDY", help="a study file, or its name in configs/ablation")
        step.add_argument("--out", metavar="DIR", help="the study's folder, default runs/ablations/<name>")
        return step

    step = add("plan", _ablate_plan, "the cells, what each arm changes, the cost: STUDY [--KEY VALUE …]")
    step.add_argument("--check", action="store_true", help="check every value against its type, too (loads torch)")
    step = add("run", _ablate_run, "run all cells, or go on with them, then report: STUDY [--KEY VALUE …]")
    step.add_argument("--jobs", type=int, metavar="N", help="cells at a time; default: what the GPUs hold, else 1")
    step.add_argument("--jobs-per-gpu", type=int, default=1, metavar="K", help="cells that share a GPU, default 1")
    step.add_argument("--retries", type=int, default=1, metavar="N", help="how often a failed cell is tried again")
    step.add_argument("--launcher", choices=["local", "slurm"], default="local", help="this machine, or Slurm jobs")
    _add_slurm(step.add_argument_group("with --launcher slurm"))
    add("report", _ablate_report, "statistics, tables and figures of what is there: STUDY [--KEY VALUE …]")


def _add_slurm(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--detach", action="store_true", help="submit the cells and return; do not wait")
    group.add_argument("--slurm", metavar="FILE", help="a YAML file of the options below: partition, minutes, …")
    group.add_argument("--partition", metavar="NAME", help="default: Slurm's own")
    group.add_argument("--minutes", type=int, metavar="N", help="time limit of a job, default 240; it is requeued then")
    group.add_argument("--gpus", type=int, metavar="N", help="GPUs a node; default: trainer.devices, on GPUs")
    group.add_argument("--cpus", type=int, metavar="N", help="CPUs a process, default 1")
    group.add_argument("--memory", type=int, metavar="GB", help="memory a node; default: Slurm's own")
    group.add_argument("--sbatch", type=_pair, action="append", metavar="KEY=VALUE", help="any other option of sbatch")


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
    """A line a config file: its name and the first line of its header."""
    files = sorted((CONFIGS / folder).glob("*.yaml"))
    width = max((len(file.stem) for file in files), default=0)
    headers = [file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for file in files]
    return [f"{file.stem:<{width}}  {header}" for file, header in zip(files, headers, strict=True)]


def _summary(args: argparse.Namespace, rest: list[str]) -> None:
    from reslab.models import create_model, summarize

    size = {"image_size": args.input[1:]} if "/" in args.model and len(args.input) == 3 else {}
    net = create_model(args.model, num_classes=args.classes, in_channels=args.input[0], **size)
    print(summarize(net, args.input))


def _evaluate(args: argparse.Namespace, rest: list[str]) -> None:
    from reslab.inference import evaluate

    evaluate(args.folder, args.command, rest)


def _predict(args: argparse.Namespace, rest: list[str]) -> None:
    from reslab.inference import predict

    predict(args.folder, Path(args.images), Path(args.out), args.all, rest)


def _export(args: argparse.Namespace, rest: list[str]) -> None:
    from reslab.export import export

    export(args.folder, args.format, Path(args.out), args.with_normalization, rest)


def _verify(args: argparse.Namespace, rest: list[str]) -> int:
    from reslab.runs.verify import verify

    return verify(args.folder, rest)


def _reproduce(args: argparse.Namespace, rest: list[str]) -> int:
    from reslab.runs.verify import reproduce

    return reproduce(args.folder, args.out, rest)


def _study(args: argparse.Namespace, rest: list[str]):  # type: ignore[no-untyped-def]
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
    asked = {key: getattr(args, key) for key in ("partition", "minutes", "gpus", "cpus", "memory", "sbatch")}
    if args.launcher == "slurm":
        from reslab.ablation.slurm import Cluster, run_slurm

        cluster = Cluster.read(args.slurm, **{**asked, "sbatch": dict(args.sbatch or [])})
        status = run_slurm(study, out, cluster, args.jobs, args.retries, args.detach)
    elif args.detach or args.slurm or any(asked.values()):
        raise UserError("--detach and what a job asks for are for --launcher slurm")
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


def _doctor(args: argparse.Namespace, rest: list[str]) -> int:
    from reslab.doctor import examine

    return examine(rest)


def _preview(args: argparse.Namespace, rest: list[str]) -> None:
    from reslab.preview import preview

    preview(args.what, Path(args.out or f"preview-{args.what}.png"), rest)

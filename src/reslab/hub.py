"""Publish a finished run on the Hugging Face Hub: `reslab push RUN OWNER/NAME`."""

import hashlib
import math
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy import special

from reslab.data import ImageData
from reslab.data.datasets import Arrays
from reslab.diff import differences
from reslab.errors import UserError
from reslab.files import write_text
from reslab.inference import load_run
from reslab.metric_text import is_accuracy, wilson
from reslab.models.weights import hub_errors
from reslab.runs import manifest as manifests
from reslab.runs.folder import RunFolder
from reslab.runs.manifest import duration
from reslab.runs.masking import MASK, is_secret, mask, mask_command
from reslab.runs.predictions import read_predictions
from reslab.runs.report import formatted, label, main_metric, templates
from reslab.runs.result import further_rows
from reslab.runs.verify import check_weights, finished

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]{0,95}")
DATASETS = {  # on the Hub, by class
    "CIFAR10": "uoft-cs/cifar10", "CIFAR100": "uoft-cs/cifar100", "ImageNet": "ILSVRC/imagenet-1k",
    "Imagenette": "frgfm/imagenette",
}  # fmt: skip
# An absolute path inside a text, but not in a URL; its last part tells enough.
PATH = re.compile(r"(?<![\w.:/~-])/(?:[^\s/'\"=,:;()\[\]{}]+/)+([^\s/'\"=,:;()\[\]{}]*)")


def push(run: str, name: str, seeds: list[str], license: str | None, private: bool, dry_run: Path | None) -> None:
    """Upload a run's weights, config, manifest, metrics and a model card; or write them into the directory `dry_run`.

    Args:
        run: Directory of a finished run.
        name: OWNER/NAME on the Hub.
        seeds: Finished runs that differ from `run` only in their seed, for the results in the model card.
        license: Its identifier on the Hub (https://huggingface.co/docs/hub/repositories-licenses).
        private: Create a private repository.

    Raises:
        UserError: The run is not finished, or nobody is logged in; nothing is written then.
    """
    if not NAME.fullmatch(name) or name.endswith((".", "-", ".git")) or "--" in name or ".." in name:
        raise UserError(f"{name!r} must be OWNER/NAME: letters, digits and single - . _ (at most 96 in NAME)")
    if license and not re.fullmatch(r"[a-z0-9.-]+", license):
        raise UserError(f"--license {license!r} must be an identifier of the Hub, such as mit, apache-2.0 or cc-by-4.0")
    folder, manifest = finished(run)
    check_weights(folder, manifest)
    runs = {manifest["seed"]: manifest} | _other_seeds(folder, manifest, seeds)
    if dry_run:
        _check_empty(dry_run)
        write_folder(folder, runs, name, license, dry_run)
        print(f"wrote {dry_run}; nothing was uploaded")
        return
    api = _logged_in()
    with tempfile.TemporaryDirectory() as scratch:
        write_folder(folder, runs, name, license, Path(scratch))
        commit = _upload(api, name, Path(scratch), private, f"reslab push: {manifest['name']}, seed {manifest['seed']}")
    print(f"{api.endpoint}/{name}\nuse it with --model.weights hf://{name}@{commit}")


def _other_seeds(folder: RunFolder, manifest: Mapping[str, Any], runs: Sequence[str]) -> dict[int, dict[str, Any]]:
    """Return the manifests of further runs by seed; raise UserError unless they differ only in their seed."""
    others: dict[int, dict[str, Any]] = {}
    config = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    for run in runs:
        other, record = finished(run)
        rows = differences(config, yaml.safe_load(other.config.read_text(encoding="utf-8")))
        ignored = ("seed_everything", "data.seed", "run.name", *manifests.NOT_IDENTITY)
        changed = [f"  {key}: {old} != {new}" for key, old, new in rows if not key.startswith(ignored)]
        if changed:
            raise UserError("\n".join([f"--seeds {run}: its config differs in more than the seed:", *changed]))
        if record["seed"] in {manifest["seed"], *others}:
            raise UserError(f"--seeds {run}: there are two runs with seed {record['seed']}")
        others[record["seed"]] = record
    return others


def _check_empty(directory: Path) -> None:
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"--dry-run {directory} is not an empty directory: remove it, or choose another one")


def write_folder(
    folder: RunFolder, runs: Mapping[int, dict[str, Any]], name: str, license: str | None, out: Path
) -> None:
    """Write the files of a repository: a small run directory that every reslab command accepts, and a model card."""
    manifest = next(iter(runs.values()))
    config = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    record, public_config = _public_manifest(manifest), _public_config(config)
    data, _, _ = load_run(str(folder.path), [])
    card = model_card(folder, runs, data, public_config, name, license)
    try:
        out.mkdir(parents=True, exist_ok=True)
        text = folder.config.read_text(encoding="utf-8")
        if public_config != config:  # otherwise the same bytes, with the same hash
            text = yaml.safe_dump(public_config, sort_keys=False, allow_unicode=True)
            record["config_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        write_text(out / folder.config.name, text)
        manifests.write(out / folder.manifest.name, record)
        write_text(out / "README.md", card)
        for file in (folder.weights, folder.metrics):
            shutil.copyfile(file, out / file.name)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from error


def _public_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config without secrets, private paths, and loggers, which would write into the author's projects."""
    cleaned = public(config)
    if config["data"].get("root") is not None:
        cleaned["data"]["root"] = None
    if config["trainer"].get("logger"):
        cleaned["trainer"]["logger"] = False
    return cleaned


def _public_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest without secrets, private paths, host names and names of uncommitted files."""
    cleaned = public({**manifest, "command": _public_command(manifest["command"])})
    for attempt in cleaned["attempts"]:
        for name in ("host", "pid", "data_change"):
            attempt.pop(name, None)
    cleaned["environment"].pop("host", None)
    if cleaned["git"]:
        cleaned["git"] = {name: cleaned["git"].get(name) for name in ("sha", "dirty", "diff_sha256")}
    return cleaned


def public(value: Any, key: str = "") -> Any:
    """Return a copy of a JSON value with secrets masked, and absolute paths as /path/to/NAME."""
    if isinstance(value, Mapping):
        return {name: public(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item, key) for item in value]
    if not isinstance(value, str):
        return value
    return MASK if is_secret(key) else _public_text(value)


def _public_text(text: str) -> str:
    if text.startswith("/") and "\n" not in text and len(Path(text).parts) > 2:  # also with spaces in it
        return f"/path/to/{Path(text).name}"
    return PATH.sub(r"/path/to/\1", mask(text))


def _public_command(command: str) -> str:
    words = []
    for word in shlex.split(command):
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        words.append(f"{option}{equals}{_public_text(value)}")
    return mask_command(words)


def model_card(
    folder: RunFolder, runs: Mapping[int, dict[str, Any]], data: ImageData, config: dict[str, Any],
    name: str, license: str | None,
) -> str:  # fmt: skip
    """Return the README.md of a repository, with the Hub's metadata (YAML) at its top."""
    manifest = next(iter(runs.values()))
    predictions = read_predictions(folder.path)
    tested = len(predictions.label) if predictions else 0
    shown = data.class_names[:1000]
    page = templates().get_template("model_card.md.j2").render(
        name=name,
        license=license,
        metadata=yaml.safe_dump(metadata(runs, config, name, license), sort_keys=False, allow_unicode=True),
        manifest=manifest,
        seeds=[*runs],
        tested=tested,
        network=_call(config["model"]["net"]),
        dataset=_dataset(config),
        results=[_result(metric, [m["results"] for m in runs.values()], tested) for metric in _metrics(manifest)],
        test_sets=further_rows(manifest),
        class_names=data.class_names,
        classes=", ".join(shown),
        shape=data.image_shape,
        mean=[*data.dataset.mean],
        std=[*data.dataset.std],
        resize=None if _in_memory(data) else data.test_resize,
        recipe=_recipe(config, manifest),
        command=_public_command(manifest["command"]),
    )  # fmt: skip
    return mask(page)


def _in_memory(data: ImageData) -> bool:
    """Whether the images are not resized; False if the data are missing, and nobody knows."""
    try:
        return isinstance(data.test_data, Arrays)
    except UserError:
        return False


def _metrics(manifest: Mapping[str, Any]) -> list[str]:
    return [name for name in manifest["results"] if name.startswith("test/")]


def metadata(
    runs: Mapping[int, dict[str, Any]], config: Mapping[str, Any], name: str, license: str | None
) -> dict[str, Any]:
    """Return the metadata of a model card (https://huggingface.co/docs/hub/model-cards)."""
    dataset, manifest = _dataset(config), next(iter(runs.values()))
    main = main_metric(manifest["results"], "test")
    values = {metric: float(np.mean([m["results"][metric] for m in runs.values()])) for metric in _metrics(manifest)}
    kinds = {metric: "accuracy" if metric == "test/acc" else metric.removeprefix("test/") for metric in values}
    results = {
        "task": {"type": "image-classification", "name": "Image classification"},
        "dataset": {"type": DATASETS.get(dataset, dataset.lower()), "name": dataset, "split": "test"},
        "metrics": [{"type": kinds[metric], "value": value, "name": label(metric)} for metric, value in values.items()],
    }
    return {
        **({"license": license} if license else {}),
        "library_name": "reslab",
        "pipeline_tag": "image-classification",
        "tags": ["reslab", "pytorch", "image-classification"],
        **({"datasets": [DATASETS[dataset]]} if dataset in DATASETS else {}),
        **({"metrics": [kinds[main]]} if main else {}),
        "model-index": [{"name": name.partition("/")[2], "results": [results]}] if values else [],
    }


def _dataset(config: Mapping[str, Any]) -> str:
    """Return the name of the data set: of its directory, if any directory can be used, else of its class."""
    leaf = config["data"]["dataset"]
    name = leaf["class_path"].rpartition(".")[2]
    return Path(leaf["init_args"]["folder"]).name if name == "ImageFolder" else name


def _result(metric: str, results: Sequence[Mapping[str, float]], tested: int) -> tuple[str, str, str]:
    """Return a row of the table of results: metric, value or mean ± sd, 95 % interval."""
    values = [result[metric] for result in results]
    mean = float(np.mean(values))
    if len(values) > 1:
        sd = float(np.std(values, ddof=1))
        half = float(special.stdtrit(len(values) - 1, 0.975)) * sd / math.sqrt(len(values))
        return label(metric), f"{formatted(metric, mean)} ± {formatted(metric, sd)}", _interval(metric, mean, half)
    if not (tested and is_accuracy(metric)):
        return label(metric), formatted(metric, mean), ""
    low, high = wilson(round(mean * tested), tested)
    return label(metric), formatted(metric, mean), f"{formatted(metric, low)} to {formatted(metric, high)}"


def _interval(metric: str, mean: float, half: float) -> str:
    return f"{formatted(metric, mean - half)} to {formatted(metric, mean + half)}"


def _recipe(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return what decides about the result, by name."""
    model, trainer, data = config["model"], config["trainer"], config["data"]
    machine = manifest["environment"]
    versions = machine["packages"]
    weights = manifest.get("pretrained", {}).get("source")
    length = f"{trainer['max_epochs']} epochs" if trainer.get("max_epochs") else f"{trainer['max_steps']} steps"
    rows = {
        "data": f"{_call(data['dataset'])}, validation split {data['val_split']}",
        "augmentation": _arguments(data["augment"]) or "none",
        "network": _call(model["net"]),
        "pretrained weights": _public_text(weights) if weights else "",
        "objective": _call(model["objective"]) if model.get("objective") else "CrossEntropy()",
        "optimizer": _call(model["optimizer"]),
        "schedule": _call(model["schedule"]) if model.get("schedule") else "Cosine()",
        "length": f"{length}, batch size {data['batch_size']}",
        "EMA": str(model.get("ema_decay") or ""),
        "precision": trainer["precision"],
        "hardware": f"{', '.join(machine['gpus']) or machine['cpu']}, {_processes(machine['world_size'])}",
        "time": duration(manifest["wall_seconds"]),
        "versions": ", ".join(f"{package} {versions[package]}" for package in ("torch", "torchvision", "lightning")),
    }
    return {key: text.replace("|", "\\|") for key, text in rows.items() if text}


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _call(leaf: Any) -> str:
    """Return a class of a config with its arguments: SGD(lr=0.1, momentum=0.9)."""
    arguments = {**(leaf.get("init_args") or {}), **(leaf.get("dict_kwargs") or {})}
    return f"{leaf['class_path'].rpartition('.')[2]}({_arguments(arguments)})"


def _arguments(values: Mapping[str, Any]) -> str:
    used = {name: value for name, value in values.items() if value not in (None, False, [], {}, 0)}
    shown = {name: _call(v) if isinstance(v, dict) and "class_path" in v else v for name, v in used.items()}
    return ", ".join(f"{name}={value}" for name, value in shown.items())


def _logged_in() -> Any:
    """Return huggingface_hub's client; raise UserError unless somebody is logged in."""
    elsewhere = "or write the files only: --dry-run DIR"
    try:
        import huggingface_hub as hub
    except ImportError:
        raise UserError(f"reslab push requires huggingface_hub: pip install 'reslab[hub]', {elsewhere}") from None
    api = hub.HfApi()
    try:
        api.whoami()
    except hub.errors.LocalTokenNotFoundError:
        raise UserError(f"you are not logged in to the Hugging Face Hub: run `hf auth login`, {elsewhere}") from None
    except hub_errors(hub) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        problem = "it does not accept your token: run `hf auth login`" if status == 401 else _first_line(error)
        raise UserError(f"cannot log in to {api.endpoint}: {problem}, {elsewhere}") from None
    return api


def _upload(api: Any, name: str, folder: Path, private: bool, message: str) -> str:
    """Upload a directory and return the commit."""
    import huggingface_hub as hub

    try:
        api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.model_info(name).private:
            raise UserError(f"{name} exists and is public: make it private in its settings, or leave out --private")
        return api.upload_folder(repo_id=name, folder_path=folder, commit_message=message).oid
    except hub_errors(hub) as error:
        raise UserError(f"{name} could not be uploaded to {api.endpoint}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return mask(str(error).strip().partition("\n")[0]) or type(error).__name__

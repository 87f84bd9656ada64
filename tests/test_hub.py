"""Publish runs on the Hugging Face Hub and load weights from it, with the real client and a local server."""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save

from hub_server import TOKEN, Hub, serving
from reslab import inference
from reslab.cli import main
from reslab.models import ModelError, create_model
from reslab.models.zoo import find_weights, network_of_run
from reslab.runs.verify import _same_revisions
from runner import fit, manifest, reslab

hub_package = pytest.importorskip("huggingface_hub")
Undisturbed = Callable[..., Path]
FORKSERVER = multiprocessing.get_context("forkserver")  # that of tests/runner.py
FILES = {"README.md", "config.yaml", "manifest.json", "metrics.csv", "weights.safetensors"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as server:
        yield server


def card_metadata(folder: Path) -> Any:
    return hub_package.ModelCard((folder / "README.md").read_text(encoding="utf-8")).data


# Push


def test_pushed_run_is_a_run_directory_that_loads_from_the_hub(
    undisturbed: Undisturbed, tmp_path: Path, hub: Hub
) -> None:
    run, environ = undisturbed(), hub.environ(tmp_path / "home")
    ended = reslab("push", run, "me/digits", "--license", "mit", **environ)
    assert ended.status == 0, ended.output
    (commit,) = hub.commits["me/digits"]
    assert f"hf://me/digits@{commit}" in ended.output and TOKEN not in ended.output
    files = hub.commits["me/digits"][commit]
    assert {*files} == FILES and not hub.private["me/digits"]
    for name, content in files.items():
        (tmp_path / "copy").mkdir(exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
        assert TOKEN.encode() not in content
    assert files["weights.safetensors"] == (run / "weights.safetensors").read_bytes()
    net, original = network_of_run(tmp_path / "copy"), network_of_run(run)
    assert all(map(torch.equal, net.state_dict().values(), original.state_dict().values()))
    assert main(["test", str(tmp_path / "copy")]) == 0


def test_pushed_run_can_be_reproduced(undisturbed: Undisturbed, tmp_path: Path) -> None:
    run = undisturbed()
    assert main(["push", str(run), "me/digits", "--dry-run", str(tmp_path / "copy")]) == 0
    compared = reslab("reproduce", tmp_path / "copy", "--compare", run)
    assert compared.status == 0 and "identical" in compared.output, compared.output


def test_private_repository(undisturbed: Undisturbed, tmp_path: Path, hub: Hub) -> None:
    environ = hub.environ(tmp_path / "home")
    assert reslab("push", undisturbed(), "me/secret", "--private", **environ).status == 0
    assert hub.private["me/secret"]
    hub.private["me/open"] = False
    ended = reslab("push", undisturbed(), "me/open", "--private", **environ)
    assert ended.status == 2 and "me/open exists and is public" in ended.output
    assert not hub.commits.get("me/open")


@pytest.mark.parametrize("obstacle", ["not logged in", "wrong token", "no server", "package"])
def test_push_is_refused_before_anything_is_written(
    undisturbed: Undisturbed, tmp_path: Path, hub: Hub, obstacle: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    environ = hub.environ(tmp_path / "home", logged_in=obstacle != "not logged in")
    environ |= {"wrong token": {"HF_TOKEN": "hf_wrong"}, "no server": {"HF_ENDPOINT": "http://127.0.0.1:9"}}.get(
        obstacle, {}
    )
    if obstacle == "package":
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        status, output = main(["push", str(undisturbed()), "me/digits"]), capsys.readouterr().err
    else:
        status, output = reslab("push", undisturbed(), "me/digits", **environ)
    remedy = {"package": r"pip install 'reslab\[hub\]'", "no server": "cannot log in to http://127.0.0.1:9"}
    assert status == 2 and re.search(remedy.get(obstacle, "run `hf auth login`"), output), output
    assert "--dry-run DIR" in output and "Traceback" not in output
    assert not hub.commits and not any("create" in request for request in hub.requests)


WRONG = [
    ({"name": "digits"}, "must be OWNER/NAME"),
    ({"name": "me/dig its"}, "must be OWNER/NAME"),
    ({"name": "me/a--b"}, "must be OWNER/NAME"),
    ({"license": "MIT License"}, "must be an identifier of the Hub"),
    ({"status": "preempted"}, "is not finished"),
    ({"weights_sha256": "0" * 64}, "does not hold the weights that the run tested"),
    ({"out": "full"}, "is not an empty directory"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_push_is_one_message(
    undisturbed: Undisturbed, tmp_path: Path, changes: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(undisturbed(), tmp_path / "run")
    record = manifest(run) | {key: changes[key] for key in ("status", "weights_sha256") if key in changes}
    (run / "manifest.json").write_text(json.dumps(record))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    license = ["--license", changes["license"]] if "license" in changes else []
    out = tmp_path / changes.get("out", "new")
    assert main(["push", str(run), changes.get("name", "me/x"), *license, "--dry-run", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_nothing_private_is_published(
    undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    run = shutil.copytree(undisturbed(), tmp_path / "run")
    record = manifest(run)
    record["command"] = (
        "reslab fit --config /home/ann/my.yaml '--data.root=/home/ann/my data/sets' --logger.api_key x1y2"
    )
    record["attempts"][0]["host"] = record["environment"]["host"] = "annslaptop"
    record["git"] = {"sha": "a" * 40, "dirty": True, "untracked": ["ann_notes.txt"], "left_out": [], "binaries": []}
    record["git"] |= {"diff": "uncommitted.diff", "diff_sha256": "b" * 64}
    record["pretrained"] = {"source": "/home/ann/weights/start.pt", "sha256": "c" * 64}
    (run / "manifest.json").write_text(json.dumps(record))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["root"] = "/home/ann/my data/sets"
    config["model"]["weights"] = "/home/ann/weights/start.pt"
    logger = {"class_path": "WandB", "init_args": {"entity": "annslab", "note": "0123456789abcdef", "token": "x1y2"}}
    config["trainer"]["logger"] = logger
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    monkeypatch.setattr("reslab.hub.load_run", lambda *args: inference.load_run(str(undisturbed()), []))
    assert main(["push", str(run), "me/x", "--dry-run", str(tmp_path / "out")]) == 0
    for file in (tmp_path / "out").iterdir():
        content = file.read_bytes().decode(errors="replace")
        for secret in ("home", "ann/", "my data", "annslaptop", "annslab", "ann_notes", "0123456789abcdef", "x1y2"):
            assert secret not in content, (file.name, secret)
    public = json.loads((tmp_path / "out/manifest.json").read_text())
    assert public["pretrained"]["source"] == "/path/to/start.pt"
    digest = hashlib.sha256((tmp_path / "out/config.yaml").read_bytes()).hexdigest()
    assert public["config_sha256"] == digest
    assert "not published" in (tmp_path / "out/README.md").read_text()


PATHS = [
    ("/home/ann/x.pt", "/path/to/x.pt"),
    ("/home/ann/my files/x.pt", "/path/to/x.pt"),
    ("see /home/ann/x.pt, and https://host.org/a/b", "see /path/to/x.pt, and https://host.org/a/b"),
    ("hf://me/x@abc/y.safetensors", "hf://me/x@abc/y.safetensors"),
    ("train/loss and val/acc", "train/loss and val/acc"),
    ("configs/data/digits.yaml", "configs/data/digits.yaml"),
    ("a='/data/a/b'", "a='/path/to/b'"),
]


@pytest.mark.parametrize(("text", "expected"), PATHS)
def test_paths_are_replaced_and_nothing_else(text: str, expected: str) -> None:
    from reslab.hub import public

    assert public({"a": [text]}) == {"a": [expected]}
    assert public(public(text)) == expected


# The model card


def test_model_card_of_one_run(undisturbed: Undisturbed, tmp_path: Path) -> None:
    run = undisturbed()
    assert main(["push", str(run), "me/digits", "--license", "apache-2.0", "--dry-run", str(tmp_path / "out")]) == 0
    data, text = card_metadata(tmp_path / "out"), (tmp_path / "out/README.md").read_text()
    record = manifest(run)
    assert data.license == "apache-2.0" and data.pipeline_tag == "image-classification"
    values = {result.metric_name: result.metric_value for result in data.eval_results}
    assert values["test accuracy"] == record["results"]["test/acc"]
    assert re.search(r"test accuracy \| \d+\.\d\d % \| \d+\.\d\d % to \d+\.\d\d %", text)
    code = 'network_of_run(snapshot_download("me/digits"))', "hf://me/digits", "reslab reproduce digits"
    for part in (*code, record["weights_sha256"], record["git"]["sha"], "apache-2.0", "seed 0", "ResNet(", "OneCycle("):
        assert part in text, part
    assert "{{" not in text and "None" not in text


def test_model_card_of_several_seeds(undisturbed: Undisturbed, tmp_path: Path) -> None:
    runs = [undisturbed(), undisturbed("--seed_everything=1"), undisturbed("--seed_everything=2")]
    words = [str(run) for run in runs]
    assert main(["push", words[0], "me/x", "--seeds", *words[1:], "--dry-run", str(tmp_path / "out")]) == 0
    accuracies = torch.tensor([manifest(run)["results"]["test/acc"] for run in runs], dtype=torch.float64)
    text = (tmp_path / "out/README.md").read_text()
    mean, sd = 100 * float(accuracies.mean()), 100 * float(accuracies.std())
    half = 4.302653 * sd / 3**0.5  # t distribution with 2 degrees of freedom
    assert f"| {mean:.2f} % ± {sd:.2f} % | {mean - half:.2f} % to {mean + half:.2f} % |" in text
    assert "3 runs that differ only in their seed (0, 1, 2)" in text and "those of seed 0" in text


@pytest.mark.parametrize("other", ["the same run", "another learning rate"])
def test_seeds_must_be_of_the_same_config(
    undisturbed: Undisturbed, tmp_path: Path, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = second = undisturbed()
    message = "two runs with seed 0"
    if other == "another learning rate":
        second, message = shutil.copytree(run, tmp_path / "second"), "model.optimizer.init_args.lr: 0.1 != 0.2"
        config = (run / "config.yaml").read_text()
        (second / "config.yaml").write_text(config.replace("lr: 0.1", "lr: 0.2"))
    assert main(["push", str(run), "me/x", "--seeds", str(second), "--dry-run", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


# Load


def digits_network() -> torch.nn.Module:
    return create_model("resnet8", in_channels=1, shortcut="A")


def weights(seed: int) -> bytes:
    torch.manual_seed(seed)
    return save(digits_network().state_dict())


@pytest.mark.slow  # three runs, one of them in a new process
def test_run_from_hub_weights_is_reproduced_from_their_revision(tmp_path: Path, hub: Hub) -> None:
    environ = hub.environ(tmp_path / "home", logged_in=False)
    hub.commit("ann/start", {"weights.safetensors": weights(1)})
    options = ["--model.weights=hf://ann/start", "--trainer.max_epochs=1"]
    assert fit(tmp_path / "run", *options, **environ).status == 0
    hub.commit("ann/start", {"weights.safetensors": weights(2)})
    again = reslab("reproduce", tmp_path / "run", **environ)
    assert again.status == 0 and "identical" in again.output, again.output
    assert fit(tmp_path / "moved", *options, **environ).status == 0
    assert manifest(tmp_path / "moved")["weights_sha256"] != manifest(tmp_path / "run")["weights_sha256"]


def test_run_from_hub_weights_records_their_revision_for_reproduce(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.commit("ann/start", {"weights.safetensors": weights(1)})
    options = ["--model.weights=hf://ann/start", "--trainer.max_epochs=1"]
    ended = fit(tmp_path / "run", *options, **hub.environ(tmp_path / "home", logged_in=False))
    assert ended.status == 0, ended.output
    source = f"hf://ann/start@{commit}/weights.safetensors"
    sha256 = hashlib.sha256(weights(1)).hexdigest()
    record = manifest(tmp_path / "run")
    assert record["pretrained"] == {"source": source, "revision": commit, "sha256": sha256}
    assert "hf://ann/start\n" in (tmp_path / "run/config.yaml").read_text()
    started: list[Any] = []
    monkeypatch.setattr(
        "reslab.runs.verify._fit", lambda config, out, overrides, environment: started.append(overrides)
    )
    monkeypatch.setattr("reslab.runs.verify._compare_runs", lambda *args: 0)
    monkeypatch.setattr("reslab.runs.verify._logged", lambda path: {})
    assert main(["reproduce", str(tmp_path / "run"), "--data.num_workers=0"]) == 0
    assert started == [[f"--model.weights={source}", "--data.num_workers=0"]]


def test_weights_of_a_teacher_on_the_hub_keep_their_revision() -> None:
    source = "hf://ann/teacher@abc/weights.safetensors"
    assert _same_revisions({"objective": {"teacher_weights": source}}) == [
        f"--model.objective.init_args.weights={source}"
    ]
    assert _same_revisions({"pretrained": {"source": "/a/b.pt"}, "objective": {"teacher": "runs/x"}}) == []


def resolve(address: str, hub: Hub, home: Path, **environ: str) -> dict[str, str] | str:
    """Return the manifest's record of the weights at an address, or the message why there is none."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    variables = {**hub.environ(home, logged_in=False), **environ}
    process = FORKSERVER.Process(target=_resolve, args=(address, variables, sender))
    process.start()
    process.join(60)
    return receiver.recv()


def _resolve(address: str, environ: dict[str, str], sender: Any) -> None:
    os.environ.update(environ)  # before huggingface_hub is imported
    try:
        sender.send(find_weights(address).record())
    except ModelError as error:
        sender.send(str(error))


ADDRESSES = {
    "hf://ann/a": "model.safetensors",
    "hf://ann/a@main/sub/old.safetensors": "sub/old.safetensors",
    "hf://ann/b": "last.safetensors",
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_file_is_chosen_by_address_or_name(tmp_path: Path, hub: Hub, address: str) -> None:
    content = {"model.safetensors": b"1", "sub/old.safetensors": b"2", "last.safetensors": b"3"}
    commits = {
        "ann/a": hub.commit("ann/a", {"README.md": b"", **{name: content[name] for name in [*content][:2]}}),
        "ann/b": hub.commit("ann/b", {"last.safetensors": b"3"}),
    }
    repo, name = address[5:10], ADDRESSES[address]
    expected = {"source": f"hf://{repo}@{commits[repo]}/{name}", "revision": commits[repo]}
    sha256 = hashlib.sha256(content[name]).hexdigest()
    assert resolve(address, hub, tmp_path) == {**expected, "sha256": sha256}


MISSING = [
    ("hf://ann/nothing", "there is no such repository"),
    ("hf://ann/nothing/x.pt", "there is no such"),
    ("hf://ann/a@v9", "there is no such revision"),
    ("hf://ann/a@v9/x.pt", "there is no such"),
    ("hf://ann/a/other.safetensors", "there is no such file"),
    ("hf://ann/two", "does not say which file to load: it has a.pt, b.pt"),
    ("hf://ann", "must be hf://OWNER/NAME"),
    ("hf://ann/a@main@b", "must be hf://OWNER/NAME"),
]


@pytest.mark.parametrize(("address", "message"), MISSING)
def test_what_is_not_on_the_hub_is_one_message(tmp_path: Path, hub: Hub, address: str, message: str) -> None:
    hub.commit("ann/a", {"weights.safetensors": b"1"})
    hub.commit("ann/two", {"a.pt": b"1", "b.pt": b"2"})
    text = resolve(address, hub, tmp_path)
    assert isinstance(text, str) and message in text and text.startswith(address) and "\n" not in text


def test_fit_refuses_missing_weights_before_it_starts(tmp_path: Path, hub: Hub) -> None:
    environ = hub.environ(tmp_path, logged_in=False)
    ended = fit(tmp_path / "run", "--model.weights=hf://ann/nothing", **environ)
    assert ended.status == 2 and "there is no such repository" in ended.output and "Traceback" not in ended.output
    assert not (tmp_path / "run").exists()


OFFLINE, UNREACHABLE = {"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}


@pytest.mark.parametrize(
    ("address", "offline"),
    [
        ("hf://ann/a", OFFLINE),
        ("hf://ann/a", UNREACHABLE),
        ("hf://ann/a/weights.safetensors", OFFLINE),
        # The client tries five times, for 11 seconds.
        pytest.param("hf://ann/a/weights.safetensors", UNREACHABLE, marks=pytest.mark.slow),
    ],
)
def test_weights_in_the_cache_load_without_a_network(
    tmp_path: Path, hub: Hub, address: str, offline: dict[str, str]
) -> None:
    hub.commit("ann/a", {"weights.safetensors": b"1"})
    online = resolve(address, hub, tmp_path)
    assert isinstance(online, dict) and resolve(address, hub, tmp_path, **offline) == online
    assert resolve(online["source"], hub, tmp_path, **offline) == online
    text = resolve(address, hub, tmp_path / "another", **offline)
    assert isinstance(text, str) and "no connection, and it is not in the cache" in text and "give the file" in text


def test_weights_of_a_local_file_are_recorded_by_their_hash(tmp_path: Path) -> None:
    (tmp_path / "start.safetensors").write_bytes(weights(1))
    ended = fit(tmp_path / "run", f"--model.weights={tmp_path / 'start.safetensors'}", "--trainer.max_epochs=1")
    assert ended.status == 0, ended.output
    assert load_file(tmp_path / "start.safetensors").keys() == digits_network().state_dict().keys()
    expected = hashlib.sha256(weights(1)).hexdigest()
    assert manifest(tmp_path / "run")["pretrained"] == {
        "source": str(tmp_path / "start.safetensors"), "sha256": expected,
    }  # fmt: skip

"""Names and pretrained weights: what is loaded, what is reinitialized, and what is refused."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reslab.errors import UserError
from reslab.models import ResNet, create_model, list_models, load_weights
from reslab.models.zoo import VARIANTS


def tiny(**kwargs: int) -> ResNet:
    return create_model("resnet8", **({"num_classes": 4} | kwargs))


def equal(net: ResNet, other: ResNet, except_for: str = "nothing") -> bool:
    theirs = other.state_dict()
    return all(torch.equal(v, theirs[k]) for k, v in net.state_dict().items() if not k.startswith(except_for))


# ---- names


def test_listing_names_does_not_import_torch() -> None:
    code = "import sys; from reslab.models import list_models; list_models(); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_any_depth_of_6n_plus_2_is_a_name() -> None:
    assert create_model("resnet8").layers == (1, 1, 1)
    assert create_model("resnet1202", width=1).layers == (200, 200, 200)


@pytest.mark.parametrize(("name", "nearest"), [("resnet5O", "resnet50"), ("resnet21", "resnet20"), ("vgg", "resnet18")])
def test_unknown_name_suggests_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UserError, match=nearest):
        create_model(name)
    with pytest.raises(ValueError, match=nearest):
        create_model(name)


def test_kwargs_override_the_variant() -> None:
    net = create_model("resnet20", shortcut="none", num_classes=0)
    assert net.shortcut == "none"
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 64)
    assert VARIANTS["resnet20"]["shortcut"] == "A"


def test_all_names_are_different_networks() -> None:
    variants = [tuple(sorted(kwargs.items())) for kwargs in VARIANTS.values()]
    assert len(set(variants)) == len(variants) == len(list_models())


# ---- files


SAVERS: dict[str, Callable[[dict, Path], None]] = {
    "plain.pth": torch.save,
    "plain.pt": torch.save,
    "plain.safetensors": save_file,
    "trainer.pt": lambda state, file: torch.save({"state_dict": state, "epoch": 3}, file),
    "model.pth": lambda state, file: torch.save({"model": state, "lr": 0.1}, file),
    "ddp.pth": lambda state, file: torch.save({f"module.{k}": v for k, v in state.items()}, file),
    "compiled.pth": lambda state, file: torch.save({f"net._orig_mod.{k}": v for k, v in state.items()}, file),
    "compiled_inside.pth": lambda state, file: torch.save({f"_orig_mod.net.{k}": v for k, v in state.items()}, file),
}


@pytest.mark.parametrize("name", SAVERS)
def test_load_weights_reads_every_file_format(name: str, tmp_path: Path) -> None:
    trained, net = tiny(), tiny()
    SAVERS[name](trained.state_dict(), tmp_path / name)
    messages = load_weights(net, tmp_path / name)
    assert equal(net, trained)
    assert messages == [f"weights: {tmp_path / name}"]


@pytest.mark.parametrize(("classes_in_file", "classes"), [(4, 7), (0, 7), (4, 0)])
def test_head_is_new_if_the_number_of_classes_differs(classes_in_file: int, classes: int, tmp_path: Path) -> None:
    trained = tiny(num_classes=classes_in_file)
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    net = tiny(num_classes=classes)
    fresh_head = [p.clone() for p in net.fc.parameters()]
    messages = load_weights(net, str(tmp_path / "w.pth"))
    body, theirs = net.state_dict(), trained.state_dict()
    assert all(torch.equal(body[k], theirs[k]) for k in body if not k.startswith("fc."))
    assert all(map(torch.equal, net.fc.parameters(), fresh_head))
    fate = "new" if classes else "left out"
    assert f"the head is {fate}: {classes_in_file} classes" in messages[-1]
    assert f"{classes} in this network" in messages[-1]


def test_stem_is_new_if_the_number_of_channels_differs(tmp_path: Path) -> None:
    trained, net = tiny(), tiny(in_channels=1)
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    stem = net.conv1.weight.clone()
    messages = load_weights(net, tmp_path / "w.pth")
    assert equal(net, trained, except_for="conv1.")
    assert torch.equal(net.conv1.weight, stem)
    assert "the stem is new: 3 channels" in messages[-1]


def test_run_directory_loads_its_weights(tmp_path: Path) -> None:
    trained, net = tiny(), tiny()
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    assert "weights.safetensors" in load_weights(net, tmp_path)[0]
    assert equal(net, trained)
    with pytest.raises(UserError, match=r"there is no weights file .*empty/weights\.safetensors"):
        (tmp_path / "empty").mkdir()
        load_weights(net, tmp_path / "empty")


def test_another_stem_is_a_mismatch_even_if_the_channels_differ(tmp_path: Path) -> None:
    torch.save(tiny().state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"stem 3×3; .* stem 7×7"):
        load_weights(create_model("resnet8", num_classes=4, in_channels=1, stem="imagenet"), tmp_path / "w.pth")


class Payload:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.file,))


def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    torch.save({"state_dict": tiny().state_dict(), "extra": Payload(trap)}, tmp_path / "w.pth")
    torch.load(tmp_path / "w.pth", weights_only=False)
    assert trap.exists()  # the payload works if it is allowed to
    trap.unlink()
    with pytest.raises(UserError, match=r"no code in it was run.*\.safetensors"):
        load_weights(tiny(), tmp_path / "w.pth")
    assert not trap.exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_error_names_the_damaged_or_missing_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=name):
        load_weights(tiny(), tmp_path / name)
    (tmp_path / name).write_bytes(b"not weights at all")
    with pytest.raises(UserError, match=name):
        load_weights(tiny(), tmp_path / name)


def test_file_without_a_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "w.pth")
    with pytest.raises(UserError, match="no state dict"):
        load_weights(tiny(), tmp_path / "w.pth")


# ---- names of torchvision's weights


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty download cache of torch.hub. A file with the right name in it is not downloaded again."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("name", ["IMAGENET1K_V1", "DEFAULT", "ResNet18_Weights.IMAGENET1K_V1"])
def test_torchvision_names_load_torchvisions_files(name: str, hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = create_model("resnet18")
    hub.mkdir()
    torch.save(trained.state_dict(), hub / "resnet18-f37072fd.pth")
    net = create_model("resnet18", weights=name, num_classes=10)
    assert equal(net, trained, except_for="fc.")
    assert "the head is new: 1000 classes" in capsys.readouterr().out


def test_unknown_weights_list_the_available_names() -> None:
    with pytest.raises(UserError, match="did you mean IMAGENET1K_V2 or IMAGENET1K_V1"):
        create_model("resnet50", weights="IMAGENET1K_V3")
    with pytest.raises(UserError, match=r"ResNet18_Weights\.IMAGENET1K_V1"):
        create_model("resnet20", weights="IMAGENET1K_V1")


def test_failed_download_names_the_file_to_download(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(UserError, match=r"resnet34-b627a593\.pth"):
        create_model("resnet34", weights="IMAGENET1K_V1")


# ---- torch.hub


HUB = """
import sys, torch
repo, weights = sys.argv[1:]
net = torch.hub.load(repo, "resnet20", source="local", weights=weights, num_classes=4)
sys.path.insert(0, repo)
import hubconf, reslab
assert {"resnet18", "resnet152", "resnet20", "resnet110", "resnext50_32x4d"} <= {*vars(hubconf)}
print(reslab.__file__, sum(p.double().sum().item() for p in net.parameters()))
"""


def test_torch_hub_works_without_installing_reslab(tmp_path: Path, repo: Path) -> None:
    net = create_model("resnet20", num_classes=4)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    bare = [
        sys.executable,
        "-S",
        "-c",
        f"import sys; sys.path += {[p for p in sys.path if 'site-packages' in p]}\n{HUB}",
    ]
    done = subprocess.run([*bare, repo, tmp_path / "w.pth"], capture_output=True, text=True, env={}, check=False)
    assert done.returncode == 0, done.stderr
    file, total = done.stdout.split("\n")[-2].split()
    assert file == str(repo / "src/reslab/__init__.py")
    assert float(total) == sum(p.double().sum().item() for p in net.parameters())

"""The contract of Network: ResNet, timm, torchvision and a network of the user's own."""

import json
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from reslab.errors import UserError
from reslab.models import (
    ModelError,
    Network,
    SpeedNet,
    TimmNetwork,
    TorchvisionNetwork,
    check_network,
    create_model,
    list_models,
    load_weights,
    network_of_run,
    summarize,
)


class TinyNet(Network):
    """The example in the docstring of Network."""

    def __init__(self, width: int = 16, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        self.in_channels, self.num_classes, self.num_features = in_channels, num_classes, 2 * width
        self.scale = nn.Parameter(torch.ones(()))  # outside of all layers: in the first group
        self.stem = nn.Conv2d(in_channels, width, 3, stride=2)
        self.stage1 = nn.Sequential(nn.ReLU(), nn.Conv2d(width, 2 * width, 3, stride=2), nn.ReLU())
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        return self.stage1(self.stem(self.scale * x)).mean((2, 3))


def named(name: str, **fixed: Any) -> Callable[..., Network]:
    return lambda **kwargs: create_model(name, **fixed, **kwargs)


NETWORKS: dict[str, Callable[..., Network]] = {
    "own": TinyNet,
    "resnet8": named("resnet8"),
    "speednet": lambda **kwargs: SpeedNet((8, 16), convs=3, residual=True, **kwargs),
    "timm_resnet": named("timm/resnet10t"),
    "timm_convnext": named("timm/convnext_atto"),
    "timm_vit": named("timm/vit_tiny_patch16_224", image_size=32),
    "timm_swin": named("timm/swin_tiny_patch4_window7_224", image_size=32),
    "timm_mixer": named("timm/mixer_s32_224", image_size=32),
    "timm_efficientnet": named("timm/efficientnet_b0"),
    "torchvision_mobilenet": named("torchvision/mobilenet_v3_small", image_size=32),
    "torchvision_resnet18": named("torchvision/resnet18"),
}
# Networks with an unusual head or layer structure, and an image size.
SPECIAL = {
    "torchvision/vit_b_32": 32,
    "timm/mobilenetv3_small_050": 32,
    "timm/deit_tiny_distilled_patch16_224": 32,  # two heads
    "timm/coat_tiny": 32,  # layers that share parameters
    "timm/regnetx_002": 32,
    "timm/levit_128s": 224,  # the heads begin with a norm
    "timm/selecsls42": 64,  # layers called head before the head
    "timm/resnetv2_50": 64,  # the head is a convolution after the pooling
    "timm/sequencer2d_s": 224,  # channels last
    "torchvision/squeezenet1_1": 64,  # the head is a convolution before the pooling
    "torchvision/densenet121": 32,
    "torchvision/googlenet": 64,  # auxiliary heads
    "torchvision/shufflenet_v2_x0_5": 32,
    "torchvision/mnasnet0_5": 32,
}


@pytest.fixture(scope="module", params=NETWORKS)
def make(request: pytest.FixtureRequest) -> Callable[..., Network]:
    return NETWORKS[request.param]


def images(channels: int = 3, size: int = 32) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def parameters(layers: list[nn.Module | nn.Parameter]) -> list[nn.Parameter]:
    return [p for layer in layers for p in (layer.parameters() if isinstance(layer, nn.Module) else [layer])]


def head_keys(net: Network) -> set[str]:
    head = {id(p) for p in net.head.parameters()}
    return {name for name, p in net.named_parameters() if id(p) in head}


# ---- the contract


@pytest.mark.parametrize(("channels", "classes"), [(3, 7), (1, 2)])
def test_shapes_and_head_follow_the_contract(make: Callable[..., Network], channels: int, classes: int) -> None:
    net = make(in_channels=channels, num_classes=classes).eval()
    assert (net.in_channels, net.num_classes) == (channels, classes)
    with torch.no_grad():
        logits, features = net(images(channels)), net.forward_features(images(channels))
        assert logits.shape == (2, classes)
        assert features.shape == (2, net.num_features)
        torch.testing.assert_close(net.head(features), logits)


def test_zero_classes_return_the_features(make: Callable[..., Network]) -> None:
    net = make(num_classes=0).eval()
    check_network(net)
    assert not head_keys(net)
    with torch.no_grad():
        torch.testing.assert_close(net(images()), net.forward_features(images()))
        assert net(images()).shape == (2, net.num_features)


def test_every_parameter_is_in_one_group_from_input_to_output(make: Callable[..., Network]) -> None:
    net = make(num_classes=7)
    check_network(net)
    groups = net.layer_groups()
    grouped = [id(p) for group in groups.values() for p in parameters(group)]
    assert sorted(grouped) == sorted(id(p) for p in net.parameters())
    assert list(groups)[-1] == "head" and parameters(groups["head"]) == [*net.head.parameters()]
    # Layers run in the order of their groups. Loose parameters are in the first one.
    order: list[str] = []
    for name, group in groups.items():
        for layer in group:
            if isinstance(layer, nn.Module):
                layer.register_forward_hook(lambda *_, name=name: order.append(name))
    net.eval()(images())
    assert list(dict.fromkeys(order)) == list(groups)
    for first, group in enumerate(groups.values()):
        assert first == 0 or not any(isinstance(layer, nn.Parameter) for layer in group)


def test_blocks_are_disjoint_and_between_stem_and_head(make: Callable[..., Network]) -> None:
    net = make(num_classes=7)
    blocks = net.blocks()
    assert blocks and all(isinstance(block, nn.Module) for block in blocks)
    held = [id(p) for block in blocks for p in block.parameters()]
    assert len(held) == len(set(held))
    head = {id(p) for p in net.head.parameters()}
    assert head.isdisjoint(held)
    assert sum(p.numel() for block in blocks for p in block.parameters()) > 0.5 * sum(
        p.numel() for p in net.parameters() if id(p) not in head
    )


@pytest.mark.parametrize(("name", "size"), SPECIAL.items())
def test_special_architectures_train_and_keep_the_contract(name: str, size: int) -> None:
    net = create_model(name, num_classes=7, in_channels=1, image_size=size)
    check_network(net)
    assert net.train()(images(1, size)).shape == (2, 7)  # no tuple with auxiliary logits
    with torch.no_grad():
        assert net.eval().forward_features(images(1, size)).shape == (2, net.num_features)


def test_copies_are_independent(make: Callable[..., Network]) -> None:
    net = make(num_classes=7)
    copy = deepcopy(net)
    assert {id(p) for p in parameters(copy.layer_groups()["head"])}.isdisjoint(id(p) for p in net.parameters())
    assert copy.layer_groups().keys() == net.layer_groups().keys()


def test_incomplete_network_is_reported_in_one_message() -> None:
    with pytest.raises(ModelError) as caught:
        check_network(nn.Linear(2, 2))
    for part in ("in_channels", "num_classes", "num_features", "forward_features", "layer_groups", "blocks", "head"):
        assert part in str(caught.value)

    class Forgetful(TinyNet):
        def layer_groups(self) -> dict[str, list[nn.Module | nn.Parameter]]:
            return {"stem": [self.stem], "head": [self.stage1]}

        def blocks(self) -> list[nn.Module]:
            return [self.stage1, self.stage1[1]]

    with pytest.raises(ModelError, match=r"head\.weight.*last group.*disjoint"):
        check_network(Forgetful())


# ---- the libraries' networks are not changed


def test_timm_network_computes_what_timm_computes(tmp_path: Path) -> None:
    theirs = timm.create_model("convnext_atto", num_classes=5).eval()
    net = TimmNetwork("convnext_atto", num_classes=5).eval()
    torch.save(theirs.state_dict(), tmp_path / "published.pth")  # without our prefix
    load_weights(net, tmp_path / "published.pth")
    with torch.no_grad():
        assert torch.equal(net(images()), theirs(images()))


def test_torchvision_network_computes_what_torchvision_computes(tmp_path: Path) -> None:
    theirs = torchvision.models.mobilenet_v3_small(num_classes=5).eval()
    net = TorchvisionNetwork("mobilenet_v3_small", num_classes=5).eval()
    torch.save(theirs.state_dict(), tmp_path / "published.pth")  # without our prefix
    load_weights(net, tmp_path / "published.pth")
    with torch.no_grad():
        assert torch.equal(net(images()), theirs(images()))


def test_image_size_changes_only_what_depends_on_it() -> None:
    small, large = (TimmNetwork("vit_tiny_patch16_224", image_size=size) for size in (32, 64))
    assert small.model.patch_embed.proj.kernel_size == (16, 16)  # type: ignore[union-attr]
    different = {k for k, v in small.state_dict().items() if v.shape != large.state_dict()[k].shape}
    assert different == {"model.pos_embed"}


def test_all_torchvision_classifiers_build() -> None:
    names = list_models("torchvision")
    assert "torchvision/inception_v3" in names and not any("rcnn" in n or "raft" in n for n in names)
    for name in ("torchvision/inception_v3", "torchvision/maxvit_t", "torchvision/swin_v2_t", "torchvision/alexnet"):
        assert name in names
        with torch.device("meta"):
            check_network(create_model(name, num_classes=5, in_channels=1))


# ---- weights


def test_own_weights_load_with_another_head(make: Callable[..., Network], tmp_path: Path) -> None:
    trained, net = make(num_classes=4), make(num_classes=7)
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    fresh = {key: net.state_dict()[key].clone() for key in head_keys(net)}
    messages = load_weights(net, tmp_path / "w.pth")
    assert len(messages) == 2 and "the head is new: 4 classes" in messages[1] and "7 in this network" in messages[1]
    for key, value in net.state_dict().items():
        assert torch.equal(value, fresh[key] if key in fresh else trained.state_dict()[key]), key


def test_own_weights_load_with_other_channels(make: Callable[..., Network], tmp_path: Path) -> None:
    if make is NETWORKS["speednet"]:
        pytest.skip("the first layer has as many filters as a patch has values")
    trained, net = make(num_classes=4), make(num_classes=4, in_channels=1)
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    messages = load_weights(net, tmp_path / "w.safetensors")
    assert len(messages) == 2 and "the stem is new: 3 channels" in messages[1]
    theirs = trained.state_dict()
    different = [key for key, value in net.state_dict().items() if not torch.equal(value, theirs[key])]
    assert len(different) == 1 and net.state_dict()[different[0]].shape[1] == 1


class Nested(nn.Module):
    """A network whose own keys begin like the prefix of a wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.head = nn.Linear(2, 3), nn.Linear(3, 4)


@pytest.mark.parametrize("wrappers", ["", "module.", "net.", "_orig_mod.", "module._orig_mod.", "net.model.", "model."])
@pytest.mark.parametrize("make_net", [Nested, TinyNet, lambda: TimmNetwork("test_vit", num_classes=3)])
def test_prefixes_are_removed_only_as_far_as_needed(
    make_net: Callable[[], nn.Module], wrappers: str, tmp_path: Path
) -> None:
    trained, net = make_net(), make_net()
    torch.save({wrappers + key: value for key, value in trained.state_dict().items()}, tmp_path / "w.pth")
    load_weights(net, tmp_path / "w.pth")
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in net.state_dict().items())


def test_misfit_is_short_and_names_both_sides(tmp_path: Path) -> None:
    torch.save(create_model("resnet110").state_dict(), tmp_path / "w.pth")
    with pytest.raises(ModelError) as caught:
        load_weights(create_model("timm/resnet10t"), tmp_path / "w.pth")
    message = str(caught.value)
    assert len(message) < 1000
    assert "w.pth" in message and "TimmNetwork" in message and "missing" in message and "only in the file" in message


def test_vit_weights_are_resized_to_another_image_size(tmp_path: Path) -> None:
    trained = TimmNetwork("vit_tiny_patch16_224", image_size=64, num_classes=3)
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    net = TimmNetwork("vit_tiny_patch16_224", image_size=32, num_classes=3)
    messages = load_weights(net, tmp_path / "w.pth")
    assert "resized to this image size: model.pos_embed" in messages[-1]
    assert torch.equal(net.model.blocks[0].attn.qkv.weight, trained.model.blocks[0].attn.qkv.weight)  # type: ignore


def test_torchvision_names_of_weights_load_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    published = torchvision.models.mobilenet_v3_small()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(published.state_dict(), tmp_path / "hub/checkpoints/mobilenet_v3_small-047dcff4.pth")
    net = TorchvisionNetwork("mobilenet_v3_small", "DEFAULT", num_classes=5)
    assert torch.equal(net.state_dict()["model.features.0.0.weight"], published.state_dict()["features.0.0.weight"])
    assert "the head is new: 1000 classes" in capsys.readouterr().out


def test_densenet_checkpoint_keys_of_2017_load(tmp_path: Path) -> None:
    published = torchvision.models.densenet121(num_classes=3).state_dict()
    old = {key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): value for key, value in published.items()}
    torch.save(old, tmp_path / "w.pth")
    net = TorchvisionNetwork("densenet121", num_classes=3)
    load_weights(net, tmp_path / "w.pth")
    assert all(torch.equal(value, published[key.removeprefix("model.")]) for key, value in net.state_dict().items())


# ---- refusals


@pytest.mark.parametrize(
    ("make_net", "message"),
    [
        (lambda: create_model("timm/convnxt_atto"), "did you mean convnext_atto"),
        (lambda: create_model("torchvision/resnet19"), "did you mean resnet18"),
        (lambda: create_model("torchvision/fasterrcnn_resnet50_fpn"), "no image classifier"),
        (lambda: create_model("tim/resnet18"), "timm/NAME"),
        (lambda: TimmNetwork("hf-hub:timm/resnet10t.c3_in1k"), "set allow_remote to true"),
        (lambda: TimmNetwork("hf_hub:timm/resnet10t"), "set allow_remote to true"),
        (lambda: TimmNetwork("local-dir:."), "set allow_remote to true"),
        (lambda: TimmNetwork("file:///etc/passwd"), "set allow_remote to true"),
        (lambda: TimmNetwork("resnet10t", checkpoint_path="w.pth"), "checkpoint_path.*allow_remote"),
        (lambda: TimmNetwork("resnet10t", pretrained_cfg={"url": "http://x"}), "pretrained_cfg.*allow_remote"),
        (lambda: TimmNetwork("resnet10t", no_such_argument=1), "cannot be built.*no_such_argument"),
        (lambda: TimmNetwork("resnet10t", features_only=True), "features_only"),
        (lambda: TorchvisionNetwork("resnet18", no_such_argument=1), "cannot be built.*no_such_argument"),
        (lambda: TorchvisionNetwork("vit_b_32", image_size=33), "cannot be built"),
        (lambda: TorchvisionNetwork("resnet18", "IMAGENET1K_V7"), "did you mean"),
        (lambda: TimmNetwork("local-dir:/no/such/folder", allow_remote=True), "/no/such/folder"),
    ],
)
def test_refusals_name_the_fix(make_net: Callable[[], Network], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_net()


class Payload:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.file,))


@pytest.mark.parametrize("forced", [None, "0"])
def test_malicious_pickle_in_a_local_dir_is_not_run(
    forced: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if forced:
        monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", forced)
    trap = tmp_path / "executed"
    state = timm.create_model("test_vit").state_dict()
    torch.save({"state_dict": state, "extra": Payload(trap)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit"}))
    # As in older versions of timm, which ask for weights_only=False.
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: load(*args, **{**kwargs, "weights_only": False}))
    with pytest.raises(ModelError, match="cannot be"):
        TimmNetwork(f"local-dir:{tmp_path}", pretrained=True, allow_remote=True)
    assert not trap.exists()
    assert os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") == forced
    torch.load(tmp_path / "pytorch_model.bin")
    assert trap.exists()  # the payload works where it is allowed to


def test_local_dir_loads_if_allowed(tmp_path: Path) -> None:
    trained = timm.create_model("test_vit", num_classes=3)
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit", "num_classes": 3}))
    net = TimmNetwork(f"local-dir:{tmp_path}", pretrained=True, allow_remote=True, num_classes=3, image_size=160)
    assert torch.equal(net.state_dict()["model.head.weight"], trained.state_dict()["head.weight"])


def test_failed_download_names_the_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"https://huggingface.co/timm/resnet10t.*model\.weights"):
        TimmNetwork("resnet10t", pretrained=True)


# ---- summary


def test_summary_counts_every_parameter(make: Callable[..., Network]) -> None:
    net = make(num_classes=7)
    summary = summarize(net, (3, 32, 32))
    assert summary.parameters == sum(p.numel() for p in net.parameters())
    assert summary.rows[-1].output == (7,) and summary.flops > 0
    assert not any(module._forward_hooks for module in net.modules())


def test_summary_of_a_plain_module_with_a_tuple_output() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.fc = nn.LSTM(8, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden, (_, cell) = self.lstm(x[:, 0])
            return self.fc(hidden[:, -1]), cell

    net = Recurrent()
    assert summarize(net, (1, 8, 8)).parameters == sum(p.numel() for p in net.parameters())


# ---- the network of a run


def write_run(folder: Path, net: Network, leaf: dict[str, Any], size: int = 224) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"net": leaf}}))
    data = {"class_names": ["a", "b", "c", "d"], "image_shape": [getattr(net, "in_channels", 3), size, size]}
    (folder / "manifest.json").write_text(json.dumps({"data": data}))
    save_file(net.state_dict(), folder / "weights.safetensors")
    return folder


RESNET8 = {"block": "basic", "layers": [1, 1, 1], "width": 16, "stem": "cifar", "shortcut": "A"}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "leaf"),
    [
        ("resnet8", {"class_path": "reslab.models.ResNet", "init_args": RESNET8}),
        ("resnet8", {"class_path": "ResNet", "init_args": RESNET8}),
        (
            "timm/test_convnext",
            {
                "class_path": "reslab.models.TimmNetwork",
                "init_args": {"name": "test_convnext", "pretrained": True},
                "dict_kwargs": {"drop_path_rate": 0.1},
            },
        ),
        (
            "torchvision/mobilenet_v3_small",
            {
                "class_path": "reslab.models.TorchvisionNetwork",
                "init_args": {"name": "mobilenet_v3_small", "weights": "DEFAULT"},
            },
        ),
    ],
)
def test_network_of_run_has_the_weights_of_the_run(
    name: str, leaf: dict[str, Any], channels: int, tmp_path: Path
) -> None:
    trained = create_model(name, num_classes=4, in_channels=channels)
    net = network_of_run(write_run(tmp_path / "run", trained, leaf))
    assert (net.num_classes, net.in_channels) == (4, channels)
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in net.state_dict().items())


def test_network_of_run_follows_the_image_size_of_the_data(tmp_path: Path) -> None:
    trained = TimmNetwork("vit_tiny_patch16_224", num_classes=4, image_size=32)
    leaf = {"class_path": "reslab.models.TimmNetwork", "init_args": {"name": "vit_tiny_patch16_224"}}
    assert network_of_run(write_run(tmp_path / "run", trained, leaf, size=32))(images()).shape == (2, 4)


@pytest.mark.parametrize(
    ("class_path", "message"),
    [
        ("os.system", "not a class of reslab"),
        ("torch.nn.Linear", "not a class of reslab"),
        ("reslabx.Net", "not a class of reslab"),
        ("Unknown", "no class"),
        ("reslab.models.Missing", "no class"),
        ("reslab.no_such_module.Net", "no class"),
        ("reslab.errors.UserError", "not a subclass"),
    ],
)
def test_network_of_run_imports_only_networks_of_reslab(class_path: str, message: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", create_model("resnet8", num_classes=4), {"class_path": class_path})
    with pytest.raises(ModelError, match=message):
        network_of_run(run)


def test_network_of_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a finished run"):
        network_of_run(tmp_path)


# ---- names


@pytest.mark.parametrize(
    ("pattern", "some", "prefix"),
    [
        ("timm", "timm/convnext_atto", "timm/"),
        ("torchvision", "torchvision/vgg16", "torchvision/"),
        ("timm/convnext*", "timm/convnext_atto", "timm/convnext"),
        ("resnet5*", "resnet50", "resnet5"),
    ],
)
def test_list_models_by_pattern(pattern: str, some: str, prefix: str) -> None:
    names = list_models(pattern)
    assert some in names and all(name.startswith(prefix) for name in names)

"""Weights of other projects: checkpoints in their own formats load into the same network, and say what was loaded."""

import argparse
import collections
import datetime
import pathlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from reslab.errors import UserError
from reslab.models import Network, ResNet, TorchvisionNetwork, create_model, load_weights

State = dict[str, Tensor]


def tiny(**kwargs: Any) -> ResNet:
    return create_model("resnet8", **({"num_classes": 4} | kwargs))


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def random_state(net: nn.Module) -> State:
    """Return a state with random tensors everywhere, also in the running statistics."""
    return {key: torch.rand_like(v) if v.is_floating_point() else v + 7 for key, v in net.state_dict().items()}


def equal(net: nn.Module, state: State, except_for: str = "nothing") -> bool:
    return all(torch.equal(v, state[k]) for k, v in net.state_dict().items() if not k.startswith(except_for))


# ---- akamaster/pytorch_resnet_cifar10


def akamaster_weights_init(m: nn.Module) -> None:
    if isinstance(m, nn.Linear | nn.Conv2d):
        nn.init.kaiming_normal_(m.weight)


class LambdaLayer(nn.Module):
    def __init__(self, lambd: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.lambd = lambd

    def forward(self, x: Tensor) -> Tensor:
        return self.lambd(x)


class AkamasterBlock(nn.Module):
    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = LambdaLayer(
                lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, planes // 4, planes // 4), "constant", 0)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class AkamasterResNet(nn.Module):
    """The network of https://github.com/akamaster/pytorch_resnet_cifar10, resnet.py."""

    def __init__(self, num_blocks: list[int], num_classes: int = 10) -> None:
        super().__init__()
        self.in_planes = 16
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._make_layer(16, num_blocks[0], stride=1)
        self.layer2 = self._make_layer(32, num_blocks[1], stride=2)
        self.layer3 = self._make_layer(64, num_blocks[2], stride=2)
        self.linear = nn.Linear(64, num_classes)
        self.apply(akamaster_weights_init)

    def _make_layer(self, planes: int, num_blocks: int, stride: int) -> nn.Sequential:
        layers = []
        for stride_of_block in [stride] + [1] * (num_blocks - 1):
            layers.append(AkamasterBlock(self.in_planes, planes, stride_of_block))
            self.in_planes = planes
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.size(0), -1))


@pytest.mark.parametrize(
    ("depth", "legacy"),
    [(20, True), (56, False), *(pytest.param(d, True, marks=pytest.mark.slow) for d in (32, 44, 110))],
)
def test_akamasters_checkpoints_give_the_same_outputs(depth: int, legacy: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = torch.nn.DataParallel(AkamasterResNet([(depth - 2) // 6] * 3))
    with torch.no_grad():
        for batch in torch.randn(4, 32, 3, 32, 32):  # statistics that differ from those at the start
            theirs.module.train()(batch * 2 + 1)
    file = tmp_path / f"resnet{depth}-12fca82f.th"
    content = {"state_dict": theirs.state_dict(), "best_prec1": 91.73}
    # Published in 2018: the format of before torch 1.6, and no num_batches_tracked.
    content["state_dict"] = {k: v for k, v in content["state_dict"].items() if "tracked" not in k}
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    net = create_model(f"resnet{depth}", num_classes=10, shortcut="A", weights=file).eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = theirs.module.eval()(images)
        torch.testing.assert_close(net(images), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


# ---- training checkpoints: which of the networks in a file is loaded


class Moco(nn.Module):
    """State dict of MoCo v2: query and key encoders with an MLP instead of the head, and the queue."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.randn(8, 16))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.encoder_q, self.encoder_k = tiny(), tiny()
        for encoder in (self.encoder_q, self.encoder_k):
            encoder.fc = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
            encoder.load_state_dict(random_state(encoder))


def metadata() -> dict[str, Any]:
    """What reference scripts save beside tensors."""
    args = argparse.Namespace(lr=0.1, opt="sgd", data_path=pathlib.Path("/data"), nested=argparse.Namespace(x=1))
    numbers = {"metric": np.float64(75.3), "best": np.float32(1), "history": np.arange(3.0)}
    others = {"milestones": collections.Counter({30: 1}), "d": collections.defaultdict(dict, {"a": {}})}
    return {**numbers, **others, "epoch": 3, "args": args, "when": datetime.datetime(2026, 1, 1), "s": {1, 2}}


def optimizer_state(net: nn.Module) -> dict[str, Any]:
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer.state_dict()


def ema_of(state: State) -> State:
    """Return the state of torchvision's ExponentialMovingAverage."""
    net = tiny()
    net.load_state_dict(state)
    return dict(AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True).state_dict())


def torchvision_reference(ours: State, other: State) -> dict[str, Any]:
    return {"model": other, "optimizer": optimizer_state(tiny()), "lr_scheduler": {"last_epoch": 3}, **metadata(),
            "model_ema": ema_of(ours), "scaler": {"scale": 65536.0}}  # fmt: skip


def timm_train(ours: State, other: State) -> dict[str, Any]:
    return {"epoch": 3, "arch": "resnet8", "state_dict": other, "optimizer": optimizer_state(tiny()), "version": 2,
            **metadata(), "amp_scaler": {"scale": 1.0}, "state_dict_ema": ours}  # fmt: skip


# name: (content from the state to load and another one, messages about it)
CHOICES: dict[str, tuple[Callable[[State, State], Any], list[str]]] = {
    "torchvision_ema": (torchvision_reference, ["weights: model_ema.module (EMA) of FILE", "left out: model"]),
    "timm_ema": (timm_train, ["weights: state_dict_ema (EMA) of FILE", "left out: state_dict"]),
    "torchvision_without_ema": (
        lambda ours, other: {"model": ours, "optimizer": optimizer_state(tiny()), **metadata()},
        ["weights: FILE"],
    ),
    "kuangliu": (lambda ours, other: {"net": prefixed("module.", ours), "acc": 95.1, "epoch": 4}, ["weights: FILE"]),
    "tutorial": (lambda ours, other: {"model_state_dict": ours, "loss": torch.tensor(0.1)}, ["weights: FILE"]),
    "beside": (lambda ours, other: {**ours, "epoch": 3, "adam": {"step": torch.tensor(7)}}, ["weights: FILE"]),
    "nested": (lambda ours, other: {"ema": {"module": ours, "updates": 9}, "model": other},
               ["weights: ema.module (EMA) of FILE", "left out: model"]),
    "reslab_ema": (
        lambda ours, other: {"state_dict": prefixed("net.", other) | prefixed("ema.module.", ours), "epoch": 2},
        ["weights: state_dict.ema.module (EMA) of FILE", "left out: state_dict.net"],
    ),
    "reslab_objective": (
        lambda ours, other: {"state_dict": prefixed("net.", ours) | {"objective.weight": torch.ones(4)}},
        ["weights: state_dict.net of FILE", "left out: state_dict.objective"],
    ),
    "ema_of_parameters_only": (
        lambda ours, other: {"state_dict": ours, "ema": {k: v for k, v in other.items() if "running" not in k}},
        ["weights: state_dict of FILE", "left out: ema (EMA)"],
    ),
    "student_and_teacher": (
        lambda ours, other: {"student": prefixed("module.", ours), "teacher": other},
        ["weights: student.module of FILE", "left out: teacher"],
    ),
    "copy_inside": (
        lambda ours, other: {"state_dict": prefixed("copy.", other) | ours},
        ["weights: state_dict of FILE", "left out: state_dict.copy"],
    ),
    "copy_without_place": (lambda ours, other: ours | prefixed("copy.", other), ["weights: FILE", "left out: copy"]),
    "average_inside": (
        lambda ours, other: other | prefixed("ema.", ours),
        ["weights: ema (EMA) of FILE", "left out: keys without a prefix"],
    ),
    "probe": (
        lambda ours, other: {
            **prefixed("module.encoder.", {k: v for k, v in ours.items() if not k.startswith("fc.")}),
            **{f"module.{key}": value for key, value in ours.items() if key.startswith("fc.")},
        },
        ["weights: FILE"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_training_checkpoints_load_and_say_which_weights(name: str, tmp_path: Path) -> None:
    make, messages = CHOICES[name]
    ours, other, net, file = random_state(tiny()), random_state(tiny()), tiny(), tmp_path / "checkpoint.pth"
    torch.save(make(ours, other), file)
    assert load_weights(net, file) == [message.replace("FILE", str(file)) for message in messages]
    assert equal(net, ours)


names = st.text("abcxyz_", min_size=1, max_size=6)


@settings(max_examples=40)
@given(
    prefix=st.lists(names, max_size=3),
    others=st.lists(
        st.tuples(names, st.sampled_from(["wide", "part", "head", "table"])), max_size=3, unique_by=lambda x: x[0]
    ),
    places=st.lists(names, max_size=2),
    data=st.data(),
)
def test_the_network_is_found_among_other_branches(
    prefix: list[str], others: list[tuple[str, str]], places: list[str], data: st.DataObject, tmp_path_factory: Any
) -> None:
    ours, file = random_state(tiny()), tmp_path_factory.getbasetemp() / "branches.pth"
    kinds = {
        "wide": lambda: random_state(tiny(width=8)),
        "part": lambda: {k: v for k, v in random_state(tiny()).items() if not k.startswith("layer2")},
        "head": lambda: {"0.weight": torch.ones(8, 64), "2.weight": torch.ones(8, 8)},
        "table": lambda: {"queue": torch.ones(4, 8)},
    }
    branches = {f"{name}.": kinds[kind]() for name, kind in others if name not in prefix} if prefix else {}
    branches["".join(f"{part}." for part in prefix)] = ours
    order = data.draw(st.permutations([*branches]))
    content: Any = {key: value for name in order for key, value in prefixed(name, branches[name]).items()}
    for place in places:
        content = {place: content, "epoch": 3}
    torch.save(content, file)
    net = tiny()
    messages = load_weights(net, file)
    assert equal(net, ours)
    left_out = messages[1].removeprefix("left out: ").split(", ") if len(messages) > 1 else []
    assert {name.split(".")[-1].removesuffix(" (EMA)") for name in left_out} == {n[:-1] for n in branches} - {
        ".".join(prefix)
    }


PREFIXES = ["module.", "_orig_mod.", "net.", "model.", "backbone.", "encoder.", "encoder_q.", "resnet.", "student.",
            "teacher.", "module.model.", "module._orig_mod.backbone.", "any.thing.0."]  # fmt: skip


@pytest.mark.parametrize("make_net", [tiny, lambda: TorchvisionNetwork("shufflenet_v2_x0_5", num_classes=4)])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_single_prefix_is_removed(prefix: str, make_net: Callable[[], Network], tmp_path: Path) -> None:
    trained, net = make_net(), make_net()
    inner = "model." if isinstance(net, TorchvisionNetwork) else ""
    save_file(
        prefixed(prefix, {k.removeprefix(inner): v for k, v in trained.state_dict().items()}),
        tmp_path / "w.safetensors",
    )
    assert load_weights(net, tmp_path / "w.safetensors") == [f"weights: {tmp_path / 'w.safetensors'}"]
    assert equal(net, trained.state_dict())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_of_momentum_contrast_the_query_encoder_is_loaded(prefix: str, tmp_path: Path) -> None:
    moco, net = Moco(), tiny()
    head = [p.clone() for p in net.fc.parameters()]
    torch.save(
        {"state_dict": prefixed(prefix, moco.state_dict()), "arch": "resnet50", **metadata()}, tmp_path / "w.pth"
    )
    first, left_out, new = load_weights(net, tmp_path / "w.pth")
    assert first == f"weights: state_dict.{prefix}encoder_q of {tmp_path / 'w.pth'}"
    assert left_out == "left out: " + ", ".join(
        f"state_dict.{prefix}{name}" for name in ("encoder_k", "queue", "queue_ptr")
    )
    assert "the head is new: fc.0.weight, fc.0.bias, fc.2.weight, fc.2.bias in" in new
    assert equal(net, moco.encoder_q.state_dict(), except_for="fc.")
    assert all(map(torch.equal, net.fc.parameters(), head))


@pytest.mark.parametrize(
    "inner", ["layer1._orig_mod.", "layer1.0._checkpoint_wrapped_module.", "_fsdp_wrapped_module."]
)
def test_wrappers_inside_of_a_network_are_removed(inner: str, tmp_path: Path) -> None:
    trained, net = random_state(tiny()), tiny()
    start = inner.rpartition("_orig")[0] if "_orig" in inner else inner[: inner.index("_")]
    renamed = {key.replace(start, inner, 1) if start else inner + key: value for key, value in trained.items()}
    torch.save(renamed, tmp_path / "w.pth")
    load_weights(net, tmp_path / "w.pth")
    assert equal(net, trained)


# ---- heads


def renamed_head(state: State, name: str) -> State:
    return {key.replace("fc.", f"{name}.") if key.startswith("fc.") else key: v for key, v in state.items()}


@pytest.mark.parametrize("classes", [4, 7, 0])
@pytest.mark.parametrize("name", ["linear", "classifier", "head", "head.fc", "classifier.1", "last_linear", "output"])
def test_a_head_by_another_name_is_recognized(name: str, classes: int, tmp_path: Path) -> None:
    trained, net = random_state(tiny()), tiny(num_classes=classes)
    torch.save(prefixed("module.", renamed_head(trained, name)), tmp_path / "w.pth")
    messages = load_weights(net, tmp_path / "w.pth")
    assert equal(net, trained, except_for="nothing" if classes == 4 else "fc.")
    fate = "new" if classes else "left out"
    assert len(messages) == 1 if classes == 4 else f"the head is {fate}: 4 classes" in messages[-1]


@pytest.mark.parametrize(
    "extra", [{"aux.weight": torch.ones(4, 64), "aux.bias": torch.ones(4)}, {"p.x": torch.ones(3)}]
)
def test_what_may_be_a_part_of_the_network_is_never_left_out(extra: State, tmp_path: Path) -> None:
    state = renamed_head(random_state(tiny()), "linear") | extra
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=rf"only in the file.*{next(iter(extra))}"):
        load_weights(tiny(), tmp_path / "w.pth")


def test_a_head_of_other_inputs_is_not_taken(tmp_path: Path) -> None:
    state = {k: v for k, v in random_state(tiny()).items() if not k.startswith("fc.")}
    torch.save({**state, "linear.weight": torch.ones(4, 32), "linear.bias": torch.ones(4)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"only in the file.*linear.weight"):
        load_weights(tiny(), tmp_path / "w.pth")


@pytest.mark.parametrize(
    "content",
    [
        lambda state: {"model": state},
        lambda state: {"x": torch.ones(1), "net": prefixed("module.", state), "y": {"z": torch.ones(1)}},
    ],
)
def test_states_that_the_library_converts_are_found(content: Callable[[State], Any], tmp_path: Path) -> None:
    trained = TorchvisionNetwork("densenet121", num_classes=3).state_dict()
    old = {
        key.removeprefix("model.").replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): v
        for key, v in trained.items()
    }
    torch.save(content(old), tmp_path / "w.pth")
    net = TorchvisionNetwork("densenet121", num_classes=3)
    load_weights(net, tmp_path / "w.pth")
    assert equal(net, trained)


# ---- files that are refused


class Payload:
    """A pickle that calls a function when it is loaded."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


TRAP = "import pathlib; pathlib.Path({!r}).touch()"


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "payload",
    [
        lambda trap: Payload(exec, TRAP.format(trap)),
        lambda trap: Payload(eval, f"__import__('os').mkdir({trap!r})"),
        lambda trap: Payload(__import__("os").mkdir, trap),
        lambda trap: Payload(Path.touch, Path(trap)),
        lambda trap: Payload(np.save, trap, np.ones(2)),
        lambda trap: Payload(torch.optim.lr_scheduler.LambdaLR, Payload(exec, TRAP.format(trap)), 1),
        lambda trap: argparse.Namespace(x=Payload(exec, TRAP.format(trap))),
    ],
)
def test_code_in_a_checkpoint_never_runs(payload: Callable[[str], Any], legacy: bool, tmp_path: Path) -> None:
    trap, file = tmp_path / "trap", tmp_path / "w.pth"
    content = {"model": random_state(tiny()), "args": argparse.Namespace(x=1), "extra": payload(str(trap))}
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    try:
        load_weights(tiny(), file)  # of functions by allowed names, none is called
    except UserError as error:
        assert "no code in it was run" in str(error) and len(str(error)) < 400
    assert not list(tmp_path.glob("trap*"))


@pytest.mark.parametrize("legacy", [False, True])
@settings(max_examples=40)
@given(data=st.data())
def test_damaged_files_are_refused_in_one_message(
    legacy: bool, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("damaged") / "w.pth"
    torch.save({"model": {"a": torch.ones(3)}, **metadata()}, file, _use_new_zipfile_serialization=not legacy)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with pytest.raises(UserError, match=r"w\.pth"):
        load_weights(tiny(), file)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("{dir}/resnet20.pht", r"there is no weights file .*resnet20\.pht: did you mean resnet20\.pth"),
        ("{dir}/none", r"there is no weights file .*none$"),
        ("nowhere/w.safetensors", r"there is no weights file nowhere/w\.safetensors$"),
        ("w.bin", r"there is no weights file w\.bin"),
        ("model.tar", r"there is no weights file model\.tar"),
        ("~/no-such-folder/w.pth", r"there is no weights file /.*no-such-folder/w\.pth$"),
        ("~no-such-user/w.pth", r"there is no weights file ~no-such-user/w\.pth$"),
        ("a/" + 300 * "x", r"there is no weights file a/x+$"),
        ("{dir}", r"there is no weights file .*weights\.safetensors$"),
        ("../w", r"there is no weights file \.\./w"),
        (r"C:\weights\w.pth", r"there is no weights file C:"),
        ("https://example.org/w.pth", r"download https://example\.org/w\.pth yourself"),
        ("resnet20", r"there is no file 'resnet20', and no weights"),
        ("IMAGENET1K_V7", r"there is no file 'IMAGENET1K_V7', and no weights"),
    ],
)
def test_missing_files_are_named(weights: str, message: str, tmp_path: Path) -> None:
    torch.save(tiny().state_dict(), tmp_path / "resnet20.pth")
    with pytest.raises(UserError, match=message) as caught:
        load_weights(tiny(), weights.format(dir=tmp_path))
    assert "IMAGENET1K_V1" not in str(caught.value) or "file '" in str(caught.value)


def test_the_checkpoint_of_an_unfinished_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    state, net = random_state(tiny()), tiny()
    torch.save({"state_dict": prefixed("net.", state)}, tmp_path / "checkpoints/last.ckpt")
    with pytest.raises(UserError, match=r"the run is not finished; its last checkpoint is .*checkpoints/last\.ckpt$"):
        load_weights(net, tmp_path)
    load_weights(net, tmp_path / "checkpoints/last.ckpt")
    assert equal(net, state)


def test_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    state, net = random_state(tiny()), tiny()
    torch.save(state, tmp_path / "w.pth")
    load_weights(net, "~/w.pth")
    assert equal(net, state)


# ---- networks that do not fit


@pytest.mark.parametrize(
    ("in_file", "network", "message"),
    [
        (tiny, lambda: create_model("resnet18"), "stem 3×3, projections 0; this network is [2, 2, 2, 2], width 64"),
        (tiny, lambda: create_model("resnet20"), "[1, 1, 1], width 16; this network is [3, 3, 3], width 16"),
        (tiny, lambda: tiny(shortcut="C"), "width 16, projections 0; this network is [1, 1, 1]"),
        (tiny, lambda: tiny(norm="group"), "running statistics yes; this"),
        (lambda: create_model("resnet8_fast"), tiny, "[0, 1, 1, 1], width 32, projections 3; this"),
        (lambda: tiny(block="bottleneck"), tiny, "block bottleneck"),
        (tiny, lambda: TorchvisionNetwork("resnet18"), "this network is [2, 2, 2, 2], width 64"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["run", "file", "module"])
def test_other_resnets_are_described_in_one_line(
    in_file: Callable[[], nn.Module], network: Callable[[], nn.Module], message: str, form: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine"
    if form == "run":
        path.mkdir()
        save_file(in_file().state_dict(), path / "weights.safetensors")
    else:
        torch.save(prefixed("module." if form == "module" else "", in_file().state_dict()), path)
    with pytest.raises(UserError) as caught:
        load_weights(network(), path)
    file = path / "weights.safetensors" if form == "run" else path
    assert str(caught.value).startswith(f"{file} is ResNet ") and message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(str(path))


def test_other_networks_are_described_by_keys_and_counts(tmp_path: Path) -> None:
    saved, net = torchvision.models.mobilenet_v3_small().state_dict(), create_model("resnet14", num_classes=4)
    torch.save(saved, tmp_path / "w.pth")
    with pytest.raises(UserError) as caught:
        load_weights(net, tmp_path / "w.pth")
    missing = [key for key in net.state_dict().keys() - saved.keys() if "tracked" not in key and "fc." not in key]
    assert f"missing in the file ({len(missing)}): conv1.weight" in str(caught.value)
    assert f"only in the file ({len(saved)}): features.0.0.weight" in str(caught.value)
    assert len(str(caught.value)) < 1000  # not all of them

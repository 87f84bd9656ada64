"""ResNet: equal to torchvision's networks, and properties of every combination of kwargs."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import reslab.models
from reslab.models import ModelError, ResNet, SpeedNet, create_model, list_models, summarize
from reslab.models.resnet import BlurredConv2d, ResidualBlock, SubsampleAndPad

PUBLISHED = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}


def parameters(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def shapes(net: torch.nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in net.state_dict().items()}


def meta(name: str, **kwargs: Any) -> ResNet:
    with torch.device("meta"):
        return create_model(name, **kwargs)


# ---- comparison with torchvision and the papers


@pytest.mark.parametrize("name", [*PUBLISHED, "wide_resnet50_2", "resnext50_32x4d"])
def test_same_weights_same_outputs_as_torchvision(name: str) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics other than zero and one
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.8, 1.2)
    ours = meta(name).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(images)
        torch.testing.assert_close(ours(images), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_same_gradients_as_torchvision_in_training(name: str) -> None:
    torch.manual_seed(0)
    theirs, ours = torchvision.models.get_model(name), create_model(name)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(4, 3, 32, 32)
    for net in (theirs, ours):
        torch.nn.functional.cross_entropy(net(images), torch.arange(4)).backward()
    for (key, expected), (_, got) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert (got.grad - expected.grad).norm() <= 1e-3 * expected.grad.norm(), key


@pytest.mark.parametrize("name", [n for n in list_models() if n in torchvision.models.list_models()])
def test_state_dict_has_torchvisions_keys_and_shapes(name: str) -> None:
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name)
    assert list(shapes(meta(name)).items()) == list(shapes(theirs).items())


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_published_parameter_counts(name: str, count: int) -> None:
    assert parameters(meta(name)) == count


@pytest.mark.parametrize(("depth", "millions"), [(20, "0.27"), (32, "0.46"), (44, "0.66"), (56, "0.85"), (110, "1.7")])
def test_cifar_networks_have_the_size_of_section_4_2(depth: int, millions: str) -> None:
    net = meta(f"resnet{depth}", num_classes=10)
    assert f"{parameters(net) / 1e6:.{len(millions) - 2}f}" == millions
    layers = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == depth
    assert [row.output for row in summarize(net, (3, 32, 32)).rows if "conv" in row.name][-1] == (64, 8, 8)


# ---- kwargs


@st.composite
def architectures(draw: st.DrawFn) -> dict[str, Any]:
    kwargs: dict[str, Any] = {
        "block": draw(st.sampled_from(["basic", "bottleneck"])),
        "layers": draw(st.lists(st.integers(1, 2), min_size=1, max_size=3)),
        "width": draw(st.sampled_from([2, 6, 16])),
        "stem": draw(st.sampled_from(["imagenet", "cifar", "cifar_stride2"])),
        "shortcut": draw(st.sampled_from(["identity", "A", "C", "none"])),
        "norm": draw(st.sampled_from(["batch", "group", "none", "SyncBatchNorm", "InstanceNorm2d"])),
        "in_channels": draw(st.integers(1, 4)),
        "num_classes": draw(st.integers(0, 5)),
        "zero_init": draw(st.booleans()),
        "drop_path": draw(st.sampled_from([0.0, 0.3])),
        "blur": draw(st.booleans()),
    }
    if kwargs["block"] == "bottleneck":
        kwargs |= draw(st.sampled_from([{}, {"groups": 2, "width_per_group": 32}, {"width_per_group": 128}]))
    assume(not (kwargs["zero_init"] and (kwargs["norm"] == "none" or kwargs["shortcut"] == "none")))
    assume(not (kwargs["drop_path"] and kwargs["shortcut"] == "none"))
    return kwargs


@settings(max_examples=30, deadline=None)
@given(architectures())
def test_every_architecture_runs_forward_and_backward_and_reloads(kwargs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = ResNet(**kwargs)
    images = torch.randn(3, kwargs["in_channels"], 33, 40)
    out = net(images)
    assert out.shape == (3, kwargs["num_classes"] or net.num_features)
    assert net.forward_features(images).shape == (3, net.num_features)

    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert any(p.grad.any() for p in net.conv1.parameters())

    twin = ResNet(**kwargs)
    twin.load_state_dict(net.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(twin.eval()(images), net.eval()(images))


@settings(max_examples=20, deadline=None)
@given(architectures())
def test_drop_path_zero_init_and_blur_add_no_keys(kwargs: dict[str, Any]) -> None:
    with torch.device("meta"):
        plain = kwargs | {"drop_path": 0.0, "zero_init": False, "blur": False}
        assert shapes(ResNet(**kwargs)) == shapes(ResNet(**plain))


@given(channels=st.integers(1, 9), new=st.integers(0, 9), stride=st.integers(1, 2))
def test_option_a_pads_half_of_the_new_channels_on_each_side(channels: int, new: int, stride: int) -> None:
    x = torch.rand(2, channels, 4, 4) + 1
    y = SubsampleAndPad(new, stride)(x)
    assert y.shape == (2, channels + new, 4 // stride, 4 // stride)
    assert torch.equal(y[:, new // 2 : new // 2 + channels], x[:, :, ::stride, ::stride])
    assert float(y.sum()) == pytest.approx(float(x[:, :, ::stride, ::stride].sum()))


def test_blur_precedes_every_strided_convolution_except_the_stem() -> None:
    net = create_model("resnet50", blur=True)
    strided = {k for k, m in net.named_modules() if isinstance(m, torch.nn.Conv2d) and m.stride != (1, 1)}
    blurred = {k: m for k, m in net.named_modules() if isinstance(m, BlurredConv2d)}
    assert set(blurred) == strided - {"conv1"} and len(blurred) == 6  # the 3×3 and the projection of three stages
    conv = blurred["layer2.0.conv2"]
    corner = torch.zeros(1, conv.in_channels, 9, 9)
    corner[:, :, 4, 4] = 16
    binomial = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])
    spread = torch.nn.functional.pad(binomial, (3, 3, 3, 3)).expand(1, conv.in_channels, 9, 9)
    torch.testing.assert_close(conv(corner), torch.nn.Conv2d.forward(conv, spread))


def test_shortcuts_differ_only_in_their_projections() -> None:
    nets = {kind: create_model("resnet20", shortcut=kind) for kind in ("identity", "A", "C", "none")}
    projections = {kind: len([k for k in net.state_dict() if "downsample.0" in k]) for kind, net in nets.items()}
    assert projections == {"identity": 2, "A": 0, "C": 9, "none": 0}
    assert shapes(nets["A"]) == shapes(nets["none"])
    images = torch.randn(2, 3, 32, 32)
    nets["none"].load_state_dict(nets["A"].state_dict())
    assert not torch.allclose(nets["A"](images), nets["none"](images))


def test_zero_init_starts_every_block_as_its_shortcut() -> None:
    net = create_model("resnet20", zero_init=True)
    x = torch.rand(2, 16, 8, 8)
    assert torch.equal(net.layer1(x), x)
    fresh = create_model("resnet50", zero_init=True)
    zeroed = [k for k, v in fresh.state_dict().items() if k.endswith("bn3.weight") and not v.any()]
    assert len(zeroed) == 16


def test_drop_path_drops_whole_images_with_a_rate_that_grows_with_depth() -> None:
    torch.manual_seed(0)
    net = create_model("resnet20", drop_path=0.9)
    rates = [m.drop_path.p for m in net.modules() if isinstance(m, ResidualBlock)]
    assert rates == pytest.approx([0.1 * i for i in range(1, 10)])
    last = net.layer3[-1]
    x = torch.rand(1000, 64, 2, 2)
    with torch.no_grad():
        dropped = (last(x) == x).flatten(1).all(1)
        assert dropped.float().mean().item() == pytest.approx(0.9, abs=0.05)
        assert not torch.equal(last.eval()(x), x)


@pytest.mark.parametrize(("name", "shortcut"), [("resnet8", "A"), ("resnet18_cifar", "identity")])
def test_channels_last_is_kept_in_bf16(name: str, shortcut: str) -> None:
    net = create_model(name, shortcut=shortcut, width=16).to(memory_format=torch.channels_last)
    not_channels_last: list[str] = []

    def note(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if output.ndim == 4 and not output.is_contiguous(memory_format=torch.channels_last):
            not_channels_last.append(type(module).__name__)

    for module in net.modules():
        module.register_forward_hook(note)
    images = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        net(images)
    assert not not_channels_last


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"shortcut": "none", "zero_init": True}, "zero_init requires another shortcut than none"),
        ({"norm": "none", "zero_init": True}, "another norm than none"),
        ({"norm": "Identity", "zero_init": True}, "another norm than none"),
        ({"shortcut": "none", "drop_path": 0.1}, "drop_path requires another shortcut than none"),
        ({"drop_path": 1.0}, r"\[0, 1\)"),
        ({"groups": 32}, "block='bottleneck'"),
        ({"block": "bottleneck", "groups": 0}, "groups"),
        ({"block": "bottleneck", "width_per_group": 0}, "width_per_group"),
        ({"layers": ()}, "at least one block"),
        ({"layers": (2, 0)}, "at least one block"),
        ({"width": 0}, "at least 1"),
        ({"num_classes": -1}, "or 0 for no head"),
        ({"stem": "cifer"}, "cifar_stride2"),
        ({"shortcut": "B"}, "identity, A, C, none"),
        ({"norm": "LayerNorm"}, "GroupNorm"),
    ],
)
def test_invalid_kwargs_are_refused_with_the_fix(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ResNet(**kwargs)


# ---- summary


def test_summary_of_resnet50_has_the_published_cost() -> None:
    summary = summarize(meta("resnet50"))
    assert summary.parameters == 25_557_032
    assert summary.macs == 4_089_184_256
    assert summary.flops == 2 * summary.macs
    first = summary.rows[0]
    assert (first.name, first.output, first.parameters) == ("conv1", (64, 112, 112), 9_408)
    assert first.flops == 2 * (3 * 7 * 7) * (64 * 112 * 112)
    text = str(summary)
    assert "4.09 GMACs = 8.18 GFLOPs" in text
    assert "25,557,032 parameters" in text
    assert "2 FLOPs" in text


@settings(max_examples=15, deadline=None)
@given(architectures())
def test_summary_counts_every_parameter_and_does_not_change_the_network(kwargs: dict[str, Any]) -> None:
    net = ResNet(**kwargs)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    summary = summarize(net, (kwargs["in_channels"], 32, 32))
    assert summary.parameters == parameters(net)
    assert net.training
    assert not any(module._forward_hooks for module in net.modules())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_summary_refuses_images_the_network_does_not_accept() -> None:
    with pytest.raises(ModelError, match="C = 3"):
        summarize(meta("resnet18"), (1, 224, 224))


# ---- SpeedNet


def test_first_layer_of_speednet_whitens_patches() -> None:
    torch.manual_seed(0)
    images = torch.nn.functional.avg_pool2d(torch.randn(64, 3, 17, 17), 2, stride=1)  # neighbours are correlated
    net = SpeedNet()
    net.initialize(images)
    white, opposite = net.whiten(images).detach().chunk(2, dim=1)
    assert torch.equal(white, -opposite)
    flat = white.transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat @ flat.T / flat.shape[1], torch.eye(12), atol=0.02, rtol=0)


def test_convolutions_of_speednet_start_as_the_identity_and_norms_without_scale() -> None:
    net = SpeedNet((32, 48))
    x = torch.randn(2, 24, 9, 9)
    torch.testing.assert_close(net.groups[0].convs[0](x)[:, :24], x)
    fixed = [name for name, p in net.named_parameters() if not p.requires_grad]
    assert fixed == ["whiten.weight", *(f"groups.{i}.norms.{j}.weight" for i in (0, 1) for j in (0, 1))]


@pytest.mark.parametrize("size", [16, 32, 57])
@pytest.mark.parametrize("residual", [False, True])
def test_speednet_accepts_images_of_any_size(size: int, residual: bool) -> None:
    net = SpeedNet((8, 16, 16), convs=3, residual=residual, in_channels=1, num_classes=5)
    assert net(torch.randn(2, 1, size, size)).shape == (2, 5)
    assert len(net.blocks()) == 3  # sharded by group


@pytest.mark.parametrize(
    "wrong", [{"widths": []}, {"widths": [0]}, {"convs": 1}, {"in_channels": 0}, {"num_classes": -1}]
)
def test_invalid_arguments_of_speednet_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="at least"):
        SpeedNet(**wrong)


# ---- configs/net


def config_names() -> list[str]:
    return sorted(p.stem for p in (Path(__file__).parents[1] / "configs" / "net").glob("*.yaml"))


def test_every_named_model_has_a_config() -> None:
    assert {*list_models(), "resnet8"} <= set(config_names())


@pytest.mark.parametrize("name", [*list_models(), "resnet8"])
def test_config_builds_the_named_model(name: str, repo: Path) -> None:
    text = (repo / "configs" / "net" / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    leaf = yaml.safe_load(text)
    assert leaf.keys() == {"class_path", "init_args"}
    module, _, cls = leaf["class_path"].rpartition(".")
    assert module == reslab.models.__name__
    with torch.device("meta"):
        net = getattr(reslab.models, cls)(**leaf["init_args"])
    named = meta(name)
    assert shapes(net) == shapes(named)
    assert net.shortcut == named.shortcut
    if name in PUBLISHED:
        assert f"{PUBLISHED[name]:,} parameters" in text

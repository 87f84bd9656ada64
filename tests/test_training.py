"""Classifier, schedules, parameter groups and EMA."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, TensorDataset

from reslab import Classifier, ImageData, create_model
from reslab.data import Batch, Digits
from reslab.errors import UserError
from reslab.models import Network, SpeedNet
from reslab.training import Constant, Cosine, Linear, MultiStep, OneCycle, ParamGroups, Schedule
from reslab.training.classifier import Diverged
from reslab.training.ema import EMA
from reslab.training.optimizers import parameter_groups
from reslab.training.rehearsal import check_model

SCHEDULES: list[Schedule] = [
    Constant(),
    Constant(warmup_epochs=2),
    Cosine(),
    Cosine(final=0.1, warmup_epochs=1, warmup_start=0.1),
    Linear(final=0.1, warmup_epochs=2),
    OneCycle(),
    OneCycle(peak_at=0.4, shape="cosine", final=0.01),
    MultiStep(),
    MultiStep([0.3, 0.6, 0.8], gamma=0.2, warmup_epochs=1),
]


def small_net(**kwargs: Any) -> torch.nn.Module:
    return create_model("resnet8", in_channels=1, num_classes=10, **kwargs)


def quiet_trainer(**settings: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", **{**quiet, **settings})


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@given(steps_per_epoch=st.integers(1, 400), epochs=st.integers(1, 300))
def test_multiplier_stays_between_zero_and_one(schedule: Schedule, steps_per_epoch: int, epochs: int) -> None:
    total = steps_per_epoch * epochs
    factors = [schedule.factor(step, total, steps_per_epoch) for step in {0, 1, total // 3, total // 2, total - 1}]
    assert all(0 <= f <= 1 + 1e-9 for f in factors)


@given(progress=st.floats(0, 1), epochs=st.integers(1, 50))
def test_schedule_scales_with_training_length(progress: float, epochs: int) -> None:
    for schedule in (Cosine(), Linear(), OneCycle(), Constant()):
        short, long = 100 * epochs, 300 * epochs
        a = schedule.factor(round(progress * short), short, 100)
        b = schedule.factor(round(progress * short) * 3, long, 100)
        assert math.isclose(a, b, abs_tol=1e-9)


def test_multistep_drops_at_the_papers_steps() -> None:
    # He et al. 2015, section 4.2: 64k iterations, ÷ 10 at 32k and 48k.
    factor = [MultiStep([0.5, 0.75]).factor(step, 64_000, 391) for step in (0, 31_999, 32_000, 47_999, 48_000)]
    assert factor == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_warmup_rises_linearly_to_the_base_rate() -> None:
    rates = [Cosine(warmup_epochs=1, warmup_start=0.0).factor(step, 100, 10) for step in range(10)]
    assert rates == pytest.approx([0.1 * (step + 1) for step in range(10)])


def test_one_cycle_peaks_and_ends_at_its_final_multiplier() -> None:
    assert OneCycle(final=0.0).factor(1000, 1000, 10) == pytest.approx(0.0)
    assert OneCycle(peak_at=0.25).factor(250, 1000, 10) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "wrong", [lambda: OneCycle(peak_at=1.5), lambda: MultiStep([0.7, 0.3]), lambda: Cosine(warmup_epochs=-1)]
)
def test_invalid_schedules_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"share|milestones|at least 0"):
        wrong()


def test_norms_and_biases_have_no_weight_decay_by_default() -> None:
    net = small_net()
    decayed, spared = parameter_groups(net, ParamGroups())
    assert "weight_decay" not in decayed and spared["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(list(net.parameters()))
    (everything,) = parameter_groups(net, ParamGroups(decay_norm_and_bias=True))
    assert len(everything["params"]) == len(list(net.parameters()))


DIGITS = {"in_channels": 1, "num_classes": 10}
NORM_BIASES: dict[str, tuple[Callable[[], torch.nn.Module], str]] = {
    "batch norm": (small_net, "bn"),
    "batch norm without weights": (lambda: SpeedNet((4, 8), in_channels=1), "norms"),
    "layer norm": (
        lambda: create_model("timm/test_vit", in_channels=1, num_classes=10, image_size=8, patch_size=4),
        "norm",
    ),
}


@pytest.mark.parametrize(("make", "norm"), NORM_BIASES.values(), ids=NORM_BIASES)
@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_norm_biases_learn_faster_and_decay_as_before(make: Any, norm: str, layer_decay: float) -> None:
    options: list[dict[str, tuple[float, float]]] = []
    for scale in (1.0, 8.0):
        groups = ParamGroups(layer_decay=layer_decay, decay_norm_and_bias=True, norm_bias_lr_scale=scale)
        sgd = lambda params: torch.optim.SGD(params, lr=0.2, weight_decay=0.5)  # noqa: E731
        model = Classifier(make(), optimizer=sgd, schedule=Constant(), param_groups=groups)
        model.net.init_images = 0
        trainer = quiet_trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0)
        trainer.fit(model, datamodule=ImageData(Digits(), batch_size=64))
        names = {id(p): name for name, p in model.net.named_parameters()}
        groups_of = [(group, names[id(p)]) for group in trainer.optimizers[0].param_groups for p in group["params"]]
        options.append({name: (group["lr"], group["weight_decay"]) for group, name in groups_of})
        assert trainer.optimizers[0].param_groups[0]["lr"] == 0.2  # the logged rate
    usual, fast = options
    biases = {name for name in usual if norm in name and name.endswith("bias")}
    assert biases and fast == {n: (8 * lr, wd / 8) if n in biases else (lr, wd) for n, (lr, wd) in usual.items()}


class Centered(Network):
    """Subtracts the mean of the training images, which `initialize` takes from them."""

    def __init__(self) -> None:
        super().__init__()
        self.in_channels, self.num_classes, self.num_features, self.init_images = 1, 10, 64, 100
        self.mean = torch.nn.Parameter(torch.full((1, 8, 8), torch.nan), requires_grad=False)
        self.head = torch.nn.Linear(64, 10)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean).flatten(1)

    def initialize(self, images: torch.Tensor) -> None:
        assert images.shape == (100, 1, 8, 8) and images.dtype == torch.float32
        self.mean.data.copy_(images.mean(0))


def test_network_sets_first_weights_from_training_images(tmp_path: Path) -> None:
    model, data = Classifier(Centered(), ema_decay=0.5), ImageData(Digits(), batch_size=64)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(model, datamodule=data)
    mean = model.net.mean
    everything = data.on_after_batch_transfer(next(iter(data.val_dataloader()))).images.mean(0)
    assert (mean - everything).abs().mean() < 0.3  # of the same distribution
    assert torch.equal(model.ema.module.mean, mean)
    torch.save(model.net.state_dict(), tmp_path / "weights.pth")
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    loaded = Classifier(Centered(), weights=str(tmp_path / "weights.pth"))  # which are not overwritten
    quiet_trainer(max_epochs=1).fit(loaded, datamodule=ImageData(Digits(), batch_size=64))
    resumed = Classifier(Centered(), ema_decay=0.5)
    quiet_trainer(max_epochs=2).fit(resumed, datamodule=data, ckpt_path=str(tmp_path / "last.ckpt"))
    assert torch.equal(loaded.net.mean, mean) and torch.equal(resumed.net.mean, mean)


def test_network_that_requires_training_images_refuses_plain_loaders() -> None:
    loader = torch.utils.data.DataLoader([(torch.zeros(1, 8, 8), 0)] * 8, batch_size=4)
    with pytest.raises(UserError, match="Centered sets its first weights from training images"):
        quiet_trainer(max_epochs=1).fit(Classifier(Centered()), loader)
    with pytest.raises(UserError, match="call initialize"):
        Classifier(Centered()).training_step(next(iter(loader)), 0)  # in a loop without a Trainer


def test_backbone_learns_at_its_share_of_the_rate() -> None:
    sgd = lambda params: torch.optim.SGD(params, lr=0.2)  # noqa: E731
    groups = ParamGroups(backbone_lr_scale=0.1, freeze=["stem"])
    model = Classifier(small_net(), optimizer=sgd, schedule=Constant(), param_groups=groups)
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(model, datamodule=ImageData(Digits(), batch_size=64))
    rates = {id(p): group["lr"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
    for part, modules in model.net.layer_groups().items():
        expected = {"stem": None, "head": 0.2}.get(part, 0.1 * 0.2)
        assert {rates.get(id(p)) for module in modules for p in module.parameters()} == {expected}
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.2  # the logged rate


def test_frozen_groups_stay_unchanged_and_the_rest_is_trained() -> None:
    model = Classifier(small_net(), param_groups=ParamGroups(freeze=["stem", "stage2"]), ema_decay=0.5)
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    trainer = quiet_trainer(max_epochs=2)  # with validation in between
    trainer.fit(model, datamodule=ImageData(Digits(), batch_size=64))
    model.train()  # as a custom loop would
    assert not model.net.bn1.training and not model.net.layer2.training and model.net.layer1.training
    for net in (model.net, model.ema.module):
        same = {name for name, value in net.state_dict().items() if torch.equal(value, before[name])}
        assert same == {name for name in before if name.startswith(("conv1.", "bn1.", "layer2."))}
    frozen = {name for name, p in model.net.named_parameters() if not p.requires_grad}
    assert frozen == {
        name for name, _ in model.net.named_parameters() if name.startswith(("conv1.", "bn1.", "layer2."))
    }


def test_ema_follows_its_rule_and_averages_running_statistics() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    ema = EMA(net, decay=0.9)
    expected = net[0].weight.detach().clone()
    for step in range(1, 30):
        with torch.no_grad():
            net[0].weight += 1.0
        net[1].running_mean += 0.5
        ema.update(net, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * net[0].weight.detach()
    torch.testing.assert_close(ema.module[0].weight, expected)
    assert 0 < float(ema.module[1].running_mean[0]) < float(net[1].running_mean[0])
    assert not any(p.requires_grad for p in ema.parameters())
    assert not ema.train().module[1].training  # the average is never in training mode


def test_flip_tta_averages_image_and_mirror_image_in_evaluation_only() -> None:
    model = Classifier(small_net(), flip_tta=True)
    images = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        both = (model.eval().net(images) + model.net(images.flip(3))) / 2
        assert torch.equal(model(images), both) and not torch.equal(both, model.net(images))
        assert torch.equal(model.train()(images), model.net(images))


def test_shift_tta_gives_two_shifted_views_half_of_the_weight() -> None:
    model = Classifier(small_net(), flip_tta=True, shift_tta=2).eval()
    images = torch.randn(5, 1, 8, 8)
    padded = torch.from_numpy(np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)), "reflect"))
    views = images, padded[:, :, :8, :8], padded[:, :, 4:, 4:]
    with torch.no_grad():
        one, two, three = ((model.net(x) + model.net(x.flip(3))) / 2 for x in views)
        torch.testing.assert_close(model(images), one / 2 + two / 4 + three / 4)
        assert torch.equal(model.train()(images), model.net(images))


def test_shift_as_large_as_the_images_is_refused_before_training() -> None:
    data = ImageData(Digits(), batch_size=64)
    check_model(Classifier(small_net(), shift_tta=7), data)
    with pytest.raises(UserError, match="shift_tta 8 must be less than the side of the images, 8 × 8"):
        check_model(Classifier(small_net(), shift_tta=8), data)


def test_batch_norms_of_network_and_ema_convert_to_sync_batchnorm() -> None:
    model = Classifier(small_net(), ema_decay=0.9)
    model.ema = EMA(model.net, 0.9)
    keys = list(model.state_dict())
    synchronised = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # what trainer.sync_batchnorm does
    norms = [type(m) for m in synchronised.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert set(norms) == {torch.nn.SyncBatchNorm} and list(synchronised.state_dict()) == keys
    synchronised.ema.update(synchronised.net, step=1)
    assert synchronised.eval()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_learning_rate_scales_with_the_global_batch() -> None:
    data = ImageData(Digits(), batch_size=64)
    sgd = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    model = Classifier(small_net(), optimizer=sgd, schedule=Constant(), base_batch_size=256)
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=0)
    trainer.fit(model, datamodule=data)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 64 / 256)


def test_warmup_in_epochs_works_with_max_steps() -> None:
    trainer = quiet_trainer(max_steps=10, limit_val_batches=0)
    model = Classifier(small_net(), schedule=Cosine(warmup_epochs=0.25, final=0.5))
    rates: list[float] = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer.callbacks.append(Rates())
    trainer.fit(model, datamodule=ImageData(Digits(), batch_size=64))  # 20 steps per epoch: 5 of warm-up
    assert rates[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] > 0.05


def test_accumulation_takes_the_same_number_of_steps() -> None:
    steps = []
    for accumulate in (1, 4):
        trainer = quiet_trainer(max_epochs=1, accumulate_grad_batches=accumulate, limit_val_batches=0)
        trainer.fit(Classifier(small_net()), datamodule=ImageData(Digits(), batch_size=64))
        steps.append(trainer.global_step)
    assert steps[0] == steps[1] == 1294 // 64


def test_evaluation_uses_the_ema_and_training_the_weights() -> None:
    model = Classifier(small_net(), ema_decay=0.5)
    model.ema = EMA(model.net, 0.5)
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        for p in model.ema.module.parameters():
            p.zero_()
    assert torch.all(model.eval()(images) == 0)
    assert not torch.all(model.train()(images) == 0)
    assert model.evaluated_net() is model.ema.module


def test_works_with_a_plain_trainer_and_plain_loaders() -> None:
    loader = DataLoader(TensorDataset(torch.randn(64, 1, 8, 8), torch.randint(0, 10, (64,))), batch_size=16)
    model = Classifier(small_net())
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(model, loader, loader)
    assert {"val/loss", "val/acc", "val/acc5"} <= set(trainer.callback_metrics)
    (results,) = trainer.test(model, loader, verbose=False)
    assert 0 <= results["test/acc"] <= 1


def test_diverged_run_stops_within_a_hundred_steps() -> None:
    images = torch.full((1280, 1, 8, 8), float("nan"))
    loader = DataLoader(TensorDataset(images, torch.zeros(1280, dtype=torch.long)), batch_size=8)
    trainer = quiet_trainer(max_epochs=1, log_every_n_steps=1000)
    with pytest.raises(Diverged, match="step 100"):
        trainer.fit(Classifier(small_net()), loader)


def test_predict_step_returns_probabilities() -> None:
    batch = Batch(torch.randn(3, 1, 8, 8), torch.zeros(3), torch.arange(3), torch.empty(3, 0))
    probabilities = Classifier(small_net()).eval().predict_step(batch, 0)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3))


OUT_OF_RANGE = [
    ("ema_decay", lambda: {"ema_decay": 1.5}),
    ("base_batch_size", lambda: {"base_batch_size": 0}),
    ("shift_tta", lambda: {"shift_tta": -1}),
    ("backbone_lr_scale", lambda: {"param_groups": ParamGroups(backbone_lr_scale=0.0)}),
    ("layer_decay", lambda: {"param_groups": ParamGroups(layer_decay=-1.0)}),
    ("norm_bias_lr_scale", lambda: {"param_groups": ParamGroups(norm_bias_lr_scale=0.0)}),
    ("freeze", lambda: {"param_groups": ParamGroups(freeze=["stage4"])}),  # the net has three
    ("freeze", lambda: {"param_groups": ParamGroups(freeze=["head"])}),
]


@pytest.mark.parametrize(("name", "options"), OUT_OF_RANGE)
def test_values_out_of_range_are_refused_by_name(name: str, options: Any) -> None:
    with pytest.raises(ValueError, match=name):
        Classifier(small_net(), **options())


def test_network_with_another_number_of_classes_is_refused() -> None:
    net = create_model("resnet8", in_channels=1, num_classes=7)
    with pytest.raises(UserError, match="num_classes=7, the data have 10"):
        quiet_trainer(max_epochs=1).fit(Classifier(net), datamodule=ImageData(Digits()))


class Plain(torch.nn.Module):
    """Maps images to logits, with none of the contract of Network."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.Linear(32, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_any_module_from_images_to_logits_trains_and_is_tested() -> None:
    model = Classifier(Plain(), ema_decay=0.9, flip_tta=True)  # type: ignore[arg-type]
    trainer, data = quiet_trainer(max_epochs=2), ImageData(Digits(), batch_size=64)
    trainer.fit(model, datamodule=data)
    (results,) = trainer.test(model, datamodule=data, verbose=False)
    assert results["test/acc"] > 0.7 and len(model.predictions["label"]) == 359


@pytest.mark.parametrize(
    "options", [{"freeze": ["stem"]}, {"backbone_lr_scale": 0.1}, {"freeze": ["x"], "layer_decay": 0.5}]
)
def test_options_that_require_layer_groups_are_refused_in_one_message(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Plain has none") as caught:
        Classifier(Plain(), param_groups=ParamGroups(**options))  # type: ignore[arg-type]
    assert all(name in str(caught.value) for name in options)


def test_layer_decay_multiplies_the_rate_from_group_to_group() -> None:
    net = small_net()
    scales = ParamGroups(layer_decay=0.5, backbone_lr_scale=0.1).lr_scales(net)
    for depth, (name, parts) in enumerate(reversed(net.layer_groups().items())):
        expected = 1.0 if name == "head" else 0.1 * 0.5**depth
        assert {scales[id(p)] for part in parts for p in part.parameters()} == {expected}
    assert parameter_groups(net, ParamGroups(layer_decay=0.5))[0]["lr_scale"] == 1.0


@pytest.mark.parametrize("run", ["validate", "test", "predict"])
def test_weights_are_loaded_without_a_fit_before(run: str, tmp_path: Path) -> None:
    trained = small_net()
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    model = Classifier(small_net(), weights=str(tmp_path / "weights.pth"))
    getattr(quiet_trainer(), run)(model, datamodule=ImageData(Digits()))
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), model.net.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--trainer.max_epochs=2", "--trainer.limit_train_batches=5"], 10),
        (["--trainer.max_epochs=2", "--trainer.accumulate_grad_batches=2"], 40),
        (["--trainer.max_epochs=null", "--trainer.max_steps=7"], 7),
    ],
)
def test_preview_asks_the_classifier_for_the_schedule(options: list[str], steps: int, repo: Path) -> None:
    from reslab.config import Experiment
    from reslab.preview import learning_rates

    config = ["--config", str(repo / "configs/experiment/digits.yaml"), "--trainer.accelerator=cpu"]
    rates: list[float] = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            if not rates or trainer.global_step == len(rates):
                rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    data, model, settings = Experiment([*config, *options]).build()
    Trainer(**{**settings, "callbacks": [Rates()], "logger": False, "limit_val_batches": 0}).fit(model, datamodule=data)
    assert len(rates) == steps
    assert learning_rates(*Experiment([*config, *options]).build()) == pytest.approx(rates)

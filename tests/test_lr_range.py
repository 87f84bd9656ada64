"""The learning-rate range test: real training steps with a growing rate, and what it concludes from their losses."""

from pathlib import Path

import numpy as np
import pytest

from reslab.config import Experiment
from reslab.errors import UserError
from reslab.lr_range import MIN_STEPS, Ramp, has_diverged, preview_lr_range, suggest, train
from runner import DIGITS, REPO, reslab

RATES = np.geomspace(1e-5, 10, 100).tolist()


def losses_of(options: list[str], steps: int = 24) -> tuple[list[float], Ramp]:
    experiment, ramp = Experiment([*DIGITS, *options]), Ramp(np.geomspace(1e-4, 1, steps).tolist())
    return train(experiment, *experiment.build(), ramp), ramp


def valley(minimum: float, rises: bool = True, noise: float = 0.02) -> list[float]:
    """Return losses that fall from 2.3 to 1.3 at the rate `minimum`, and then rise if asked to."""
    x = np.log10(np.asarray(RATES) / minimum)
    after = np.clip(x, 0, None) ** 2 if rises else 0
    return (
        2.3 - np.exp(-(np.clip(-x, 0, None) ** 2)) + after + np.random.default_rng(0).normal(0, noise, 100)
    ).tolist()


@pytest.mark.parametrize("minimum", [0.001, 0.03, 0.5])
def test_suggests_the_rate_at_the_first_deep_minimum(minimum: float) -> None:
    suggestion = suggest(RATES, valley(minimum))
    assert suggestion.rate == pytest.approx(minimum, rel=0.5)
    assert suggestion.steepest is not None and minimum / 20 < suggestion.steepest < suggestion.rate


def test_a_later_minimum_that_is_hardly_deeper_is_not_chosen() -> None:
    """Beyond the first minimum the loss is ragged: at a higher rate, longer training diverges."""
    ragged = np.asarray(valley(0.03))
    ragged[75:80] = ragged.min() - 0.03
    assert suggest(RATES, ragged.tolist()).rate == pytest.approx(0.03, rel=0.5)


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        (np.random.default_rng(0).normal(2.3, 0.1, 100).tolist(), "hardly fell"),
        (valley(100, rises=False), "use a larger --max"),
        ([2.3] * (MIN_STEPS - 1), "use a smaller --min"),
    ],
)
def test_no_suggestion_without_a_minimum(losses: list[float], reason: str) -> None:
    suggestion = suggest(RATES[: len(losses)], losses)
    assert suggestion.rate is None and reason in suggestion.reason


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [([2.3] * 9, False), ([2.3] * 9 + [9.0], False), ([2.3] * 9 + [9.0] * 3, True), ([2.3, float("nan")], True),
     ([-1.0] * 9, False), ([-1.0] * 9 + [3.0] * 5, True)],
)  # fmt: skip
def test_stops_when_the_loss_diverges(losses: list[float], diverged: bool) -> None:
    assert has_diverged(losses) == diverged


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--trainer.accumulate_grad_batches=4"],
        ["--model.optimizer=AdamW", "--model.param_groups.layer_decay=0.5", "--model.base_batch_size=256"],
        ["--trainer.max_epochs=null", "--trainer.max_steps=3", "--trainer.min_steps=2", "--model.ema_decay=0.9"],
        ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/loss"],
        ["--data.folds=5", "--data.fold=2", "--trainer.precision=bf16-mixed"],
    ],
)
def test_takes_the_steps_whatever_the_experiment_sets(options: list[str]) -> None:
    losses, ramp = losses_of(options)
    assert len(losses) == len(ramp.rates)
    assert min(losses) < losses[0]


def test_loss_of_a_step_does_not_depend_on_accumulation() -> None:
    """The network has batch norm, so only the first losses, at almost equal weights, are nearly the same."""
    once, four = losses_of([])[0], losses_of(["--trainer.accumulate_grad_batches=4"])[0]
    assert once[:3] == pytest.approx(four[:3], rel=0.1)


def test_first_group_has_the_rate_of_the_ramp_and_others_their_ratio() -> None:
    experiment = Experiment([*DIGITS, "--model.param_groups.layer_decay=0.5", "--model.base_batch_size=32"])
    data, model, settings = experiment.build()
    ramp = Ramp(np.geomspace(1e-3, 1e-2, 5).tolist())
    train(experiment, data, model, settings, ramp)
    groups = model.optimizers().param_groups  # type: ignore[union-attr]
    assert ramp.base == pytest.approx(0.1 * 64 / 32)
    assert groups[0]["lr"] == pytest.approx(1e-2) and min(g["lr"] for g in groups) < 1e-2 / 4


def test_stops_at_divergence() -> None:
    experiment = Experiment([*DIGITS, "--trainer.log_every_n_steps=1"])
    losses = train(experiment, *experiment.build(), Ramp([1e-3] * 5 + [1e6] * 50))
    assert 5 <= len(losses) < 30 and np.isfinite(losses).all()


@pytest.mark.parametrize(
    ("steps", "low", "high", "options", "message"),
    [
        (100, 1.0, 0.1, [], "--min must be above 0 and below --max"),
        (100, 0.0, 0.1, [], "--min must be above 0"),
        (5, 1e-3, 1.0, [], "--steps must be at least 20, got 5"),
        (20, 1e-3, 1.0, ["--model.optimizer.lr=0"], "must be more than 0 for a range test"),
    ],
)
def test_errors_name_the_option(
    tmp_path: Path, steps: int, low: float, high: float, options: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        preview_lr_range(Experiment([*DIGITS, *options]), tmp_path / "x.png", steps, low, high)


def test_command_draws_prints_and_leaves_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = reslab("preview", "lr-range", *DIGITS, "--data.root", REPO / "data", "--steps", "60", "--min", "1e-4")
    assert ended.status == 0, ended.output
    assert "suggestion  --model.optimizer.lr 0." in ended.output and "(configured: 0.1)" in ended.output
    assert [path.name for path in tmp_path.iterdir()] == ["preview-lr-range.png"]
    assert (tmp_path / "preview-lr-range.png").stat().st_size > 10_000

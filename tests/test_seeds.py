"""Sources of randomness can be seeded apart, and each seed affects its own source only."""

from pathlib import Path
from typing import Any

import pytest
import torch

from reslab.config import Experiment
from reslab.errors import UserError
from runner import DIGITS, fit, manifest

SOURCES = ("init", "order", "augment", "network")


def sources(*options: str) -> dict[str, Any]:
    """Return what each source determines: initial weights, indices of two batches, their crops, in-network seed."""
    data, model, _ = Experiment([*DIGITS, "--data.augment.crop_padding=1", *options]).build()
    data.setup()
    first, *_ = data.train_dataloader()
    loader = data.train_dataloader().dataset
    key = next(iter(data.train_dataloader().sampler))._replace(indices=data.split[0][:50])
    return {
        "init": torch.cat([p.detach().flatten() for p in model.net.parameters()]),
        "order": first.indices,
        "augment": loader[key].augment_params,
        "network": torch.tensor(model.seed),
    }


@pytest.mark.parametrize("source", SOURCES)
def test_seed_of_one_source_changes_only_that_source(source: str) -> None:
    default, other = sources(), sources(f"--run.seeds.{source}=7")
    assert {name for name in SOURCES if not default[name].equal(other[name])} == {source}
    all_others = [f"--run.seeds.{name}=0" for name in SOURCES if name != source]
    varied = sources("--seed_everything=7", *all_others)
    assert all(varied[name].equal(other[name]) for name in SOURCES)


def test_seeds_equal_to_the_runs_change_nothing(tmp_path: Path) -> None:
    short = ["--trainer.max_epochs=1", "--seed_everything=3"]
    assert fit(tmp_path / "a", *short).status == 0
    assert fit(tmp_path / "b", *short, *(f"--run.seeds.{name}=3" for name in SOURCES)).status == 0
    assert manifest(tmp_path / "a")["weights_sha256"] == manifest(tmp_path / "b")["weights_sha256"]


def test_seed_out_of_range_is_refused() -> None:
    with pytest.raises(UserError, match=r"run\.seeds\.order must be a whole number"):
        Experiment([*DIGITS, "--run.seeds.order=-1"]).build()

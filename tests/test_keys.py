"""The table of all config keys, which is read from the source."""

import subprocess
import sys

from reslab.config import Experiment
from reslab.keys import all_keys, matching
from reslab.resolve import flat
from reslab.value_types import in_yaml
from test_configs import DIGITS

REQUIRED = ("model.net", "data.dataset")


def test_table_has_every_key_of_a_config_with_its_default() -> None:
    rows = {(row.key, row.of): row for row in all_keys()}
    experiment = Experiment(["--config", str(DIGITS)])
    typed = experiment.parser.get_defaults(skip_validation=True).as_dict()
    typed = {group: typed[group] for group in ("seed_everything", "trainer", "model", "data", "run")}
    typed["data"].pop("seed")  # linked to seed_everything
    for key, value in flat(typed):
        assert (key, "") in rows or any(other.startswith(f"{key}.") for other, _ in rows), key
        if (key, "") in rows and isinstance(value, bool | int | float | str | list | None):
            assert rows[key, ""].default == ("required" if key in REQUIRED else in_yaml(value)), key


def test_table_lists_the_arguments_of_shipped_classes_with_their_documentation() -> None:
    rows = {(row.short, row.of): row for row in all_keys()}
    lr = rows["model.optimizer.lr", "SGD"]
    assert (lr.key, lr.type, lr.default, lr.doc) == (
        "model.optimizer.init_args.lr", "float | Tensor", "0.001", "learning rate",
    )  # fmt: skip
    assert rows["model.net.shortcut", "ResNet"].type == "identity | A | C | none"
    assert rows["model.schedule.warmup_epochs", "Cosine"].doc.startswith("The multiplier rises linearly")
    assert rows["data.dataset.folder", "ImageFolder"].default == "required"
    assert rows["data.dataset.mean", "ImageFolder"].default == "[0.485, 0.456, 0.406]"
    assert rows["trainer.logger.project", "WandB"].default == "reslab"
    assert ("trainer.logger.project", "WandbLogger") not in rows, "reslab refuses this class"


def test_a_word_finds_keys_by_name_by_class_and_by_documentation() -> None:
    assert {row.key for row in matching("--lr")} >= {"model.optimizer.init_args.lr"}
    assert {row.of for row in matching("OneCycle")} == {"OneCycle"}
    assert any(row.key == "data.augment.flip" for row in matching("airbench"))


def test_table_is_made_without_torch() -> None:
    code = (
        "import sys; from reslab.keys import all_keys; all_keys(); assert not {'torch', 'lightning'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

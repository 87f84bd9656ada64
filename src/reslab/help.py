"""`reslab fit --help`, `reslab fit --help KEY` and `reslab keys`. Imports no torch."""

import difflib
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence

from reslab import resolve
from reslab.errors import UserError
from reslab.host import CONFIGS
from reslab.keys import Key, all_keys, default_of, matching
from reslab.resolve import SHORT_KEYS

MOST_USED = {  # without those that have a short key
    "config": "add a config file, by name or path",
    "run.dir": "run directory; resumes an unfinished run",
    "run.test_weights": "weights to test: last or best",
    "model.net": "a name (resnet18), a class or a file",
    "model.objective": "a name, a class or a file",
    "model.weights": "pretrained weights to start from",
    "model.optimizer.weight_decay": "weight decay of the optimizer",
    "model.schedule": "Cosine, OneCycle, MultiStep or Constant",
    "model.ema_decay": "decay of the weight average, such as 0.999",
    "data.dataset": "a name (cifar100), a class or a file",
    "data.root": "directory of the data sets",
    "data.val_split": "validation images: share or number",
    "data.num_workers": "loader processes per device",
    "data.augment.flip": "none, random or alternating",
    "trainer.max_steps": "optimizer steps, instead of epochs",
    "trainer.accumulate_grad_batches": "micro-batches per optimizer step",
}
SHORT_HELP = {
    "lr": "learning rate", "epochs": "epochs of training", "batch_size": "images per step, over all devices",
    "seed": "seed of everything random", "devices": "number of devices, or auto",
    "precision": "auto, 32-true, bf16-mixed, ...",
}  # fmt: skip
FIT = """\
usage: reslab fit EXPERIMENT [--config NAME ...] [--KEY VALUE ...]

Train and test one run. EXPERIMENT: a name from `reslab list experiments`, or a
path. Later files and keys win.
  reslab fit digits --lr 0.05 --seed 1
  reslab fit cifar10_resnet18 --config ddp --config ema --model.net resnet34

Short keys (default, unless the experiment sets it):
{short}

Other keys that are used most:
{keys}

reslab keys [WORD], reslab fit --help KEY   all keys, with their documentation
reslab fit digits --print_config            the resolved config, as YAML"""


def fit_help() -> str:
    """Return the help of `reslab fit`: one screen."""
    base = resolve.read_config(CONFIGS / "base.yaml")

    def row(key: str, text: str) -> str:
        default = default_of(SHORT_KEYS.get(key, key), base)
        suffix = f" ({default})" if default not in ("", "null", "required") else ""
        return f"  --{key:<31} {text}{suffix}"

    short, keys = (map(row, table, table.values()) for table in (SHORT_HELP, MOST_USED))
    return FIT.format(short="\n".join(short), keys="\n".join(keys))


def key_help(word: str | None = None) -> str:
    """Return the documentation of the keys that match a word, or of all keys."""
    return "\n".join(_text(matching(word) if word else all_keys(), word))


def _text(rows: Sequence[Key], word: str | None) -> Iterator[str]:
    if not rows:
        names = {part for row in all_keys() for part in (row.short, row.short.rpartition(".")[2], row.of)}
        near = difflib.get_close_matches(str(word), [*names], 3, 0.5)
        raise UserError(f"no key matches {word!r}" + (f"; nearest: {', '.join(near)}" if near else ""))
    width = max(shutil.get_terminal_size().columns, 60)
    classes: dict[Key, list[str]] = {}
    for row in rows:
        classes.setdefault(row._replace(of=""), []).append(row.of)
    for row, of in classes.items():
        yield row.short + (f"  ({', '.join(of)})" if any(of) else "")
        default = row.default if row.default == "required" else "default: " + (row.default or "''")
        about = f"{row.type}; {default}"
        sentence = re.split(r"(?<=[a-z)\d`])\. (?=[A-Z])", row.doc)[0]
        for text in (about, sentence):
            yield from textwrap.wrap(text, width, initial_indent="    ", subsequent_indent="    ")

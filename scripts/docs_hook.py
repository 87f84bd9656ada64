"""Hook of mkdocs.yml: pages made at build time, from CHANGELOG.md and from the documentation of the config keys."""

import re
from collections.abc import Iterable, Iterator
from html import escape
from itertools import groupby
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from reslab.keys import Key, all_keys

INTRODUCTION = """# Config keys

Every key works in a config file and on the command line. These are the same:

```bash
reslab fit digits --data.augment.cutout 2
```

```yaml
data:
  augment: {cutout: 2}
```

A key of a class, such as `model.optimizer.lr`, exists if the config names that class. In a config file it is under
`init_args`; on the command line `init_args` may be left out. `reslab keys WORD` prints the keys that contain a word.
"""
SECTIONS = {  # the longest prefix that fits a key decides
    "seed_everything": "Seed",
    "run": "Run",
    "data": "Data",
    "data.dataset": "Data sets",
    "data.augment": "Augmentation",
    "data.resize": "Image sizes",
    "model": "Model",
    "model.net": "Networks",
    "model.objective": "Objectives",
    "model.optimizer": "Optimizers",
    "model.schedule": "Schedules",
    "trainer": "Trainer",
    "trainer.callbacks": "Callbacks",
    "trainer.logger": "Loggers",
    "trainer.strategy": "Strategies",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add reference/config_keys.md, and CHANGELOG.md as changelog.md with its links relative to docs/."""
    files.append(File.generated(config, "reference/config_keys.md", content=keys_page(all_keys())))
    changelog = Path(config.config_file_path).parent / "CHANGELOG.md"
    if changelog.exists():
        text = changelog.read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, "changelog.md", content=text))
    return files


def keys_page(keys: Iterable[Key]) -> str:
    """Return the page of config keys: one section per part of the config, with one table per class."""
    parts = [INTRODUCTION]
    order = [*SECTIONS]
    rows = sorted(keys, key=lambda row: (order.index(section(row)), row.of))  # stable: keeps the order of arguments
    for (prefix, name), arguments in groupby(rows, lambda row: (section(row), row.of)):
        parts += [f"### {name}\n"] if name else [f"## {SECTIONS[prefix]}\n"]
        parts += [*table(arguments), ""]
    return "\n".join(parts)


def section(row: Key) -> str:
    return max((prefix for prefix in SECTIONS if f"{row.key}.".startswith(f"{prefix}.")), key=len)


def table(keys: Iterable[Key]) -> Iterator[str]:
    yield from ("| Key | Type | Default | Description |", "|---|---|---|---|")
    for row in keys:
        default = f"`{row.default}`" if row.default else ""
        yield f"| `{row.short}` | {as_cell(row.type.replace(' | ', ' or '))} | {default} | {as_cell(row.doc)} |"


def as_cell(doc: str) -> str:
    """Return text of a docstring as Markdown in one line; torch and Lightning write reStructuredText."""
    text = re.sub(r":\w+:`~?\.?([^`]+)`", r"`\1`", doc.replace("``", "`"))
    codes = re.split(r"(`[^`]*`)", " ".join(text.split()))  # every second part is code
    return "".join(part if i % 2 else re.sub(r"([|*_\[])", r"\\\1", escape(part)) for i, part in enumerate(codes))

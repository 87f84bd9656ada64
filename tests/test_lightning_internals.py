"""Private attributes of Lightning: used in one module only, and missed with a message that names the versions."""

import importlib
import re
from pathlib import Path

import pytest
from lightning.pytorch.loops import _TrainingEpochLoop

from reslab.training import lightning_internals

SRC = Path(lightning_internals.__file__).parents[1]
PRIVATE = re.compile(r"(trainer|loop|strategy|connector|launcher|fetcher)\w*\._[a-z]|fit_loop|_launch_process_observer")


def test_missing_attribute_is_reported_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_TrainingEpochLoop, "_should_check_val_fx")
    with pytest.raises(
        ImportError, match=r"lightning>=2\.6\.6,<2\.7; .* has no _TrainingEpochLoop\._should_check_val_fx"
    ):
        importlib.reload(lightning_internals)


def test_private_attributes_are_used_in_one_module_only() -> None:
    users = {
        path.name
        for path in SRC.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if PRIVATE.search(line.partition("#")[0])
    }
    assert users == {"lightning_internals.py"}


def test_supported_versions_are_those_of_pyproject(repo: Path) -> None:
    assert f'"{lightning_internals.SUPPORTED}"' in (repo / "pyproject.toml").read_text(encoding="utf-8")

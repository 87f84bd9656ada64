"""Checkpoint files: a kill before any rename leaves an intact checkpoint that differs detectably from a damaged one."""

from pathlib import Path

import pytest

from reslab.errors import UserError
from reslab.training.checkpoint import SUMS, VerifiedCheckpointIO, checksum_matches, read_checkpoint, resume_point


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", range(1, 6))
def test_kill_before_any_rename_leaves_a_checkpoint_to_resume_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    writer, last = VerifiedCheckpointIO(), tmp_path / "last.ckpt"
    for step in (1, 2):
        writer.save_checkpoint({"global_step": step}, last)
    renames, original = 0, Path.replace

    def replace(self: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        if renames == moment:
            raise Killed
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        try:  # a save renames four times: sums, last to previous, the new file, sums again
            writer.save_checkpoint({"global_step": 3}, last)
        except Killed:
            assert moment <= 4
        else:
            assert moment == 5
    for step in (4, 5):  # later saves lose nothing either
        assert all(checksum_matches(path) for path in tmp_path.glob("*.ckpt"))
        path, messages = resume_point(tmp_path)
        assert path and not messages and read_checkpoint(path)["global_step"] in (2, 3, 4)
        writer.save_checkpoint({"global_step": step}, last)
    assert [read_checkpoint(tmp_path / f"{name}.ckpt")["global_step"] for name in ("last", "previous")] == [5, 4]


def test_sums_are_those_of_sha256sum(tmp_path: Path) -> None:
    import subprocess

    for step in (1, 2, 3):
        VerifiedCheckpointIO().save_checkpoint({"global_step": step}, tmp_path / "last.ckpt")
    VerifiedCheckpointIO().save_checkpoint({"global_step": 2}, tmp_path / "best.ckpt")
    subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=tmp_path, check=True)
    assert len((tmp_path / SUMS).read_text().splitlines()) == 3


def test_damaged_sums_file_is_reported(tmp_path: Path) -> None:
    VerifiedCheckpointIO().save_checkpoint({"global_step": 1}, tmp_path / "last.ckpt")
    (tmp_path / SUMS).write_bytes(b"\xff\xfe no sums")
    with pytest.raises(UserError, match="no intact checkpoint"):
        resume_point(tmp_path)


@pytest.mark.parametrize("mode", ["max", "min"])
def test_nan_in_a_validation_is_never_the_best(tmp_path: Path, mode: str) -> None:
    from types import SimpleNamespace

    from reslab.training.checkpoint import Checkpoints

    written: list[float] = []
    trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"), sanity_checking=False, callback_metrics={})
    saver = Checkpoints(tmp_path, "val/loss", mode)  # type: ignore[arg-type]
    trainer.save_checkpoint = lambda path, weights_only: written.append(trainer.callback_metrics["val/loss"])
    for value in (float("nan"), 2.0, 1.0, float("nan"), 3.0):
        trainer.callback_metrics["val/loss"] = value
        saver.on_validation_end(trainer, None)  # type: ignore[arg-type]
    assert written == ([2.0, 3.0] if mode == "max" else [2.0, 1.0])

"""Silence messages of Lightning and torch that do not help the user. Imports neither."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

UNHELPFUL = (  # in a training run
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*does not have many workers.*",
    r".*smaller than the logging interval.*",
    r".*in eval mode at the start of training.*",
    r".*GPU available but not used.*",  # the header names the device
    r".*`srun` command is available on your system but is not used.*",
    r".*distributed.nn.functional.all_gather is deprecated.*",  # called by Lightning
    r".*It is recommended to use `self.log\(.*sync_dist=True.*",  # torchmetrics has synchronized them already
)


def drop_unhelpful() -> None:
    """Drop known messages of a training run; every other warning may be about the user's code or data."""
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.WARNING)
    for message in UNHELPFUL:
        warnings.filterwarnings("ignore", message)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Drop all warnings and log messages below errors: for commands that only use a finished run.

    What they would tell, the training has told already. Python's options -W and PYTHONWARNINGS bring warnings back.
    """
    if sys.warnoptions:
        yield
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of torch's C++ code, which writes to stderr
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Libraries change the filters when they are imported.
            warnings.showwarning = lambda *message, **options: None
            yield
    finally:
        logging.disable(before)

"""Several processes of one run: they wait for each other no more than they must, and end together."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import subprocess_script
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from reslab.files import write_text
from reslab.models.resnet import ResidualBlock

LOOK_EVERY = 0.5  # seconds
GRACE = 3.0  # seconds for a process to notice by itself that another is gone, and to end
BEGAN = time.time()


class SkipRedundantSync(Callback):
    """Leaves one thing that processes exchange in a step: gradients.

    Lightning (since 2.5.2) broadcasts in every step whether rank 0 got a SIGTERM, and waits for it; `Preemption`
    asks all ranks every few steps. DDP broadcasts the norms' running statistics before every forward pass, though
    only evaluation reads them: here they become rank 0's when an evaluation begins, the same bits.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            trainer.strategy.model.broadcast_buffers = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            for buffer in pl_module.buffers():
                torch.distributed.broadcast(buffer, 0)

    on_test_start = on_validation_start


def shard(net: nn.Module, mesh: DeviceMesh) -> None:
    """Divides parameters, gradients and optimizer state of a net among processes, block by block (FSDP2).

    Args:
        net: Its residual blocks are gathered one at a time for their part of a pass, the rest together.
        mesh: (copies, parts): a parameter lies in `parts` pieces, as often as there are `copies` (HSDP if several).
    """
    if isinstance(net, FSDPModule):
        return
    over = mesh if mesh.shape[0] > 1 else mesh["tensor_parallel"]
    net.to(memory_format=torch.contiguous_format)  # FSDP2 cuts rows of dense memory
    for block in [module for module in net.modules() if isinstance(module, ResidualBlock)]:
        fully_shard(block, mesh=over)
    fully_shard(net, mesh=over)


def whole_state(net: nn.Module) -> dict[str, Any]:
    """The net's state dict on the CPU, of all processes' parts: to be called in all, empty but in rank 0."""
    return get_model_state_dict(net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_whole_state(net: nn.Module, state: dict[str, Any]) -> None:
    """Puts a whole state dict, the same in every process, into a net that may be divided among them."""
    set_model_state_dict(net, state, options=StateDictOptions(full_state_dict=True))


class Failure(NamedTuple):
    """Why a run failed: the message, and the exit status that goes with it."""

    message: str
    status: int


def lost_contact(error: Exception) -> bool:
    """Whether this is what a process sees of the end of another one: gloo's or NCCL's connections broke."""
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


class FailureMonitor:
    """Ends this process when another one of the run is gone, which the main thread might wait for without end.

    A process that fails leaves a note in the run's folder, for all to see. Rank 0 looks at the processes that it
    started, too, where Lightning is the launcher; the others look whether the process that started them is there.

    Args:
        folder: The run's folder.
        rank: Of this process.
        close: Writes down the failure in the manifest.
    """

    def __init__(self, folder: Path, rank: int, close: Callable[[Failure], Any]) -> None:
        self.folder, self.rank, self.close = folder, rank, close
        self._launcher: Any = None
        self._last_word = threading.RLock()
        self._parent = os.getppid()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self, trainer: Trainer) -> None:
        """Begins, if there are several processes."""
        if trainer.world_size > 1:
            self._launcher = trainer.strategy.launcher
            # Lightning's own observer sends SIGKILL to all, to this process too: nobody would say why.
            subprocess_script._launch_process_observer = lambda processes: None  # type: ignore[assignment]
            self._thread.start()

    def _watch(self) -> None:
        while (failure := self._failure()) is None:
            time.sleep(LOOK_EVERY)
        time.sleep(GRACE)
        self.claim_shutdown()
        self.close(failure)
        self.end_others(failure.status)
        os._exit(failure.status)

    def claim_shutdown(self) -> None:
        """Lets one thread say how the run ended: the other one waits here for the end of the process."""
        self._last_word.acquire()
        if self._thread.is_alive() and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it as soon as another process ends

    def note(self, failure: Failure) -> None:
        """Tells the others why this process fails."""
        if self._thread.is_alive():
            message = f"rank {self.rank} on {socket.gethostname()}: {failure.message}"
            write_text(self.folder / f".failed-{self.rank}", json.dumps([message, failure.status]))

    def first_failure(self, patience: float = 1.0) -> Failure | None:
        """The failure of another process that may be behind one of this process; waits for it a moment."""
        deadline = time.monotonic() + patience * self._thread.is_alive()
        while (failure := self._failure()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return failure

    def end_others(self, status: int) -> None:
        """Kills the processes that this one started; and this one, should its exit wait for those that are gone."""
        for process in self._processes():
            process.kill()
        if self._thread.is_alive():
            last = threading.Timer(GRACE, os._exit, [status])
            last.daemon = True
            last.start()

    def _processes(self) -> list[Any]:
        return getattr(self._launcher, "procs", [])

    def _failure(self) -> Failure | None:
        ended = {rank: process.poll() for rank, process in enumerate(self._processes(), start=1)}
        for rank, status in ended.items():
            if status is not None and status < 0:
                how = f"rank {rank} was killed by {signal.Signals(-status).name}"
                return Failure(f"{how}: run the same command again to go on", 1)
        notes = [path for path in self.folder.glob(".failed-*") if path.stat().st_mtime > BEGAN]
        if notes:
            first = min(notes, key=lambda path: path.stat().st_mtime_ns)
            return Failure(*json.loads(first.read_text()))
        for rank, status in ended.items():
            if status not in (None, 0, 75):
                return Failure(f"rank {rank} ended with status {status}", status)
        if os.getppid() != self._parent:
            return Failure("the process that started this one is gone", 1)
        return None

"""Multi-process support: skip redundant collectives; shut down all ranks when one fails; shard a network."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from reslab.files import write_text
from reslab.models.network import Network
from reslab.training.lightning_internals import child_processes, skip_process_observer, skip_sigterm_broadcast

POLL = 0.5  # seconds
GRACE = 3.0  # seconds for this process to notice a dead peer by itself and exit
BEGAN = time.time()


class SkipRedundantSync(Callback):
    """Reduce the collectives of a training step to the all-reduce of gradients.

    Lightning (since 2.5.2) broadcasts in every step whether rank 0 received SIGTERM, and waits for it; `Preemption`
    asks all ranks every few steps instead. DDP broadcasts the norms' running statistics before every forward pass,
    though only evaluation reads them: here they are broadcast when an evaluation begins, with the same bits.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        skip_sigterm_broadcast(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            trainer.strategy.model.broadcast_buffers = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            for buffer in pl_module.buffers():
                torch.distributed.broadcast(buffer, 0)

    on_test_start = on_validation_start


def shard(net: nn.Module, mesh: DeviceMesh) -> None:
    """Shard parameters, gradients and optimizer state of a network over a (replicas, shards) mesh: FSDP2, HSDP.

    The `blocks()` of a Network are gathered one at a time during a pass, all other parameters together.
    """
    if isinstance(net, FSDPModule):
        return
    over = mesh if mesh.shape[0] > 1 else mesh["tensor_parallel"]
    net.to(memory_format=torch.contiguous_format)  # FSDP2 shards rows of dense memory
    for block in net.blocks() if isinstance(net, Network) else []:
        fully_shard(block, mesh=over)
    fully_shard(net, mesh=over)


def whole_state(net: nn.Module) -> dict[str, Any]:
    """Gather the full state dict on the CPU. Call it on all ranks; it is empty on all but rank 0."""
    return get_model_state_dict(net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_whole_state(net: nn.Module, state: dict[str, Any]) -> None:
    """Load a full state dict, the same on every rank, into a network that may be sharded."""
    set_model_state_dict(net, state, options=StateDictOptions(full_state_dict=True))


class Failure(NamedTuple):
    message: str
    status: int  # exit status


def lost_contact(error: Exception) -> bool:
    """Return whether the error means that a peer rank ended: a gloo or NCCL connection broke."""
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


class FailureMonitor:
    """Exit when a peer rank dies: the main thread may be blocked in a collective.

    A rank that fails leaves a note in the run directory, which all ranks poll. Where Lightning is the launcher, rank 0
    also polls the processes it started, and the others check that their parent process is alive. `close` records the
    failure in the manifest.
    """

    def __init__(self, folder: Path, rank: int, close: Callable[[Failure], Any]) -> None:
        self.folder, self.rank, self.close = folder, rank, close
        self._processes: Callable[[], list[Any]] = list
        self._shutdown = threading.RLock()
        self._parent = os.getppid()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self, trainer: Trainer) -> None:
        """Start monitoring if there are several ranks."""
        if trainer.world_size > 1:
            self._processes = partial(child_processes, trainer)  # none is started yet
            skip_process_observer()
            self._thread.start()

    def _watch(self) -> None:
        while (failure := self._failure()) is None:
            time.sleep(POLL)
        time.sleep(GRACE)
        self.claim_shutdown()
        self.close(failure)
        self.end_others(failure.status)
        os._exit(failure.status)

    def claim_shutdown(self) -> None:
        """Take the shutdown lock. The first caller records the outcome; later callers block until exit."""
        self._shutdown.acquire()
        if self._thread.is_alive() and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it as soon as another rank ends

    def note(self, failure: Failure) -> None:
        """Tell the other ranks why this one fails."""
        if self._thread.is_alive():
            message = f"rank {self.rank} on {socket.gethostname()}: {failure.message}"
            write_text(self.folder / f".failed-{self.rank}", json.dumps([message, failure.status]))

    def first_failure(self, patience: float = 1.0) -> Failure | None:
        """Return the failure of another rank that may have caused one here; wait for it up to `patience` seconds."""
        deadline = time.monotonic() + patience * self._thread.is_alive()
        while (failure := self._failure()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return failure

    def end_others(self, status: int) -> None:
        """Kill the processes this one started, and force the exit of this one if it blocks on dead peers."""
        for process in self._processes():
            process.kill()
        if self._thread.is_alive():
            last = threading.Timer(GRACE, os._exit, [status])
            last.daemon = True
            last.start()

    def _failure(self) -> Failure | None:
        ended = {rank: process.poll() for rank, process in enumerate(self._processes(), start=1)}
        for rank, status in ended.items():
            if status is not None and status < 0:
                how = f"rank {rank} was killed by {signal.Signals(-status).name}"
                return Failure(f"{how}: run the same command again to resume", 1)
        notes = [path for path in self.folder.glob(".failed-*") if path.stat().st_mtime > BEGAN]
        if notes:
            first = min(notes, key=lambda path: path.stat().st_mtime_ns)
            return Failure(*json.loads(first.read_text()))
        for rank, status in ended.items():
            if status not in (None, 0, 75):
                return Failure(f"rank {rank} ended with status {status}", status)
        if os.getppid() != self._parent:
            return Failure("the parent process of this rank is gone", 1)
        return None

"""The loader: from batches to the device, with worker processes and prefetching."""

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from reslab.data.batches import PREFETCH_FACTOR, Batch, FileBatches


class LazyLoader(DataLoader[Any]):
    """A DataLoader that asks its sampler for the first key when the first batch is requested, not earlier.

    Lightning creates the iterator before it restores a checkpoint (in `estimated_stepping_batches`). Workers that start
    to prefetch then would begin at step 0 instead of the step to resume from. If the batches are used on a CUDA
    `device`, they are copied there one batch ahead. If all `images` (n, H, W, C) are already there, only the rest of a
    batch is copied, and its images are gathered by index.
    """

    def __init__(
        self, *args: Any, device: torch.device | None = None, images: Tensor | None = None, **options: Any
    ) -> None:
        self.device, self.images = device, images
        super().__init__(*args, **options, prefetch_factor=PREFETCH_FACTOR if options.get("num_workers") else None)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches: Iterator[Any] = super().__iter__()
        if isinstance(self.dataset, FileBatches):
            # Workers reuse shared memory. One gets its next key when one of its batches is fetched: during the copy it
            # is at most PREFETCH_FACTOR batches ahead. Pinned images are copies.
            batches = (b._replace(images=b.images.clone()) if b.images.is_shared() else b for b in batches)
        if self.device is not None and self.device.type == "cuda":
            batches = prefetch_to_device(batches, self.device)
        if self.images is not None:
            batches = (b._replace(images=gather(self.images, b.indices)) for b in batches)
        yield from batches


def gather(images: Tensor, indices: Tensor) -> Tensor:
    """Return the images at `indices`, int64 (N,); padding (-1) takes the last image, as in ArrayBatches."""
    return images.index_select(0, indices % len(images))


def prefetch_to_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches on a CUDA device; while one is used, the next is copied from pinned memory on a side stream."""
    side_stream = torch.cuda.Stream(device)

    def copy(batch: Batch) -> tuple[Batch, "torch.cuda.Event"]:
        with torch.cuda.stream(side_stream):
            return batch.to(device), side_stream.record_event()

    copies = map(copy, batches)
    ahead = next(copies, None)
    while ahead is not None:
        (batch, copied), ahead = ahead, next(copies, None)
        user_stream = torch.cuda.current_stream(device)
        user_stream.wait_event(copied)
        for tensor in batch:
            tensor.record_stream(user_stream)  # keeps the allocator from reusing memory that is still in use
        yield batch


def ignore_job_signals(worker: int) -> None:
    """Keep a worker alive when its whole job is signalled, as Slurm and terminals do.

    The main process handles the signal: it finishes its step, which needs the workers, and then stops them by SIGTERM.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_from_parent, daemon=True).start()


def _exit_on_sigterm_from_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)

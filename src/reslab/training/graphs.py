"""CUDA graphs: the host starts a whole training step at once, where it would start hundreds of small kernels."""

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from reslab.data.batches import Batch
from reslab.errors import UserError, cause

WARMUP = 3  # steps: they compile and choose kernels, and take the memory that libraries need

Gradients = list[Tensor | None]


class StepGraphs:
    """A training step up to its gradients, replayed as a CUDA graph: one for each shape of a batch.

    The first WARMUP steps of a shape run as usual. All graphs share their memory.

    Args:
        loss: Forward pass and metrics of a batch; returns the loss, ().
        parameters: Those whose gradients are computed.
    """

    def __init__(self, loss: Callable[[Batch], Tensor], parameters: Sequence[nn.Parameter]) -> None:
        self.loss, self.parameters = loss, parameters
        self._graphs: dict[object, tuple[Batch, Callable[[], tuple[Tensor, Gradients]]]] = {}
        self._seen: Counter[object] = Counter()
        self._pool: object = None

    def __call__(self, batch: Batch) -> tuple[Tensor, Gradients | None]:
        """Return the loss and the gradients, which the next step overwrites; no gradients after a usual step."""
        shape = tuple((tensor.shape, tensor.dtype) for tensor in batch)
        if shape not in self._graphs:
            self._seen[shape] += 1
            if self._seen[shape] <= WARMUP:
                return self.loss(batch), None
            inputs = Batch(*(tensor.clone() for tensor in batch))
            self._pool = self._pool or new_pool()
            self._graphs[shape] = inputs, record(lambda: self._loss_and_gradients(inputs), self._pool)
        inputs, replay = self._graphs[shape]
        for old, new in zip(inputs, batch, strict=True):
            old.copy_(new)
        return replay()

    def _loss_and_gradients(self, batch: Batch) -> tuple[Tensor, Gradients]:
        loss = self.loss(batch)
        with torch.autocast(loss.device.type, enabled=False):  # like the usual backward pass
            gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return loss.detach(), [*map(_laid_out_like, self.parameters, gradients)]


def _laid_out_like(parameter: Tensor, gradient: Tensor | None) -> Tensor | None:
    """Return the gradient in its parameter's memory layout, as backward() does: fused optimizers rely on it."""
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def new_pool() -> object:
    return torch.cuda.graph_pool_handle()


def record(function: Callable[[], tuple[Tensor, Gradients]], pool: object) -> Callable[[], tuple[Tensor, Gradients]]:
    """Record the kernels that a function starts, without running them; return what runs them again.

    Raises:
        UserError: The function reads a value from the device, or does something else that no graph can hold.
    """
    graph = torch.cuda.CUDAGraph()
    torch.clear_autocast_cache()  # weights cast by an earlier step would not be cast by the graph
    try:
        # Other threads, such as one that pins memory, may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # type: ignore[arg-type]
            outputs = function()
    except Exception as error:
        raise UserError(
            f"model.execution.cuda_graph: this training step cannot be recorded ({cause(error)}); set it to false"
        ) from error
    finally:
        torch.clear_autocast_cache()

    def replay() -> tuple[Tensor, Gradients]:
        graph.replay()
        return outputs

    return replay

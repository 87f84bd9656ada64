"""Exponential moving average (EMA) of a network's weights."""

import copy

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA(nn.Module):
    """A copy of the network with averaged weights: `a ← d·a + (1 − d)·w` for parameters and running statistics.

    torch's AveragedModel reads its step counter from the device, one sync per step; here the step is a Python integer
    from the trainer. The decay d warms up as min(decay, (1 + t) / (10 + t)), so that short runs do not average over
    their initial weights (as TensorFlow's ExponentialMovingAverage). `decay` is d per optimizer step.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(net).requires_grad_(False).eval()
        self.decay = decay

    def train(self, mode: bool = True) -> "EMA":
        return super().train(False)  # the average is only evaluated

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """Update the average after optimizer step `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        states = (map(_local, module.state_dict().values()) for module in (self.module, net))
        pairs = list(zip(*states, strict=True))
        averaged: list[Tensor] = [a for a, _ in pairs if a.is_floating_point()]
        current: list[Tensor] = [w for a, w in pairs if a.is_floating_point()]
        get_ema_multi_avg_fn(decay)(averaged, current, 0)
        for a, w in pairs:
            if not a.is_floating_point():  # num_batches_tracked
                a.copy_(w)


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a sharded parameter (FSDP2), else the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

"""An exponential moving average of a network's weights, kept beside it."""

import copy

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA(nn.Module):
    """The average `a ← d·a + (1 − d)·w`, of parameters and of the norms' running statistics alike.

    torch's AveragedModel reads its step counter from the device, a sync a step; here the step comes from the
    trainer as a Python integer. The decay d warms up as min(decay, (1 + t) / (10 + t)), so that short runs do
    not average over their initial weights (the rule of TensorFlow's ExponentialMovingAverage).

    Args:
        net: The network to follow; it is copied, the copy is not trained.
        decay: The decay d per optimizer step.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(net).requires_grad_(False).eval()
        self.decay = decay

    def train(self, mode: bool = True) -> "EMA":
        return super().train(False)  # the average is only ever evaluated

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """Moves the average towards `net` after optimizer step number `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        states = (map(_own_part, module.state_dict().values()) for module in (self.module, net))
        pairs = list(zip(*states, strict=True))
        averaged: list[Tensor] = [a for a, _ in pairs if a.is_floating_point()]
        current: list[Tensor] = [w for a, w in pairs if a.is_floating_point()]
        get_ema_multi_avg_fn(decay)(averaged, current, 0)
        for a, w in pairs:
            if not a.is_floating_point():  # num_batches_tracked
                a.copy_(w)


def _own_part(tensor: Tensor) -> Tensor:
    """Of a parameter that is divided among processes (FSDP2) the memory of this one's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

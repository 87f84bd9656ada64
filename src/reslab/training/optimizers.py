"""Parameter groups, and learning-rate schedules as laws of training's progress."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from reslab.models.resnet import ResNet


def parameter_groups(net: ResNet, decay_norm_and_bias: bool, backbone_lr_scale: float = 1.0) -> list[dict[str, Any]]:
    """Splits the parameters that are trained: weight decay leaves norms and biases alone, the backbone may be slower.

    Vectors and scalars are the norms' weights and all biases; weight decay on them costs accuracy without
    regularising anything (He et al. 2019, "Bag of tricks", section 3.1). Each group says in `lr_scale` which share
    of the learning rate is its own; the first group's is 1.
    """
    head = {id(p) for p in net.fc.parameters()}
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for p in net.parameters():
        slower, spared = backbone_lr_scale != 1 and id(p) not in head, p.ndim <= 1 and not decay_norm_and_bias
        if p.requires_grad:
            options = {"weight_decay": 0.0} if spared else {}
            new = {"params": [], "lr_scale": backbone_lr_scale if slower else 1.0, **options}
            groups.setdefault((slower, spared), new)["params"].append(p)
    return [groups[key] for key in sorted(groups)]


class Schedule(ABC):
    """The learning rate's factor at each optimizer step, as a law of the progress 0 … 1 through training.

    Nothing here is counted in steps: `--trainer.max_epochs` stretches the whole schedule.

    Args:
        warmup_epochs: The rate rises linearly over this many epochs, then follows the law.
        warmup_start: The factor that the warm-up starts from.
    """

    def __init__(self, warmup_epochs: float = 0.0, warmup_start: float = 0.0) -> None:
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must not be negative, not {warmup_epochs}")
        self.warmup_epochs = warmup_epochs
        self.warmup_start = warmup_start

    @abstractmethod
    def multiplier(self, progress: float) -> float:
        """The factor at `progress` (0 at the end of the warm-up, 1 at the end of training)."""

    def factor(self, step: int, total_steps: int, steps_per_epoch: float) -> float:
        """The factor of the base rate for the optimizer step number `step` (from 0) of `total_steps`."""
        warmup = min(self.warmup_epochs * steps_per_epoch, total_steps)
        if step < warmup:
            return self.warmup_start + (self.multiplier(0.0) - self.warmup_start) * (step + 1) / warmup
        return self.multiplier(min((step - warmup) / max(total_steps - warmup, 1), 1.0))

    def scheduler(self, optimizer: Optimizer, total_steps: int, steps_per_epoch: float) -> LambdaLR:
        """torch's scheduler of this law, to be stepped once an optimizer step."""
        return LambdaLR(optimizer, lambda step: self.factor(step, total_steps, steps_per_epoch))


class Constant(Schedule):
    """The base rate throughout."""

    def multiplier(self, progress: float) -> float:
        return 1.0


class Decay(Schedule):
    """From the base rate down to a share of it.

    Args:
        final: The factor at the end of training.
    """

    def __init__(self, final: float = 0.0, warmup_epochs: float = 0.0, warmup_start: float = 0.0) -> None:
        super().__init__(warmup_epochs, warmup_start)
        self.final = final


class Cosine(Decay):
    """Half a cosine from 1 to `final` (Loshchilov & Hutter 2017, without restarts)."""

    def multiplier(self, progress: float) -> float:
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


class Linear(Decay):
    """A straight line from 1 to `final` (Li et al. 2020, "Budgeted training")."""

    def multiplier(self, progress: float) -> float:
        return 1 + (self.final - 1) * progress


class OneCycle(Schedule):
    """Up to the base rate and down again, once (Smith & Topin 2018).

    Args:
        peak_at: The progress at which the base rate is reached.
        start: The factor at the first step.
        final: The factor at the end of training.
        shape: The way down: a straight line, or half a cosine.
    """

    def __init__(
        self,
        peak_at: float = 0.25,
        start: float = 0.05,
        final: float = 0.0,
        shape: Literal["linear", "cosine"] = "linear",
    ) -> None:
        super().__init__()
        if not 0 < peak_at < 1:
            raise ValueError(f"peak_at is a share of training and must lie between 0 and 1, not {peak_at}")
        self.peak_at, self.start, self.final, self.shape = peak_at, start, final, shape

    def multiplier(self, progress: float) -> float:
        if progress < self.peak_at:
            return self.start + (1 - self.start) * progress / self.peak_at
        down = (progress - self.peak_at) / (1 - self.peak_at)
        fall = down if self.shape == "linear" else 0.5 * (1 - math.cos(math.pi * down))
        return 1 + (self.final - 1) * fall


class MultiStep(Schedule):
    """The rate is multiplied by `gamma` at each milestone (He et al. 2015, section 4.2: ÷10 at 1/2 and 3/4).

    Args:
        milestones: Shares of training (0 … 1), in rising order.
        gamma: The factor at each milestone.
    """

    def __init__(
        self,
        milestones: Sequence[float] = (0.5, 0.75),
        gamma: float = 0.1,
        warmup_epochs: float = 0.0,
        warmup_start: float = 0.0,
    ) -> None:
        super().__init__(warmup_epochs, warmup_start)
        if list(milestones) != sorted(milestones) or not all(0 < m < 1 for m in milestones):
            raise ValueError(f"milestones are rising shares of training between 0 and 1, not {list(milestones)}")
        self.milestones, self.gamma = list(milestones), gamma

    def factor(self, step: int, total_steps: int, steps_per_epoch: float) -> float:
        # Milestones count from the first step, as in the papers, and not from the end of the warm-up.
        if step < self.warmup_epochs * steps_per_epoch:
            return super().factor(step, total_steps, steps_per_epoch)
        return self.multiplier(step / total_steps)

    def multiplier(self, progress: float) -> float:
        return self.gamma ** sum(progress >= m for m in self.milestones)

"""Parameter groups, and learning-rate schedules as functions of training progress in [0, 1]."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class ParamGroups:
    """Which parameters are trained, at which share of the learning rate, with or without weight decay.

    The first three require a network with the contract of reslab.models.Network.

    Args:
        freeze: Layer groups that stay as they are (stem, stage1, …; `net.layer_groups()` names them): their weights are
            not trained, their norms use the statistics they have.
        backbone_lr_scale: Share of the learning rate for everything but the head.
        layer_decay: Learning-rate multiplier from each layer group to the one before it, counted from the head (Clark
            et al. 2020, ELECTRA; Bao et al. 2021, BEiT): the i-th group from the end learns at layer_decay^i.
        decay_norm_and_bias: Whether weight decay acts on norms and biases too.
        norm_bias_lr_scale: Share of the learning rate for the biases of norms. Their weight decay is divided by it, so
            that each step decays them as before (Jordan 2024, arXiv:2404.00498, section 3.4: 64).
    """

    freeze: list[str] = field(default_factory=list)
    backbone_lr_scale: float = 1.0
    layer_decay: float = 1.0
    decay_norm_and_bias: bool = False
    norm_bias_lr_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("backbone_lr_scale", "layer_decay", "norm_bias_lr_scale"):
            if (scale := getattr(self, name)) <= 0:
                raise ValueError(f"{name} must be more than 0, got {scale}; freeze keeps groups as they are")

    def check(self, net: nn.Module) -> None:
        """Raise ValueError where the network has no such layer groups, or none at all."""
        options = [f.name for f in fields(self)[:3] if getattr(self, f.name) != getattr(ParamGroups(), f.name)]
        if options and not hasattr(net, "layer_groups"):
            wrong = f"{', '.join(options)} requires layer groups, {type(net).__name__} has none"
            raise ValueError(f"param_groups: {wrong}: implement reslab.models.Network, or leave the option out")
        groups = list(net.layer_groups())[:-1] if options else []  # type: ignore[operator]
        if unknown := [group for group in self.freeze if group not in groups]:
            raise ValueError(f"freeze: no layer group is called {', '.join(unknown)}; there are: {', '.join(groups)}")

    def frozen(self, net: nn.Module) -> list[nn.Module | nn.Parameter]:
        """Return the frozen parts of a network: looked up on each call, as SyncBatchNorm replaces modules."""
        groups = net.layer_groups() if self.freeze else {}  # type: ignore[operator]
        return [part for group in self.freeze for part in groups[group]]

    def lr_scales(self, net: nn.Module) -> dict[int, float]:
        """Return the learning-rate multiplier by id of each parameter that differs from 1."""
        scales: dict[int, float] = {}
        by_layer = (self.backbone_lr_scale, self.layer_decay) != (1, 1)
        for depth, parts in enumerate(reversed(net.layer_groups().values()) if by_layer else []):  # type: ignore[operator]
            scale = self.layer_decay**depth * (self.backbone_lr_scale if depth else 1.0)
            for part in parts:
                scales |= {id(p): scale for p in (part.parameters() if isinstance(part, nn.Module) else [part])}
        for bias in norm_biases(net) if self.norm_bias_lr_scale != 1 else []:
            scales[id(bias)] = scales.get(id(bias), 1.0) * self.norm_bias_lr_scale
        return scales


def norm_biases(net: nn.Module) -> list[nn.Parameter]:
    """Return the biases of all norms: of all layers whose weights are a vector, or that have none."""
    layers = [layer for layer in net.modules() if isinstance(getattr(layer, "bias", None), nn.Parameter)]
    return [layer.bias for layer in layers if getattr(getattr(layer, "weight", None), "ndim", 1) == 1]  # type: ignore[misc]


def parameter_groups(net: nn.Module, options: ParamGroups) -> list[dict[str, Any]]:
    """Split the trained parameters into the optimizer's groups: no weight decay for norms and biases, rates by layer.

    Norm weights and biases are the vectors and scalars; weight decay on them costs accuracy without regularising
    anything (He et al. 2019, "Bag of tricks", section 3.1). Each group holds its learning-rate multiplier in
    `lr_scale`, that of the weight decay in `decay_scale`; those of the first group are 1.
    """
    scales = options.lr_scales(net)
    faster = {id(bias) for bias in norm_biases(net)}
    groups: dict[tuple[bool, float, bool, float], dict[str, Any]] = {}
    for p in net.parameters():
        scale, spared = scales.get(id(p), 1.0), p.ndim <= 1 and not options.decay_norm_and_bias
        decay = 1 / options.norm_bias_lr_scale if id(p) in faster else 1.0
        if p.requires_grad:
            new = {"params": [], "lr_scale": scale, "decay_scale": decay, **({"weight_decay": 0.0} if spared else {})}
            groups.setdefault((scale != 1, -scale, spared, decay), new)["params"].append(p)
    return [groups[key] for key in sorted(groups)]


def nesterov_sgd(params: Any) -> Optimizer:
    """SGD as in most CIFAR papers: learning rate 0.1, Nesterov momentum 0.9, weight decay 5e-4."""
    return SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)


class Schedule(ABC):
    """Learning-rate multiplier as a function of training progress in [0, 1].

    Nothing is counted in steps: the whole schedule scales with `trainer.max_epochs`.

    Args:
        warmup_epochs: The multiplier rises linearly over this many epochs, then follows `multiplier`.
        warmup_start: Multiplier at the start of the warm-up.
    """

    def __init__(self, warmup_epochs: float = 0.0, warmup_start: float = 0.0) -> None:
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must be at least 0, got {warmup_epochs}")
        self.warmup_epochs = warmup_epochs
        self.warmup_start = warmup_start

    @abstractmethod
    def multiplier(self, progress: float) -> float:
        """Return the multiplier at `progress` (0: end of the warm-up, 1: end of training)."""

    def factor(self, step: int, total_steps: int, steps_per_epoch: float) -> float:
        """Return the multiplier of the base rate at optimizer step `step` (from 0) of `total_steps`."""
        warmup = min(self.warmup_epochs * steps_per_epoch, total_steps)
        if step < warmup:
            return self.warmup_start + (self.multiplier(0.0) - self.warmup_start) * (step + 1) / warmup
        return self.multiplier(min((step - warmup) / max(total_steps - warmup, 1), 1.0))

    def scheduler(self, optimizer: Optimizer, total_steps: int, steps_per_epoch: float) -> LambdaLR:
        """Return a torch scheduler that follows this schedule; step it once per optimizer step."""
        return LambdaLR(optimizer, lambda step: self.factor(step, total_steps, steps_per_epoch))


class Constant(Schedule):
    """The base learning rate throughout."""

    def multiplier(self, progress: float) -> float:
        return 1.0


class Decay(Schedule):
    """Base class of schedules that fall from the base rate to `final` times it.

    Args:
        final: Multiplier at the end of training.
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
        peak_at: Progress at which the base rate is reached.
        start: Multiplier at the first step.
        final: Multiplier at the end of training.
        shape: Shape of the descent: a straight line or half a cosine.
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
            raise ValueError(f"peak_at is a share of training and must be between 0 and 1, got {peak_at}")
        self.peak_at, self.start, self.final, self.shape = peak_at, start, final, shape

    def multiplier(self, progress: float) -> float:
        if progress < self.peak_at:
            return self.start + (1 - self.start) * progress / self.peak_at
        down = (progress - self.peak_at) / (1 - self.peak_at)
        fall = down if self.shape == "linear" else 0.5 * (1 - math.cos(math.pi * down))
        return 1 + (self.final - 1) * fall


class MultiStep(Schedule):
    """Multiply the rate by `gamma` at each milestone (He et al. 2015, section 4.2: ÷10 at 1/2 and 3/4).

    Args:
        milestones: Shares of training, between 0 and 1, in increasing order.
        gamma: Factor applied at each milestone.
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
            raise ValueError(
                f"milestones must be increasing shares of training between 0 and 1, got {list(milestones)}"
            )
        self.milestones, self.gamma = list(milestones), gamma

    def factor(self, step: int, total_steps: int, steps_per_epoch: float) -> float:
        # As in the papers, milestones count from the first step, not from the end of the warm-up.
        if step < self.warmup_epochs * steps_per_epoch:
            return super().factor(step, total_steps, steps_per_epoch)
        return self.multiplier(step / total_steps)

    def multiplier(self, progress: float) -> float:
        return self.gamma ** sum(progress >= m for m in self.milestones)

"""The LightningModule: a network, its loss, its metrics and its optimizer."""

import math
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import SGD, Optimizer
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from reslab.data.augment import swap_pairs
from reslab.data.batches import Batch
from reslab.data.order import step_seed
from reslab.errors import UserError
from reslab.models.resnet import ResNet
from reslab.models.zoo import load_weights
from reslab.training.ema import EMA
from reslab.training.losses import binary_cross_entropy, cross_entropy
from reslab.training.optimizers import Cosine, Schedule, parameter_groups
from reslab.training.processes import shard

PADDING = -1  # the label of an image that only fills up a batch: it counts nowhere
CHECK_FINITE_EVERY = 100  # steps: the longest that a diverged run trains on


class Diverged(Exception):
    """The training loss is no longer a finite number."""


def nesterov_sgd(params: Any) -> Optimizer:
    """SGD as most CIFAR papers run it: rate 0.1, Nesterov momentum 0.9, weight decay 5e-4."""
    return SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)


def reseed(seed: int, device: torch.device) -> None:
    """Sets torch's generators: no random state is carried from step to step, so none has to be saved to resume.

    torch.manual_seed would do, but where CUDA is not in use it keeps a stack trace a call for later: 3 ms a step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


class EvaluationLoss(Metric):
    """The mean cross-entropy over images, unsmoothed, padding left out; the same to the last bit in any order.

    Losses are added as integers, in units of 2^-24 (float32's step at 1). log_softmax rounds a row by its place in
    the batch; in float64 that is far below the unit.
    """

    total: Tensor
    images: Tensor
    infinite: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "images", "infinite"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        losses = F.cross_entropy(logits.double(), labels, ignore_index=PADDING, reduction="none")
        self.total += (losses * 2**24).round().long().sum()
        self.images += (labels != PADDING).sum()
        self.infinite += (~losses.isfinite()).sum()

    def compute(self) -> Tensor:
        mean = self.total.double() / self.images / 2**24
        return torch.where(self.infinite > 0, torch.nan, mean)


def evaluation_metrics(num_classes: int, prefix: str) -> MetricCollection:
    """Loss, top-1 and top-5 accuracy; micro-averaged: every image counts the same."""
    options: dict[str, Any] = {"num_classes": num_classes, "average": "micro", "ignore_index": PADDING}
    metrics: dict[str, Metric | MetricCollection] = {
        "loss": EvaluationLoss(),
        "acc": MulticlassAccuracy(top_k=1, **options),
        "acc5": MulticlassAccuracy(top_k=min(5, num_classes), **options),
    }
    return MetricCollection(metrics, prefix=prefix, compute_groups=False)


class Classifier(LightningModule):
    """Trains and evaluates a network on batches of (images, labels, indices, …).

    Args:
        net: The network: float images (N, C, H, W) to logits (N, num_classes).
        optimizer: Any of torch.optim, with its settings; the rate given is the one at `base_batch_size`.
        schedule: The law of the learning rate over training.
        loss: Of training: softmax, or binary: each class a yes or no of its own, averaged over the classes too
            (Wightman et al. 2021). Evaluation reports the softmax cross-entropy whichever it is.
        target_threshold: For the binary loss: targets above it become 1, all others 0, so that a mixed image has both
            its classes in full; null keeps their weights as targets.
        label_smoothing: The share of each training label spread over all classes (Szegedy et al. 2016).
        base_batch_size: The batch size that the learning rate is stated for; the rate used is
            lr × batch_size / base_batch_size (Goyal et al. 2017). Without it the rate is used as it stands.
        decay_norm_and_bias: Whether weight decay acts on norms and biases too.
        ema_decay: The decay per step of an exponential moving average of the weights; evaluation uses the
            average. Without it the weights themselves are evaluated.
        flip_tta: Whether evaluation averages the logits of an image and its mirror image.
        weights: Pretrained weights to start from: a name of torchvision's (IMAGENET1K_V2), a file, or a run's folder.
        freeze: LayerFactory of the network that stay as they are, of stem, stage1, stage2 …: their weights are not trained,
            their norms use and keep the statistics they have.
        backbone_lr_scale: The share of the learning rate that all but the head are trained with.
        compile: Whether to run the network through torch.compile.
        channels_last: Whether to keep weights and activations in the channels-last layout.
        seed: The seed of the randomness inside the network (dropout, stochastic depth).
    """

    def __init__(
        self,
        net: ResNet,
        optimizer: OptimizerCallable = nesterov_sgd,
        schedule: Schedule | None = None,
        loss: Literal["softmax", "binary"] = "softmax",
        target_threshold: float | None = None,
        label_smoothing: float = 0.0,
        base_batch_size: int | None = None,
        decay_norm_and_bias: bool = False,
        ema_decay: float | None = None,
        flip_tta: bool = False,
        weights: str | None = None,
        freeze: Sequence[str] = (),
        backbone_lr_scale: float = 1.0,
        compile: bool = False,
        channels_last: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is a share and must lie in [0, 1), not {label_smoothing}")
        if target_threshold is not None and not (loss == "binary" and 0 <= target_threshold < 1):
            raise ValueError(
                f"target_threshold is a share below 1 of the binary loss; not {target_threshold} of {loss}"
            )
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ValueError(f"ema_decay must lie between 0 and 1, not {ema_decay}; null turns the average off")
        if base_batch_size is not None and base_batch_size < 1:
            raise ValueError(f"base_batch_size must be at least 1, not {base_batch_size}")
        if backbone_lr_scale <= 0:
            raise ValueError(
                f"backbone_lr_scale must be more than 0, not {backbone_lr_scale}; freeze keeps parts as is"
            )
        if unknown := [part for part in freeze if part not in list(net.layer_groups())[:-1]]:
            raise ValueError(f"freeze: {', '.join(unknown)} is none of {', '.join(list(net.layer_groups())[:-1])}")
        if net.num_classes == 0:
            raise ValueError("a classifier needs num_classes >= 1: num_classes=0 is the network without its head")
        self.net = net.to(memory_format=torch.channels_last) if channels_last else net
        self.make_optimizer = optimizer
        self.schedule = schedule or Cosine()
        self.loss, self.target_threshold, self.label_smoothing = loss, target_threshold, label_smoothing
        self.base_batch_size = base_batch_size
        self.decay_norm_and_bias = decay_norm_and_bias
        self.ema_decay = ema_decay
        self.ema: EMA | None = None
        self.flip_tta = flip_tta
        self.weights = weights
        self.frozen = list(freeze)
        self.backbone_lr_scale = backbone_lr_scale
        for module in self._frozen_modules():
            module.requires_grad_(False).eval()
        self.compile_net = compile
        self.seed = seed
        self.val_metrics = evaluation_metrics(net.num_classes, "val/")
        self.test_metrics = evaluation_metrics(net.num_classes, "test/")
        self.predictions: dict[str, Tensor] = {}
        self._test_outputs: list[Tensor] = []
        self._window = torch.zeros(2)  # sums of loss and of correct answers since the last logged step …
        self._window_images = 0  # … over this many images
        self.latest: dict[str, float] = {}  # the newest logged values, on the host
        self._unsent = False  # of them, those of training, to callback_metrics

    def setup(self, stage: str) -> None:
        expected = getattr(self.trainer.datamodule, "num_classes", None)  # type: ignore[attr-defined]
        if expected not in (None, self.net.num_classes):
            raise UserError(f"the network has num_classes={self.net.num_classes}, the data have {expected} classes")

    def configure_model(self) -> None:
        if self.weights and self.trainer.state.fn == "fit" and not self.trainer.ckpt_path:
            for message in load_weights(self.net, self.weights):
                self.print(message)
            self.weights = None
        if self.ema_decay is not None and self.ema is None:
            self.ema = EMA(self.net, self.ema_decay)
        if self.device_mesh is not None:
            for net in (self.net, *([self.ema.module] if self.ema else [])):
                shard(net, self.device_mesh)
        if self.compile_net:
            self.net.compile()

    def _frozen_modules(self) -> list[torch.nn.Module]:
        # Looked up each time: converting to SyncBatchNorm puts other modules in their places.
        parts = self.net.layer_groups()
        return [module for part in self.frozen for module in parts[part]]

    def train(self, mode: bool = True) -> Self:
        """As ever, but for the frozen parts, which stay in eval mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, C, H, W); in eval mode by the averaged weights, if there are."""
        if self.training:
            return self.net(images)
        net = self.evaluated_net()
        return (net(images) + net(images.flip(3))) / 2 if self.flip_tta else net(images)

    def evaluated_net(self) -> torch.nn.Module:
        """The network that evaluation uses: the average where there is one, else the trained one."""
        return self.net if self.ema is None else self.ema.module

    @property
    def metric_names(self) -> list[str]:
        """Names of all metrics that a run of this model logs."""
        return ["train/loss", "train/acc", "lr", "images_per_second", *self.val_metrics, *self.test_metrics]

    # Training

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        groups = parameter_groups(self.net, self.decay_norm_and_bias, self.backbone_lr_scale)
        optimizer = self.make_optimizer(groups)
        for group in optimizer.param_groups:
            group["lr"] *= self._lr_scale() * group["lr_scale"]
        self.trainer.fit_loop.setup_data()  # or the number of batches is not known yet where max_steps is given
        total_steps = self.trainer.estimated_stepping_batches
        if math.isinf(total_steps):
            raise UserError("the schedule needs an end: set trainer.max_epochs or trainer.max_steps")
        per_epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        scheduler = self.schedule.scheduler(optimizer, int(total_steps), per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _lr_scale(self) -> float:
        if self.base_batch_size is None:
            return 1.0
        batch_size = getattr(self.trainer.datamodule, "batch_size", None)  # type: ignore[attr-defined]
        if batch_size is None:
            raise UserError("model.base_batch_size needs a datamodule with a batch_size, such as ImageData")
        return batch_size / self.base_batch_size

    def on_train_start(self) -> None:
        self._window = self._window.to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        reseed(step_seed(self.seed, self.trainer.fit_loop.epoch_loop.total_batch_idx, self.global_rank), self.device)
        images, labels = batch[0], batch[1]
        logits = self.net(images)
        mix = getattr(batch, "mix", None)
        own = mix if mix is not None and mix.numel() else None
        loss = self._training_loss(logits, labels, own)
        if own is not None:  # mixed images: accuracy is that on the label of greater weight
            labels = torch.where(own >= 0.5, labels, swap_pairs(labels))
        with torch.no_grad():
            correct = (logits.argmax(1) == labels).sum()
            self._window += torch.stack([loss.detach() * len(images), correct])
        self._window_images += len(images)
        return loss

    def _training_loss(self, logits: Tensor, labels: Tensor, own: Tensor | None) -> Tensor:
        if self.loss == "binary":
            return binary_cross_entropy(logits, labels, own, self.label_smoothing, self.target_threshold)
        return cross_entropy(logits, labels, own, self.label_smoothing)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        step = self.trainer.global_step + 1  # counts this one
        if self.ema is not None:
            self.ema.update(self.net, step)
        if step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._record_window(step)
        elif step % CHECK_FINITE_EVERY == 0:
            self._check_finite(float(self.trainer.strategy.reduce(self._window[0].clone(), reduce_op="sum")), step)

    def _record_window(self, step: int) -> None:
        """Logs the means over the steps since the last call: the one device sync of `log_every_n_steps` steps."""
        lr = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        count = torch.tensor([float(self._window_images)], device=self.device)
        sums = self.trainer.strategy.reduce(torch.cat([self._window, count]), reduce_op="sum")
        loss, correct, images = sums.tolist()
        self._check_finite(loss, step)
        self._send({"train/loss": loss / images, "train/acc": correct / images, "lr": lr}, step)
        self._unsent = True
        self._window.zero_()
        self._window_images = 0

    def _check_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            remedy = "lower the learning rate, warm up longer, or clip gradients"
            raise Diverged(f"the training loss is {loss} at step {step}: {remedy}")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._unsent:  # for monitors and progress bars; loggers have it already
            values = {name: self.latest[name] for name in ("train/loss", "train/acc", "lr")}
            self.log_dict(values, logger=False, prog_bar=True)
            self._unsent = False

    def _send(self, metrics: dict[str, float], step: int) -> None:
        self.latest.update(metrics)
        for logger in self.loggers:
            logger.log_metrics({**metrics, "epoch": self.current_epoch}, step=step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        count = torch.tensor([float(self._window_images)], device=self.device)
        gathered = self.all_gather(torch.cat([self._window.to(self.device), count]))
        windows = torch.as_tensor(gathered).reshape(-1, 3)  # a row a rank
        # No good checkpoint gives way to one of a run that has diverged.
        self._check_finite(float(windows[:, 0].sum()), self.trainer.global_step)
        checkpoint["windows"] = windows.tolist()
        checkpoint["latest"] = self.latest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.latest = dict(checkpoint.get("latest", {}))
        windows = torch.tensor(checkpoint.get("windows", [[0.0, 0.0, 0.0]]))
        if len(windows) != self.trainer.world_size:  # rank 0 goes on from the sums of all
            windows = torch.cat([windows.sum(0, keepdim=True), torch.zeros(self.trainer.world_size - 1, 3)])
        mine = windows[self.global_rank]
        self._window, self._window_images = mine[:2].clone(), int(mine[2])

    # Evaluation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.val_metrics.update(self(batch[0]), batch[1])

    def on_validation_epoch_end(self) -> None:
        self._close(self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        logits = self(batch[0])
        self.test_metrics.update(logits, batch[1])
        if len(batch) > 2:  # our own batches carry the images' indices; other loaders' need not
            self._test_outputs.append(_outcomes(logits, batch[1], batch[2]))

    def on_test_epoch_end(self) -> None:
        self._close(self.test_metrics)
        if self._test_outputs:
            everywhere = self.all_gather(torch.cat(self._test_outputs))
            self.predictions = _by_index(torch.as_tensor(everywhere))
            self._test_outputs = []

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The classes' probabilities (N, num_classes) in float32."""
        return self(batch[0]).float().softmax(1)

    def _close(self, metrics: MetricCollection) -> None:
        values = {name: float(value) for name, value in metrics.compute().items()}
        metrics.reset()
        self.latest.update(values)
        within_fit = self.trainer.state.fn == "fit"
        self.log_dict(values, logger=not within_fit)
        if within_fit and not self.trainer.sanity_checking:  # Lightning would log these a step too early
            self._send(values, self.trainer.global_step)


OUTCOMES = ("index", "label", "prediction", "confidence", "correct_probability")


def _outcomes(logits: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
    """(N, 5) in float64, which holds every index exactly: the columns of OUTCOMES."""
    probabilities = logits.double().softmax(1)
    confidence, prediction = probabilities.max(1)
    correct = probabilities.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.stack([indices.double(), labels.double(), prediction.double(), confidence, correct], dim=1)


def _by_index(outcomes: Tensor) -> dict[str, Tensor]:
    """Drops the padding, sorts by index, and gives each column its name and type; on the CPU."""
    rows = outcomes.reshape(-1, len(OUTCOMES)).cpu()  # (ranks, N, 5) -> (ranks · N, 5)
    rows = rows[rows[:, 0] >= 0]
    rows = rows[rows[:, 0].argsort()]
    columns = dict(zip(OUTCOMES, rows.unbind(1), strict=True))
    return {name: c.long() if name in OUTCOMES[:3] else c.float() for name, c in columns.items()}

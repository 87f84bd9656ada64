"""Classifier, the LightningModule: the training and evaluation loops around a network and an objective."""

import math
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from reslab.data.batches import Batch
from reslab.data.order import step_seed
from reslab.errors import UserError
from reslab.models.network import Network
from reslab.models.zoo import build_network_of_run, check_state, load_weights
from reslab.training import lightning_internals as internals
from reslab.training.ema import EMA
from reslab.training.graphs import Gradients, StepGraphs
from reslab.training.objectives import CrossEntropy, Objective
from reslab.training.optimizers import Cosine, ParamGroups, Schedule, nesterov_sgd, parameter_groups
from reslab.training.processes import shard

SHAPES = 64  # of training batches: the most that torch.compile compiles before it gives up
CHECK_FINITE_EVERY = 100  # steps: the longest that a diverged run trains on


class Diverged(Exception):
    """The training loss is no longer a finite number."""


@dataclass(frozen=True)
class Execution:
    """How the network is executed. This affects speed and rounding, not the method.

    Args:
        compile: Train through torch.compile; evaluation is not compiled. true: its default mode. reduce-overhead and
            max-autotune also replay CUDA graphs. The modes with max-autotune time several kernels and take the fastest,
            so that two runs may differ in their last bits.
        channels_last: Keep weights and activations in the channels-last memory format.
        fused_optimizer: Update all weights in one kernel, with SGD, Adam and AdamW of torch.optim; other optimizers
            stay as they are.
        cuda_graph: On a GPU, with ImageData, replay each training step, from the forward pass to the gradients, as one
            CUDA graph: for networks whose kernels are shorter than the time that the host takes to start them. What
            a network or objective decides in Python is then decided once, not in every step.
    """

    compile: bool | Literal["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = False
    channels_last: bool = True
    fused_optimizer: bool = False
    cuda_graph: bool = False

    def check(self, trainer: Trainer) -> None:
        """Raise a UserError for CUDA graphs that the trainer's settings would break.

        The next run of a graph overwrites its gradients, so they cannot be accumulated: some versions of torch fail,
        others return wrong gradients (pytorch/pytorch issues 169545 and 96693).
        """
        accumulate = trainer.accumulate_grad_batches
        compiled = self.compile in ("reduce-overhead", "max-autotune")
        if accumulate > 1 and compiled:
            raise UserError(
                f"model.execution.compile {self.compile} uses CUDA graphs, which trainer.accumulate_grad_batches "
                f"{accumulate} would break: use true or max-autotune-no-cudagraphs"
            )
        problems = {
            f"model.execution.compile {self.compile}, which has CUDA graphs already": compiled,
            f"trainer.accumulate_grad_batches {accumulate}": accumulate > 1,
            f"trainer.precision {trainer.precision}, which scales gradients": trainer.precision == "16-mixed",
            f"{trainer.world_size} processes": trainer.world_size > 1,
        }
        wrong = [problem for problem, is_one in problems.items() if is_one]
        if self.cuda_graph and wrong:
            raise UserError(f"model.execution.cuda_graph cannot be combined with {wrong[0]}: set it to false")

    def compile_network(self, net: nn.Module) -> None:
        """Compile a network in place, so that its weights keep their names.

        Each shape has its own graph: with dynamic shapes, a graph would depend on the shapes before it, and a resumed
        run would not have the same bits.
        """
        from torch._dynamo import config  # slow to import

        config.recompile_limit = max(config.recompile_limit, SHAPES)
        net.compile(mode=self.compile if isinstance(self.compile, str) else None, dynamic=False)

    def eager(self) -> AbstractContextManager[Any]:
        """Return a context without compilation, for evaluation: `reslab test` repeats its results exactly.

        Validation and test have last batches of other sizes, and each size would take as long to compile as training.
        """
        return torch.compiler.set_stance("force_eager") if self.compile else nullcontext()

    def fuse(self, optimizer: Optimizer) -> None:
        """Let an optimizer update all of its parameters in one kernel; AdamW is an Adam."""
        if self.fused_optimizer and isinstance(optimizer, SGD | Adam):
            for group in optimizer.param_groups:
                group.update(fused=True, foreach=False)


def reseed(seed: int, device: torch.device) -> None:
    """Seed torch's generators. Done in every step, so that no random state has to be saved to resume.

    torch.manual_seed is avoided: where CUDA is not in use, it stores a stack trace per call (3 ms per step).
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


class Classifier(LightningModule):
    """Train and evaluate a network on batches of (images, labels, …).

    A Trainer accepts it with any DataModule or loader of normalized float images. ImageData normalizes in a hook of
    the DataModule: pass `datamodule=data`, not its loaders.

    Args:
        net: Float images (N, C, H, W) to logits (N, num_classes). From Python any nn.Module will do; freezing and
            learning rates by layer require the contract of reslab.models.Network.
        weights: Pretrained weights to start from: a file, a run directory, `hf://OWNER/NAME[@REVISION][/FILE]` on the
            Hugging Face Hub, or a torchvision name (IMAGENET1K_V2).
        objective: Loss and metrics; default: CrossEntropy.
        optimizer: Any class of torch.optim with its arguments; its rate is the one at `base_batch_size`.
        schedule: Learning-rate multiplier over training; default: Cosine.
        base_batch_size: Batch size for which the learning rate is stated; the rate used is
            lr × batch_size / base_batch_size (Goyal et al. 2017). null: the rate is used unchanged.
        param_groups: Which parameters are trained, and how.
        ema_decay: Decay per step of an exponential moving average of the weights, used by evaluation. null: off.
        flip_tta: In evaluation, average the logits of each image and its mirror image.
        shift_tta: In evaluation, give half of the weight to the image shifted by this many pixels along the diagonal,
            up and down, with its border reflected (Jordan 2024, arXiv:2404.00498, section 3.5). 0: off.
        execution: Compilation and memory format.

    Attributes:
        seed: Seed of the randomness inside the network (dropout, stochastic depth); default: that of seed_everything.
        latest: The newest value of every metric, on the host.
        predictions: One row per test image after a test, see OUTCOMES.
    """

    def __init__(
        self,
        net: Network,
        weights: str | None = None,
        objective: Objective | None = None,
        optimizer: OptimizerCallable = nesterov_sgd,
        schedule: Schedule | None = None,
        base_batch_size: int | None = None,
        param_groups: ParamGroups = ParamGroups(),  # noqa: B008 - frozen
        ema_decay: float | None = None,
        flip_tta: bool = False,
        shift_tta: int = 0,
        execution: Execution = Execution(),
    ) -> None:
        super().__init__()
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ValueError(f"ema_decay must be between 0 and 1, got {ema_decay}; null turns the average off")
        if base_batch_size is not None and base_batch_size < 1:
            raise ValueError(f"base_batch_size must be at least 1, got {base_batch_size}")
        if shift_tta < 0:
            raise ValueError(f"shift_tta must be at least 0 pixels, got {shift_tta}")
        if getattr(net, "num_classes", None) == 0:
            raise ValueError("num_classes must be at least 1, got 0: that is a network without a head")
        param_groups.check(net)
        self.net: nn.Module = net.to(memory_format=torch.channels_last) if execution.channels_last else net
        self.weights = weights
        self.objective = objective or CrossEntropy()
        self.make_optimizer, self.schedule = optimizer, schedule or Cosine()
        self.base_batch_size, self.param_groups = base_batch_size, param_groups
        self.ema_decay, self.execution = ema_decay, execution
        self.flip_tta, self.shift_tta = flip_tta, shift_tta
        self.ema: EMA | None = None
        self.seed: int | None = None
        self.latest: dict[str, float] = {}
        self.predictions: dict[str, Tensor] = {}
        self._metrics: Any = nn.ModuleDict()  # by split, made when the number of classes is known
        self._test_outputs: list[Tensor] = []
        # Sums of the objective's training metrics since the last logged step, over so many images.
        self._window = torch.zeros(len(self.objective.training_metrics))
        self._window_images = 0
        self._graphs: StepGraphs | None = None
        self._gradients: Gradients | None = None  # of a step that a CUDA graph has run
        for part in param_groups.frozen(net):
            part.requires_grad_(False)
        self.train()

    @property
    def metric_names(self) -> list[str]:
        """Names of everything a run of this model logs."""
        names = self.objective.metric_names(getattr(self.net, "num_classes", 2))
        training = len(self.objective.training_metrics)
        return [*names[:training], "lr", "images_per_second", *names[training:]]

    def setup(self, stage: str) -> None:
        self.execution.check(self.trainer)
        expected = getattr(self.trainer.datamodule, "num_classes", None)  # type: ignore[attr-defined]
        num_classes = getattr(self.net, "num_classes", expected)
        if expected not in (None, num_classes):
            raise UserError(f"the network has num_classes={num_classes}, the data have {expected} classes")

    def configure_model(self) -> None:
        if internals.is_attached(self):  # otherwise a checkpoint is loaded next
            self.load_pretrained()
            if self.trainer.state.fn == "fit":
                self._initialize()
                self.objective.prepare(self.net)
        if self.ema_decay is not None and self.ema is None:
            self.ema = EMA(self.net, self.ema_decay)
        if self.device_mesh is not None:
            for net in (self.net, *([self.ema.module] if self.ema else [])):
                shard(net, self.device_mesh)
        if self.execution.compile:
            self.execution.compile_network(self.net)

    def load_pretrained(self) -> None:
        """Load `weights` now, once. Otherwise a Trainer or the first use does it."""
        if self.weights is not None:
            for message in load_weights(self.net, self.weights):
                (self.print if internals.is_attached(self) else print)(message)
            self.expect_weights()

    def expect_weights(self) -> None:
        """Skip `weights` and `Network.initialize`: the network has its weights, or a checkpoint is loaded next."""
        self.weights = None
        self.net.init_images = 0  # type: ignore[assignment]

    def _initialize(self) -> None:
        """Let a network that asks for training images set its first weights."""
        count: int = getattr(self.net, "init_images", 0)  # type: ignore[assignment]
        if count:
            data: Any = self.trainer.datamodule if internals.is_attached(self) else None  # type: ignore[attr-defined]
            if not hasattr(data, "unaugmented_images"):
                raise UserError(
                    f"{type(self.net).__name__} sets its first weights from training images, which only ImageData "
                    "provides: pass datamodule=ImageData(...), or call initialize(images) and set init_images = 0"
                )
            self.net.initialize(data.unaugmented_images(count))  # type: ignore[operator]
            self.expect_weights()

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all modules, except frozen layer groups: they stay in eval mode."""
        super().train(mode)
        for part in self.param_groups.frozen(self.net):
            if isinstance(part, nn.Module):
                part.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, num_classes) of images (N, C, H, W); in eval mode with the averaged weights, if any."""
        _check_images(images, self.net)
        self.load_pretrained()
        if self.training:
            return self.net(images)
        with self.execution.eager():
            logits = self._evaluate(images)
            if self.shift_tta:
                shift, (height, width) = self.shift_tta, images.shape[2:]
                padded = F.pad(images, (shift,) * 4, "reflect")
                corners = padded[..., :height, :width], padded[..., 2 * shift :, 2 * shift :]
                logits = logits / 2 + sum(map(self._evaluate, corners)) / 4
            return logits

    def _evaluate(self, images: Tensor) -> Tensor:
        net = self.evaluated_net()
        return (net(images) + net(images.flip(3))) / 2 if self.flip_tta else net(images)

    def evaluated_net(self) -> nn.Module:
        """Return the network that evaluation uses: the EMA where there is one, else the trained network."""
        return self.net if self.ema is None else self.ema.module

    # Training

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        batch_size = getattr(self.trainer.datamodule, "batch_size", None)  # type: ignore[attr-defined]
        if self.base_batch_size is not None and batch_size is None:
            raise UserError("model.base_batch_size requires a datamodule with a batch_size, such as ImageData")
        lr_scale = batch_size / self.base_batch_size if batch_size and self.base_batch_size else 1.0
        optimizer = self.make_optimizer(parameter_groups(self.net, self.param_groups))
        self.execution.fuse(optimizer)
        for group in optimizer.param_groups:
            group["lr"] *= lr_scale * group["lr_scale"]
            if "weight_decay" in group:
                group["weight_decay"] *= group["decay_scale"]
        internals.set_up_data(self.trainer)
        total_steps = self.trainer.estimated_stepping_batches
        if math.isinf(total_steps):
            raise UserError("the schedule requires an end of training: set trainer.max_epochs or trainer.max_steps")
        scheduler = self.schedule.scheduler(optimizer, int(total_steps), internals.steps_per_epoch(self.trainer))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        if self.seed is None:
            self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        self._window = self._window.to(self.device)
        if self.execution.cuda_graph and self.device.type == "cuda":
            self._graphs = StepGraphs(self._training_loss, [p for p in self.net.parameters() if p.requires_grad])

    def on_train_end(self) -> None:
        self._graphs = None  # frees their memory

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        _check_images(_images(batch, labelled=True), self.net)
        if internals.is_attached(self):
            index = internals.micro_batch_index(self.trainer)
        else:  # a loop of the user's own
            index = batch_idx
            self.load_pretrained()
            self._initialize()
            self.objective.prepare(self.net)
        reseed(step_seed(self.seed or 0, index, self.global_rank), self.device)
        self._window_images += len(batch[1])
        if self._graphs is None or not isinstance(batch, Batch):
            return self._training_loss(batch)
        loss, self._gradients = self._graphs(batch)
        return loss

    def _training_loss(self, batch: Batch) -> Tensor:
        """Return the loss, (), and add to the training metrics."""
        loss, logits = self.objective.loss(self.net, batch)
        with torch.no_grad():
            sums = self.objective.training_sums(loss.detach(), logits, batch)
            self._window += torch.stack([sums[name].float() for name in self.objective.training_metrics])
        return loss

    def optimizer_zero_grad(self, *args: Any, **kwargs: Any) -> None:
        if self._gradients is None:
            super().optimizer_zero_grad(*args, **kwargs)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self._graphs is None or self._gradients is None:
            super().backward(loss, *args, **kwargs)
        else:
            for parameter, gradient in zip(self._graphs.parameters, self._gradients, strict=True):
                parameter.grad = gradient
            self._gradients = None

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        step = self.trainer.global_step + 1  # counts this one
        if self.ema is not None:
            self.ema.update(self.net, step)
        if internals.is_logged_step(self.trainer, step):
            self._log_window(step)
        elif step % CHECK_FINITE_EVERY == 0:
            self._check_finite(self.trainer.strategy.reduce(self._window.clone(), reduce_op="sum").tolist(), step)

    def _log_window(self, step: int) -> None:
        """Log means since the last logged step. This is the only device sync between two logged steps."""
        count = torch.tensor([float(self._window_images)], device=self.device)
        sums = self.trainer.strategy.reduce(torch.cat([self._window, count]), reduce_op="sum")
        *sums, images = sums.tolist()
        self._check_finite(sums, step)
        means = {f"train/{name}": s / images for name, s in zip(self.objective.training_metrics, sums, strict=True)}
        lr = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        self.latest.update({**means, "lr": lr})
        internals.publish(self.trainer, {**means, "lr": lr})
        self._window.zero_()
        self._window_images = 0

    def _check_finite(self, sums: list[float], step: int) -> None:
        if not all(map(math.isfinite, sums)):
            values = dict(zip(self.objective.training_metrics, sums, strict=True))
            name, value = next((name, value) for name, value in values.items() if not math.isfinite(value))
            remedy = "lower the learning rate, warm up longer, or clip gradients"
            raise Diverged(f"the training {name} is {value} at step {step}: {remedy}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        count = torch.tensor([float(self._window_images)], device=self.device)
        gathered = self.all_gather(torch.cat([self._window.to(self.device), count]))
        windows = torch.as_tensor(gathered).reshape(-1, len(self._window) + 1)  # one row per rank
        # A good checkpoint must not be replaced by one of a run that has diverged.
        self._check_finite(windows[:, :-1].sum(0).tolist(), self.trainer.global_step)
        checkpoint["windows"] = windows.tolist()
        checkpoint["latest"] = self.latest
        # Arguments on which evaluation depends, for load_from_checkpoint.
        checkpoint["hyper_parameters"] = {name: getattr(self, name) for name in ("ema_decay", "flip_tta", "shift_tta")}

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        **kwargs: Any,
    ) -> Self:
        """Return the model in a checkpoint, with its EMA if it has one. No code in the file is run.

        Args:
            checkpoint_path: last.ckpt or best.ckpt of a run.
            map_location, hparams_file, strict, weights_only: As in Lightning.
            kwargs: Arguments of Classifier. `net` is required unless the checkpoint is in its run directory and the
                network's class is one of reslab. To continue training pass the optimizer, schedule and objective.

        Raises:
            UserError: An argument is missing (the message names it), or the network does not fit.
        """
        if "net" not in kwargs:
            kwargs["net"] = _net_of(checkpoint_path)
        options = {"hparams_file": hparams_file, "strict": strict, "weights_only": weights_only}
        return super().load_from_checkpoint(checkpoint_path, map_location, **options, **kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.expect_weights()
        if internals.is_attached(self) and self.trainer.precision == "64-true":
            self.double()  # Lightning converts only after loading, which would round the weights
        if "state_dict" in checkpoint:  # a strategy that shards the network has loaded its weights already
            self._match_state(checkpoint)
        self.latest = dict(checkpoint.get("latest", {}))
        if internals.is_attached(self):
            self._restore_window(checkpoint)

    def _match_state(self, checkpoint: dict[str, Any]) -> None:
        """Check the network's weights, and make the EMA of both sides agree."""
        state = checkpoint["state_dict"]
        trained = {key.removeprefix("net."): value for key, value in state.items() if key.startswith("net.")}
        check_state(self.net, trained, "the checkpoint")
        unknown = [key for key in state if key.startswith("objective.") and key not in self.state_dict()]
        if unknown:
            name = type(self.objective).__name__
            raise UserError(f"the checkpoint has {', '.join(unknown)}, which {name} lacks: pass its objective=")
        averaged = any(key.startswith("ema.") for key in state)
        if averaged and self.ema is None:
            self.ema_decay = checkpoint.get("hyper_parameters", {}).get("ema_decay")
            if self.ema_decay is None:
                raise UserError("the checkpoint has an EMA, but does not state its decay: pass ema_decay=")
            self.ema = EMA(self.net, self.ema_decay)
        elif self.ema is not None and not averaged:  # the average starts here
            state.update({f"ema.module.{key}": value.clone() for key, value in trained.items()})

    def _restore_window(self, checkpoint: dict[str, Any]) -> None:
        windows = torch.tensor(checkpoint.get("windows", [[0.0] * (len(self._window) + 1)]))
        if len(windows) != self.trainer.world_size:  # another world size: rank 0 takes over the sums of all ranks
            none = torch.zeros(self.trainer.world_size - 1, windows.shape[1])
            windows = torch.cat([windows.sum(0, keepdim=True), none])
        mine = windows[self.global_rank]
        self._window, self._window_images = mine[:-1].clone(), int(mine[-1])

    # Evaluation

    def _update_metrics(self, split: str, logits: Tensor, labels: Tensor) -> None:
        if split not in self._metrics:
            self._metrics[split] = nn.ModuleDict(self.objective.evaluation_metrics(logits.shape[1])).to(self.device)
        for metric in self._metrics[split].values():
            metric.update(logits, labels)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._update_metrics("val", self(_images(batch, labelled=True)), batch[1])

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        logits = self(_images(batch, labelled=True))
        self._update_metrics("test", logits, batch[1])
        if isinstance(batch, Batch):  # those of other loaders need not hold the images' indices
            self._test_outputs.append(_outcomes(logits, batch[1], batch[2]))

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")
        if self._test_outputs:
            everywhere = self.all_gather(torch.cat(self._test_outputs))
            self.predictions = _by_index(torch.as_tensor(everywhere))
            self._test_outputs = []

    def predict_step(self, batch: Batch | Tensor, batch_idx: int = 0) -> Tensor:
        """Return class probabilities (N, num_classes) in float32; `batch` may also be the images alone."""
        return self(_images(batch)).float().softmax(1)

    def _log_evaluation(self, split: str) -> None:
        metrics = self._metrics[split]
        values = {f"{split}/{name}": float(metric.compute()) for name, metric in metrics.items()}
        for metric in metrics.values():
            metric.reset()
        self.latest.update(values)
        # float64: log_dict would round plain numbers to float32.
        self.log_dict({name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()})


def _images(batch: Any, labelled: bool = False) -> Any:
    """Return the images of a batch (images, labels, …), or a batch of nothing else."""
    if isinstance(batch, Tensor) and not labelled:
        return batch
    if isinstance(batch, tuple | list) and len(batch) > labelled:
        return batch[0]
    size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
    raise UserError(f"a batch must be a tuple (images, labels, ...), got a {type(batch).__name__}{size}")


def _check_images(images: Any, net: nn.Module) -> None:
    """Raise a UserError for images that no hook has normalized, and for another number of channels."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise UserError(
            f"images must be normalized floats (N, C, H, W), got {kind}. Loaders of ImageData give uint8 images: "
            "pass datamodule=data instead of the loader, or call data.on_after_batch_transfer(batch) in your own loop"
        )
    if isinstance(net, Network) and images.ndim == 4 and images.shape[1] != net.in_channels:
        raise UserError(f"images must be (N, C, H, W) with C = {net.in_channels}, got {tuple(images.shape)}")


def _net_of(checkpoint_path: Any) -> nn.Module:
    """Build the network of the run directory that a checkpoint is in."""
    remedy = "pass net= with the checkpoint's network"
    try:
        run = Path(checkpoint_path).parents[1]
    except (TypeError, IndexError):
        raise UserError(f"load_from_checkpoint does not know the network: {remedy}") from None
    if not (run / "config.yaml").is_file():
        raise UserError(f"{checkpoint_path} is not in a run directory (RUN/checkpoints/last.ckpt): {remedy}")
    try:
        return build_network_of_run(run)
    except UserError as error:
        raise UserError(f"{error}: {remedy}") from None


OUTCOMES = ("index", "label", "prediction", "confidence", "correct_probability")


def _outcomes(logits: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
    """Return the columns of OUTCOMES, (N, 5) in float64, which holds every index exactly."""
    probabilities = logits.double().softmax(1)
    confidence, prediction = probabilities.max(1)
    correct = probabilities.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.stack([indices.double(), labels.double(), prediction.double(), confidence, correct], dim=1)


def _by_index(outcomes: Tensor) -> dict[str, Tensor]:
    """Drop padding, sort by index, and return each column under its name and type, on the CPU."""
    rows = outcomes.reshape(-1, len(OUTCOMES)).cpu()  # (ranks, N, 5) -> (ranks · N, 5)
    rows = rows[rows[:, 0] >= 0]
    rows = rows[rows[:, 0].argsort()]
    columns = dict(zip(OUTCOMES, rows.unbind(1), strict=True))
    return {name: c.long() if name in OUTCOMES[:3] else c.float() for name, c in columns.items()}

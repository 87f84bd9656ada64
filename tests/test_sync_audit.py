"""Between two logged steps, training never waits for the device.

Real runs, built as `reslab fit` builds them, take their steps on torch's meta device. Its tensors have no values, so
whatever would read one fails, as does every copy to the host; everything else runs as it does on a GPU. `Audit` adds
the copies from the host that a GPU would wait for. Autocast ignores the meta device: bf16-mixed is audited on the CPU.
The tests marked gpu take the same steps under torch.cuda.set_sync_debug_mode("error").
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reslab import create_model
from reslab.config import Experiment
from reslab.data import Batch
from reslab.experiment import Run
from reslab.runs.folder import RunFolder
from reslab.training import Classifier
from runner import DIGITS

aten = torch.ops.aten
READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # .item(), equal, nonzero, unique, ...
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}  # read masks only
WARMUP = 1  # step: constants are copied to the device once


class Waits(Exception):
    """An operator would wait for the device."""


class Audit(TorchDispatchMode):
    """While `active`, raise Waits for operators that read a tensor of `device` or copy between it and the host."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.active, self.operators = device, False, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.active:
            return func(*args, **kwargs)
        self.operators += 1
        inputs = _tensors((args, kwargs))
        if _reads(func, [x for x in inputs if x.device.type == self.device]):
            raise Waits(f"{func} reads a tensor of the device")
        output = func(*args, **kwargs)
        if self.device != "cpu" and _copies(func, inputs, _tensors(output), kwargs):
            raise Waits(f"{func} copies between host and device")
        return output


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _reads(func: Any, inputs: list[Tensor]) -> bool:
    if func in INDEXING:
        return any(x.dtype in (torch.bool, torch.uint8) for x in inputs[1:])
    return bool(inputs and READS & {*func.tags})


def _copies(func: Any, inputs: list[Tensor], outputs: list[Tensor], kwargs: dict[str, Any]) -> bool:
    if func is aten.lift_fresh.default:  # torch.tensor(VALUES, device=...)
        return inputs[0].device.type != "cpu"
    if func in (aten._to_copy.default, aten.copy_.default):
        return not kwargs.get("non_blocking") and len({x.device for x in (*inputs, *outputs)}) > 1
    # Scalars of the host are passed to the kernel; other tensors of the host are copied first.
    return len({x.device for x in inputs if x.ndim or x.device.type != "cpu"}) > 1


class CudaAudit(contextlib.nullcontext):  # type: ignore[type-arg]
    """While `active`, CUDA raises an error for each synchronization."""

    @property
    def active(self) -> bool:
        return torch.cuda.get_sync_debug_mode() == 2

    @active.setter
    def active(self, active: bool) -> None:
        torch.cuda.set_sync_debug_mode("error" if active else "default")


class EnoughSteps(Exception):
    pass


class Steps(Callback):
    """Audit the steps from WARMUP on; stop after `count` of them."""

    def __init__(self, audit: Audit | CudaAudit, count: int) -> None:
        self.audit, self.last = audit, WARMUP + count

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.last:
            raise EnoughSteps
        self.audit.active = trainer.global_step >= WARMUP

    def on_exception(self, *args: Any) -> None:
        self.audit.active = False


def take_steps(folder: Path, options: list[str], audit: Audit | CudaAudit, count: int = 2) -> None:
    """Take `count` audited steps of a run; the first step that is logged would be step 80."""
    argv = [*DIGITS, "--data.batch_size=16", "--trainer.log_every_n_steps=80", "--model.net.layers=[1, 1]", *options]
    experiment = Experiment(argv)
    data, model, settings = experiment.build()
    run = Run(experiment, RunFolder(folder), argv, data, model, settings)
    trainer = run._trainer()
    trainer.callbacks.append(Steps(audit, count))  # type: ignore[attr-defined]
    run._rehearse(trainer)
    if isinstance(audit, Audit):
        _move(trainer, audit.device)
    with pytest.raises(EnoughSteps), audit:
        trainer.fit(model, datamodule=data)
    if isinstance(audit, Audit):
        assert audit.operators > 100 * count


def _with(teacher: Path, options: list[str]) -> list[str]:
    return [option.replace("=TEACHER", f"={teacher}") for option in options]


def _move(trainer: Any, device: str) -> None:
    """Let the trainer use a device that Lightning does not know."""
    trainer.strategy._root_device = torch.device(device)
    trainer.accelerator.setup_device = lambda device: None
    trainer.strategy.teardown = lambda: None  # it would copy the network to the host


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the meta device behave like CUDA where torch and reslab ask for its name."""
    devices = lambda: ["cuda", "meta"]  # noqa: E731
    for module in ("torch.utils._foreach_utils", "torch.optim.optimizer", "torch.optim.swa_utils"):
        monkeypatch.setattr(sys.modules[module], "_get_foreach_kernels_supported_devices", devices)
    # Batches arrive in pinned memory: their copies are asynchronous, see prefetch_to_device.
    copy = lambda batch, device: Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))  # noqa: E731
    monkeypatch.setattr(Batch, "to", copy)
    # Before training, Lightning adds up the number of batches on the device.
    for loop in ("fit_loop", "evaluation_loop"):
        monkeypatch.setattr(f"lightning.pytorch.loops.{loop}.has_len_all_ranks", lambda *args, **kwargs: True)


@pytest.fixture(autouse=True)
def not_deterministic() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save(create_model("resnet8", in_channels=1, num_classes=10).state_dict(), path)
    return path


MIXING = ["--data.augment.mixup=0.2", "--data.augment.cutmix=1.0"]
AUGMENT = ["--data.augment.flip=random", "--data.augment.cutout=2", "--data.augment.erasing=0.5", *MIXING]
BCE = ["--model.objective=BinaryCrossEntropy"]
DISTILLATION = ["--model.objective=Distillation", "--model.objective.teacher=resnet8"]
DISTILLATION += ["--model.objective.weights=TEACHER"]
EMA = ["--model.ema_decay=0.9"]
NORM = ["--trainer.gradient_clip_val=1.0"]
BF16 = ["--trainer.precision=bf16-mixed"]
WARMUP_EPOCH = ["--model.schedule=Cosine", "--model.schedule.warmup_epochs=1"]
EVERYTHING = [*AUGMENT, *DISTILLATION, *EMA, *NORM, *WARMUP_EPOCH, "--trainer.callbacks=LearningRateMonitor"]
FINETUNING = ["--model.param_groups={freeze: [stem], backbone_lr_scale: 0.1, layer_decay: 0.9}"]
SPEEDNET = "--model.net={class_path: SpeedNet, init_args: {widths: [8, 16]}}"
COMBINATIONS = {
    "cross entropy": [],
    "mixed": [*AUGMENT, "--model.schedule=Constant"],
    "flips, no crop": ["--data.augment.flip=alternating", "--data.augment.crop_padding=0", *WARMUP_EPOCH],
    "crops by reflection": ["--data.augment.padding_mode=reflect", "--model.schedule=Linear"],
    "mixed binary cross entropy": [*AUGMENT, *BCE, *EMA],
    "threshold": [*MIXING, *BCE, "--model.objective.target_threshold=0.2", "--model.base_batch_size=64"],
    "distillation": DISTILLATION,
    "mixed distillation": [*MIXING, *DISTILLATION],
    "EMA": [*EMA, "--model.schedule=MultiStep"],
    "clipped by norm": [*NORM, *FINETUNING],
    "clipped by value": [*NORM, "--trainer.gradient_clip_algorithm=value"],
    "accumulation": ["--trainer.accumulate_grad_batches=2", *MIXING, *EMA, *NORM],
    "double precision": ["--trainer.precision=64-true", "--model.execution.channels_last=false"],
    "deterministic": ["--trainer.deterministic=true"],
    "stochastic depth, blur": ["--model.net.drop_path=0.2", "--model.net.blur=true"],
    "network of timm": ["--model.net=timm", "--model.net.dict_kwargs={drop_rate: 0.1, drop_path_rate: 0.1}", *EMA],
    "network of torchvision": ["--model.net=torchvision", "--model.net.name=resnet18", *NORM],
    "SpeedNet": [SPEEDNET, "--model.param_groups={decay_norm_and_bias: true, norm_bias_lr_scale: 64}"],
    "ViT": ["--model.net=timm", "--model.net.name=test_vit", "--model.net.dict_kwargs={patch_size: 4}"],
}
OPTIMIZERS = [
    *(f"torch.optim.{name}" for name in ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta")),
    "torch.optim.RMSprop", "torch.optim.Rprop", "timm.optim.Lamb",
]  # fmt: skip
WAITING = ["torch.optim.ASGD", "torch.optim.Adafactor"]  # they read a number of each parameter
REFUSED = ["torch.optim.LBFGS", "torch.optim.Muon", "torch.optim.SparseAdam"]  # by reslab


@pytest.mark.usefixtures("like_a_gpu")
def test_fifty_steps_with_everything_do_not_wait(teacher: Path, tmp_path: Path) -> None:
    take_steps(tmp_path, _with(teacher, EVERYTHING), Audit("meta"), 50)


@pytest.mark.usefixtures("like_a_gpu")
@pytest.mark.parametrize("name", COMBINATIONS)
def test_steps_do_not_wait(name: str, teacher: Path, tmp_path: Path) -> None:
    take_steps(tmp_path, _with(teacher, COMBINATIONS[name]), Audit("meta"))


@pytest.mark.parametrize("options", [[], [*MIXING, *EMA, *NORM, "--trainer.accumulate_grad_batches=2"]])
def test_steps_in_bf16_do_not_wait(options: list[str], tmp_path: Path) -> None:
    take_steps(tmp_path, [*BF16, *options], Audit("cpu"))


@pytest.mark.usefixtures("like_a_gpu")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_do_not_wait(name: str, tmp_path: Path) -> None:
    take_steps(tmp_path, [f"--model.optimizer={name}"], Audit("meta"))


@pytest.mark.usefixtures("like_a_gpu")
@pytest.mark.parametrize("name", WAITING)
def test_two_optimizers_of_torch_wait(name: str, tmp_path: Path) -> None:
    """docs/performance.md names them."""
    with pytest.raises(RuntimeError, match="item"):
        take_steps(tmp_path, [f"--model.optimizer={name}"], Audit("meta"))


def test_every_optimizer_of_torch_is_audited() -> None:
    classes = [value for value in vars(torch.optim).values() if isinstance(value, type)]
    names = {f"torch.optim.{c.__name__}" for c in classes if issubclass(c, torch.optim.Optimizer)}
    assert names - {"torch.optim.Optimizer"} == {*OPTIMIZERS, *WAITING, *REFUSED} - {"timm.optim.Lamb"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["everything", "everything, CUDA graphs", *COMBINATIONS])
def test_steps_on_a_gpu_do_not_wait(name: str, teacher: Path, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    options = _with(teacher, COMBINATIONS.get(name, [*EVERYTHING, *BF16]))
    options += ["--model.execution.cuda_graph=true"] if "graphs" in name else []
    take_steps(tmp_path, [*options, "--trainer.accelerator=cuda"], CudaAudit(), 50)


VECTOR, HOST = torch.ones(4, device="meta"), torch.ones(4)
WAITS: dict[str, Callable[[], Any]] = {
    "item": lambda: VECTOR.sum().item(),
    "bool": lambda: bool(VECTOR.sum()),
    "float": lambda: float(VECTOR.sum()),
    "isfinite": lambda: math.isfinite(VECTOR.sum()),
    "range": lambda: range(VECTOR.long().sum()),
    "tolist": lambda: VECTOR.tolist(),
    "numpy": lambda: VECTOR.numpy(),
    "cpu": lambda: VECTOR.cpu(),
    "to the host": lambda: HOST.copy_(VECTOR),
    "to the device": lambda: HOST.to("meta"),
    "into a tensor of the device": lambda: VECTOR.copy_(HOST),
    "new tensor": lambda: torch.tensor([1.0, 2.0], device="meta"),
    "new tensor from a number": lambda: torch.as_tensor(1.0, device="meta"),
    "list as an index": lambda: VECTOR[[0, 1]],
    "index on the host": lambda: VECTOR[torch.tensor([0, 1])],
    "mask as an index": lambda: VECTOR[VECTOR > 0],
    "masked_select": lambda: VECTOR.masked_select(VECTOR > 0),
    "masked assignment": lambda: VECTOR.index_put_([VECTOR > 0], VECTOR),
    "nonzero": lambda: VECTOR.nonzero(),
    "unique": lambda: VECTOR.unique(),
    "equal": lambda: torch.equal(VECTOR, VECTOR),
    "allclose": lambda: torch.allclose(VECTOR, VECTOR),
    "is_nonzero": lambda: torch.is_nonzero(VECTOR.sum()),
    "one_hot without a size": lambda: torch.nn.functional.one_hot(VECTOR.long()),
    "repeat_interleave": lambda: torch.repeat_interleave(VECTOR, VECTOR.long()),
}
RUNS_AHEAD: dict[str, Callable[[], Any]] = {
    "arithmetic with a number": lambda: VECTOR * 2.0,
    "arithmetic with a scalar of the host": lambda: VECTOR * torch.tensor(2.0),
    "asynchronous copy": lambda: HOST.to("meta", non_blocking=True),
    "item of the host": lambda: HOST.sum().item(),
    "mask on the host": lambda: HOST[HOST > 0],
    "index": lambda: VECTOR[VECTOR.long()],
    "cast": lambda: VECTOR.double().half(),
    "where": lambda: torch.where(VECTOR > 0, VECTOR, 0.0),
    "full": lambda: torch.full((3,), 2.0, device="meta"),
    "masked_fill": lambda: VECTOR.masked_fill(VECTOR > 0, 0.0),
    "one_hot": lambda: torch.nn.functional.one_hot(VECTOR.long(), 10),
}


@pytest.mark.parametrize("name", WAITS)
def test_audit_finds(name: str) -> None:
    audit = Audit("meta")
    audit.active = True
    with audit, pytest.raises((Waits, RuntimeError, TypeError)):
        WAITS[name]()


@pytest.mark.parametrize("name", RUNS_AHEAD)
def test_audit_lets_pass(name: str) -> None:
    audit = Audit("meta")
    audit.active = True
    with audit:
        RUNS_AHEAD[name]()


@pytest.mark.usefixtures("like_a_gpu")
@pytest.mark.parametrize("wait", [Tensor.item, lambda loss: torch.tensor(1.0, device=loss.device)])
def test_audit_sees_the_training_step(wait: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Classifier.training_step

    def waiting(self: Classifier, *args: Any) -> Tensor:
        loss = original(self, *args)
        wait(loss)
        return loss

    monkeypatch.setattr(Classifier, "training_step", waiting)
    with pytest.raises((Waits, RuntimeError)):
        take_steps(tmp_path, [], Audit("meta"))

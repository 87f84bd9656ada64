"""model.execution.cuda_graph: training steps replayed as CUDA graphs give the bits of usual steps.

Without a GPU, `pretend` stands in for a graph: each replay runs the step on the graph's own inputs, and overwrites the
results of the last one. The tests marked gpu compare real graphs with usual steps on a GPU.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from reslab.config import Experiment
from reslab.data import Batch
from reslab.errors import UserError
from reslab.experiment import Run
from reslab.runs.folder import RunFolder
from reslab.training import Execution, graphs
from reslab.training.graphs import WARMUP, StepGraphs
from runner import DIGITS, TRAINING, Fault, fit, traces
from test_sync_audit import BF16, COMBINATIONS, EVERYTHING, _with, teacher  # noqa: F401 - a fixture

DETERMINISTIC = ["--trainer.deterministic=true", "--trainer.benchmark=false"]


def pretend(function: Callable[[], Any], pool: object) -> Callable[[], Any]:
    results: list[Any] = []

    def replay() -> Any:
        new = function()
        if not results:
            results.append(new)
        for old, tensor in zip(tree_leaves(results[0]), tree_leaves(new), strict=True):
            if old is not None:
                old.copy_(tensor)
        return results[0]

    return replay


class UseGraphs(Callback):
    """Use graphs on a CPU."""

    def on_train_start(self, trainer: Trainer, model: Any) -> None:
        model._graphs = StepGraphs(model._training_loss, [p for p in model.net.parameters() if p.requires_grad])


def trained(folder: Path, options: list[str], *callbacks: Callback) -> dict[str, Tensor]:
    """Train the digits for one epoch, 10 steps; return weights, training metrics and the number of graphs."""
    folder.mkdir()
    argv = [*DIGITS, "--data.batch_size=128", "--trainer.max_epochs=1", "--model.net.layers=[1, 1]", *options]
    experiment = Experiment(argv)
    data, model, settings = experiment.build()
    run = Run(experiment, RunFolder(folder), argv, data, model, settings)
    trainer = run._trainer()
    trainer.callbacks.extend(callbacks)  # type: ignore[attr-defined]
    count: list[int] = []
    end = model.on_train_end
    model.on_train_end = lambda: (count.append(len(model._graphs._graphs) if model._graphs else 0), end())  # type: ignore
    run._rehearse(trainer)
    trainer.fit(model, datamodule=data)
    state = {key: value.cpu() for key, value in model.state_dict().items()}
    return {**state, "graphs": torch.tensor(count), "latest": torch.tensor(list(model.latest.values()))}


def assert_same_bits(usual: dict[str, Tensor], replayed: dict[str, Tensor]) -> None:
    assert usual.pop("graphs").tolist() == [0] and replayed.pop("graphs").tolist() == [1]
    assert usual.keys() == replayed.keys()
    different = [key for key in usual if not torch.equal(usual[key], replayed[key])]
    assert not different


@pytest.fixture(autouse=True)
def not_deterministic() -> Any:
    yield
    torch.use_deterministic_algorithms(False)


NAMES = [name for name in COMBINATIONS if name != "accumulation"]  # is refused
QUICK = [name for name in NAMES if not name.startswith("network of")]


@pytest.mark.parametrize("name", ["everything", *QUICK])
def test_replayed_steps_have_the_bits_of_usual_ones(
    name: str,
    teacher: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graphs, "record", pretend)
    monkeypatch.setattr(graphs, "new_pool", object)
    options = _with(teacher, COMBINATIONS.get(name, [*EVERYTHING, *BF16]))
    assert_same_bits(trained(tmp_path / "a", options), trained(tmp_path / "b", options, UseGraphs()))


COMPILED = ["everything", "cross entropy", "SpeedNet", "network of timm"]  # takes long


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile, in torch
@pytest.mark.parametrize(
    ("name", "compile"), [*((name, False) for name in ["everything", *NAMES]), *((name, True) for name in COMPILED)]
)
def test_graphs_have_the_bits_of_usual_steps_on_a_gpu(
    name: str,
    compile: bool,
    teacher: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    options = [*_with(teacher, COMBINATIONS.get(name, [*EVERYTHING, *BF16])), "--trainer.accelerator=cuda"]
    options += [*DETERMINISTIC, f"--model.execution.compile={str(compile).lower()}"]
    replayed = trained(tmp_path / "b", [*options, "--model.execution.cuda_graph=true"])
    assert_same_bits(trained(tmp_path / "a", options), replayed)


def test_each_shape_has_its_own_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[object] = []

    def record(function: Callable[[], Any], pool: object) -> Callable[[], Any]:
        recorded.append(pool)
        return pretend(function, pool)

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "new_pool", object)
    weight = nn.Parameter(torch.ones(()))
    steps = StepGraphs(lambda batch: (batch.images * weight).sum(), [weight])
    for i in range(WARMUP + 4):
        for n in (2, 3):
            images = torch.full((n,), float(i))
            loss, gradients = steps(Batch(images, images.long(), images.long(), images.int()))
            assert loss == n * i
            assert (gradients is None) == (i < WARMUP)
            if gradients is not None:
                assert gradients[0] == n * i and not loss.requires_grad
    assert len(recorded) == 2 and len({id(pool) for pool in recorded}) == 1


def test_gradients_have_the_memory_layout_of_their_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "record", pretend)
    monkeypatch.setattr(graphs, "new_pool", object)
    weight, factors = nn.Parameter(torch.ones(2, 3)), torch.arange(6.0).view(3, 2)
    steps = StepGraphs(lambda batch: (weight.t() * factors).sum(), [weight])
    for _ in range(WARMUP + 1):
        _, gradients = steps(Batch(*[torch.zeros(2)] * 4))
    assert gradients is not None and gradients[0] is not None
    assert torch.equal(gradients[0], factors.t()) and gradients[0].stride() == weight.stride() != factors.t().stride()


@pytest.mark.gpu
@pytest.mark.parametrize("config", ["gpu", "gpu_fast"])
def test_a_killed_run_on_a_gpu_resumes_with_the_same_bits(config: str, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    options = ["--config", config, "--config", "deterministic", "--trainer.accelerator=gpu", "--trainer.max_epochs=2"]
    assert fit(tmp_path / "killed", *options, fault=Fault(TRAINING, call=24)).status != 0
    for folder in ("killed", "whole"):
        ended = fit(tmp_path / folder, *options)
        assert ended.status == 0, ended.output
    assert traces(tmp_path / "killed") == traces(tmp_path / "whole")


REFUSED = {
    "accumulate_grad_batches 2": {"accumulate_grad_batches": 2},
    "2 processes": {"devices": 2, "strategy": "ddp"},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_settings_that_would_break_graphs_are_refused(reason: str) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **REFUSED[reason])
    with pytest.raises(UserError, match=f"cuda_graph cannot be combined with .*{reason}"):
        Execution(cuda_graph=True).check(trainer)
    Execution().check(trainer)


def test_graphs_of_torch_compile_are_refused_beside_them(tmp_path: Path) -> None:
    options = ["--model.execution.cuda_graph=true", "--model.execution.compile=reduce-overhead"]
    ended = fit(tmp_path / "run", *options)
    assert ended.status == 2 and "cuda_graph cannot be combined with" in ended.output, ended.output
    assert not (tmp_path / "run").exists()

"""configs/trainer/gpu_fast.yaml, on a CPU: compiled training, fused optimizers, and what CUDA graphs cannot do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from torch import nn

from reslab.errors import UserError
from reslab.training.classifier import Execution
from runner import TRAINING, Fault, fit, manifest, metrics, reslab, traces
from test_networks import NETWORKS

FAST = ["--config", "gpu_fast", "--trainer.accelerator=cpu"]
GRAPHS = ["reduce-overhead", "max-autotune"]


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fast")
    ended = fit(folder, *FAST, "--trainer.max_epochs=2")
    assert ended.status == 0, ended.output
    return folder


@pytest.mark.slow
def test_compiled_network_trains_and_keeps_its_names(fast: Path) -> None:
    first, *_, last = metrics(fast)
    assert float(last["train/loss"]) < 0.7 * float(first["train/loss"]) and manifest(fast)["results"]["test/acc"] > 0.7
    from reslab.training.checkpoint import read_checkpoint

    names = [*load_file(fast / "weights.safetensors"), *read_checkpoint(fast / "checkpoints/last.ckpt")["state_dict"]]
    assert not [name for name in names if "_orig_mod" in name]


@pytest.mark.slow
def test_compiled_run_resumes_with_the_same_bits(fast: Path, tmp_path: Path) -> None:
    options = [*FAST, "--trainer.max_epochs=2"]
    assert fit(tmp_path, *options, fault=Fault(TRAINING, call=24)).status != 0
    ended = fit(tmp_path, *options)
    assert ended.status == 0, ended.output
    assert traces(tmp_path) == traces(fast)


@pytest.mark.slow
def test_evaluation_is_not_compiled(fast: Path) -> None:
    results = manifest(fast)["results"]
    ended = reslab("test", fast, "--model.execution.compile=false")
    assert ended.status == 0, ended.output
    for name in ("test/loss", "test/acc"):
        assert f"{name} {results[name]:.6f}" in ended.output


@pytest.mark.slow
def test_each_shape_is_compiled_for_itself() -> None:
    from torch._dynamo.utils import counters

    net, execution = nn.Linear(4, 2), Execution(compile=True)
    execution.compile_network(net)
    before = counters["stats"]["unique_graphs"]
    for _ in range(2):
        for n in range(2, 12):  # more shapes than the 8 that torch compiles by default
            net(torch.ones(n, 4))
    assert counters["stats"]["unique_graphs"] - before == 10
    with execution.eager():
        net(torch.ones(99, 4))
    assert counters["stats"]["unique_graphs"] - before == 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile, in torch
@pytest.mark.parametrize("name", ["resnet8", "speednet"])
def test_compiled_networks_have_the_gradients_of_eager_ones_in_bf16(name: str) -> None:
    """Some operators do not: the backward pass of amax divides by zero."""
    torch.manual_seed(0)
    net = NETWORKS[name](num_classes=10)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    if hasattr(net, "initialize"):
        net.initialize(images)
    parameters = [p for p in net.parameters() if p.requires_grad]

    def gradient() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(net(images), labels)
        return torch.cat([gradient.flatten().float() for gradient in torch.autograd.grad(loss, parameters)])

    eager = gradient()
    Execution(compile=True).compile_network(net)
    compiled = gradient()
    assert torch.nn.functional.cosine_similarity(eager, compiled, dim=0) > 0.9


@pytest.mark.parametrize("mode", GRAPHS)
def test_cuda_graphs_and_accumulated_gradients_are_refused(tmp_path: Path, mode: str) -> None:
    options = [f"--model.execution.compile={mode}", "--trainer.accumulate_grad_batches=2"]
    ended = fit(tmp_path / "run", *options)
    assert ended.status == 2 and f"model.execution.compile {mode} uses CUDA graphs" in ended.output, ended.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", [False, True, "max-autotune-no-cudagraphs", *GRAPHS])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_modes_that_accumulate(mode: Any, accumulate: int) -> None:
    trainer = Trainer(accelerator="cpu", accumulate_grad_batches=accumulate, logger=False, enable_checkpointing=False)
    if accumulate > 1 and mode in GRAPHS:
        with pytest.raises(UserError, match=r"trainer\.accumulate_grad_batches 2"):
            Execution(compile=mode).check(trainer)
    else:
        Execution(compile=mode).check(trainer)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "SGD, foreach": lambda p: torch.optim.SGD(p, lr=0.1, foreach=True),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_fused_optimizer_updates_alike_and_resumes(make: Any) -> None:
    def steps(execution: Execution, resume: bool = False) -> torch.Tensor:
        p = nn.Parameter(torch.linspace(-1, 1, 7))
        optimizer = make([p])
        execution.fuse(optimizer)
        for i in range(6):
            if resume and i == 3:
                state = optimizer.state_dict()
                optimizer = make([p])
                execution.fuse(optimizer)
                optimizer.load_state_dict(state)
            p.grad = (p * (i + 1)).detach().sin()
            optimizer.step()
        assert all(bool(group["fused"]) == execution.fused_optimizer for group in optimizer.param_groups)
        return p.detach()

    plain, fused = steps(Execution()), steps(Execution(fused_optimizer=True))
    torch.testing.assert_close(plain, fused, rtol=1e-5, atol=1e-6)
    assert torch.equal(steps(Execution(fused_optimizer=True), resume=True), fused)


@pytest.mark.parametrize("name", ["RMSprop", "NAdam", "Adagrad", "Adadelta"])
def test_optimizers_without_a_fused_kernel_stay(name: str) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = getattr(torch.optim, name)([p])
    before = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    Execution(fused_optimizer=True).fuse(optimizer)
    assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == before


def test_fused_optimizer_is_used_and_is_part_of_the_identity(tmp_path: Path) -> None:
    ended = fit(tmp_path, "--model.execution.fused_optimizer=true", fault=Fault(TRAINING, call=9))
    assert ended.status != 0
    from reslab.training.checkpoint import read_checkpoint

    [state] = read_checkpoint(tmp_path / "checkpoints/last.ckpt")["optimizer_states"]
    assert all(group["fused"] and not group["foreach"] for group in state["param_groups"])
    ended = fit(tmp_path)
    assert ended.status == 2 and "model.execution.fused_optimizer" in ended.output, ended.output

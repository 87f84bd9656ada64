"""A network layer by layer: output shapes, parameters, and the arithmetic of one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from reslab.models import ModelError
from reslab.models.resnet import ResNet

CONVENTION = (
    "Counted: a forward pass; a multiply-add is 1 MAC and 2 FLOPs; convolutions and the head.\n"
    "Not counted: norms, biases, activations, additions, pooling."
)


class Layer(NamedTuple):
    name: str  # as in the state dict: layer1.0.conv1
    kind: str
    output: tuple[int, ...]  # without the batch: (C, H, W)
    parameters: int
    flops: int


@dataclass(frozen=True)
class Summary:
    """The layers in the order in which they run; as text, a table."""

    rows: list[Layer]
    input_size: tuple[int, ...]

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def flops(self) -> int:
        return sum(row.flops for row in self.rows)

    @property
    def macs(self) -> int:
        return self.flops // 2

    def __str__(self) -> str:
        rows = [
            ("layer", "kind", "output", "parameters", "FLOPs"),
            *((r.name, r.kind, "×".join(map(str, r.output)), f"{r.parameters:,}", f"{r.flops:,}") for r in self.rows),
            ("total", "", "", f"{self.parameters:,}", f"{self.flops:,}"),
        ]
        a, b, c, d, e = (max(map(len, column)) for column in zip(*rows, strict=True))
        header, *layers, total = (
            f"{name:<{a}}  {kind:<{b}}  {output:>{c}}  {parameters:>{d}}  {flops:>{e}}"
            for name, kind, output, parameters, flops in rows
        )
        rule = "─" * len(header)
        cost = f"{self.macs / 1e9:.3g} GMACs = {self.flops / 1e9:.3g} GFLOPs"
        size = "×".join(map(str, self.input_size))
        in_words = f"{self.parameters:,} parameters; {cost} for an image of {size}"
        return "\n".join([header, rule, *layers, rule, total, "", in_words, CONVENTION])


def summarize(net: ResNet, input_size: Sequence[int] = (3, 224, 224)) -> Summary:
    """What each layer gives out, holds and costs for images of input_size (C, H, W).

    Nothing is computed (it runs on the meta device) and the network is left as it is. Layers that have
    neither parameters nor a new shape (activations, identities) have no row.

    Raises:
        ModelError: (a ValueError) The network does not take such images.
    """
    size = tuple(input_size)
    if len(size) != 3 or size[0] != net.in_channels or min(size) < 1:
        raise ModelError(f"input {size} is not (C, H, W) with C = {net.in_channels}, as the network takes")
    leaves = {name: module for name, module in net.named_modules() if not list(module.children())}
    parameters = {name: sum(p.numel() for p in module.parameters()) for name, module in leaves.items()}
    outputs: dict[str, tuple[int, ...]] = {}

    def remember(name: str, _: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if parameters[name] or output.shape != inputs[0].shape:
            outputs[name] = tuple(output.shape[1:])

    hooks = [module.register_forward_hook(partial(remember, name)) for name, module in leaves.items()]
    # Two images: in training mode batch norm refuses a single one whose last stage is 1×1.
    images = torch.empty(2, *size, device="meta")
    state = {name: value.to("meta") for name, value in net.state_dict().items()}
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            torch.func.functional_call(net, state, (images,))
    finally:
        for hook in hooks:
            hook.remove()
    counts = counter.get_flop_counts()
    flops = {name: sum(counts.get(f"{type(net).__name__}.{name}", {}).values()) // 2 for name in outputs}
    rows = [
        Layer(name, type(leaves[name]).__name__, output, parameters[name], flops[name])
        for name, output in outputs.items()
    ]
    return Summary(rows, size)

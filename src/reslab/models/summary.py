"""A network layer by layer: output shapes, parameters, and the cost of one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from reslab.models import ModelError

CONVENTION = (
    "Counted: one forward pass; a multiply-add is 1 MAC and 2 FLOPs; convolutions, linear layers, attention.\n"
    "Not counted: norms, biases, activations, additions, pooling."
)

Shape = tuple[int, ...]  # without the batch: (C, H, W)


class Layer(NamedTuple):
    name: str  # as in the state dict: layer1.0.conv1
    kind: str
    output: Shape
    parameters: int
    flops: int


@dataclass(frozen=True)
class Summary:
    """The layers in the order in which they run; printed as a table."""

    rows: list[Layer]
    input_size: Shape
    parameters: int
    flops: int

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
        header, *layers, total = (f"{v:<{a}}  {w:<{b}}  {x:>{c}}  {y:>{d}}  {z:>{e}}" for v, w, x, y, z in rows)
        rule = "─" * len(header)
        cost = f"{self.macs / 1e9:.3g} GMACs = {self.flops / 1e9:.3g} GFLOPs"
        in_words = f"{self.parameters:,} parameters; {cost} for an image of {'×'.join(map(str, self.input_size))}"
        return "\n".join([header, rule, *layers, rule, total, "", in_words, CONVENTION])


def summarize(net: nn.Module, input_size: Sequence[int] = (3, 224, 224)) -> Summary:
    """Return the output shape, parameters and cost of each layer for images of input_size (C, H, W).

    Nothing is computed (it runs on the meta device), and the network is not changed. Layers without parameters that
    keep the shape (activations, identities) are left out. Parameters and operations outside of layers are in the row of
    the module that has them.

    Raises:
        ModelError: (a ValueError) The network does not accept such images.
    """
    size, channels = tuple(input_size), getattr(net, "in_channels", None)
    if len(size) != 3 or min(size) < 1 or channels not in (None, size[0]):
        raise ModelError(f"input size must be (C, H, W) with C = {channels or 'the number of channels'}, got {size}")
    shapes, flops = _run(net, size)
    modules = dict(net.named_modules())
    parameters = dict.fromkeys(shapes, 0)
    for name, module in modules.items():
        while name not in shapes:  # a layer that its parent runs without calling it, as attention does
            name = name.rpartition(".")[0]
        parameters[name] += sum(p.numel() for p in module.parameters(recurse=False))
    rows = []
    for name, (before, after) in shapes.items():
        children = [f"{name}.{child}".lstrip(".") for child, _ in modules[name].named_children()]
        cost = flops[name] - sum(flops.get(child, 0) for child in children)
        if parameters[name] or cost or (not children and before != after):
            rows.append(Layer(name or "(network)", type(modules[name]).__name__, after, parameters[name], cost))
    return Summary(rows, size, sum(row.parameters for row in rows), sum(row.flops for row in rows))


def _run(net: nn.Module, size: Shape) -> tuple[dict[str, tuple[Shape, Shape]], dict[str, int]]:
    """Return each module's input and output shape, in the order in which they finish, and its FLOPs for one image."""
    names = {module: name for name, module in net.named_modules()}
    shapes: dict[str, tuple[Shape, Shape]] = {}

    def remember(module: nn.Module, inputs: Any, output: Any) -> None:
        if module in names:
            shapes[names[module]] = _shape(inputs), _shape(output)

    # Two images: in training mode batch norm refuses a single one whose last stage is 1×1.
    images = torch.empty(2, *size, device="meta")
    state = {name: value.to("meta") for name, value in [*net.named_parameters(), *net.named_buffers()]}
    counter = FlopCounterMode(display=False)
    try:
        with register_module_forward_hook(remember), counter, torch.no_grad():
            torch.func.functional_call(net, state, (images,))
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        raise ModelError(f"{type(net).__name__} does not accept images of {size}: {error}") from error
    counts, root = counter.get_flop_counts(), type(net).__name__
    return shapes, {name: sum(counts.get(f"{root}.{name}".rstrip("."), {}).values()) // 2 for name in names.values()}


def _shape(values: Any) -> Shape:
    """Return the shape of the first tensor without the batch; () if there is none."""
    while isinstance(values, tuple | list) and values:
        values = values[0]
    return tuple(values.shape[1:]) if isinstance(values, Tensor) else ()

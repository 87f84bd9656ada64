"""The contract of a backbone: what training, fine-tuning, sharding and export need to know about a network."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from reslab.models import ModelError

# Modules by these names only hold layers; layer_groups() and blocks() look inside them.
CONTAINERS = {"model", "backbone", "trunk", "trunk_output", "encoder", "features", "stages", "blocks", "layers"}


class Network(nn.Module, ABC):
    """An image classifier: (N, in_channels, H, W) -> (N, num_classes).

    A network of your own is one class and one config file that names it:

        class TinyNet(Network):
            def __init__(self, width: int = 16, in_channels: int = 3, num_classes: int = 10) -> None:
                super().__init__()
                self.in_channels, self.num_classes, self.num_features = in_channels, num_classes, 2 * width
                self.stem = nn.Conv2d(in_channels, width, 3, stride=2)
                self.stage1 = nn.Sequential(nn.ReLU(), nn.Conv2d(width, 2 * width, 3, stride=2), nn.ReLU())
                self.head = nn.Linear(self.num_features, num_classes)

            def forward_features(self, x: Tensor) -> Tensor:
                return self.stage1(self.stem(x)).mean((2, 3))

    Attributes:
        in_channels: Channels of the images.
        num_classes: Outputs of the head; 0 if there is no head (an `nn.Identity`).
        num_features: Inputs of the head.
        head: The layer that maps features to logits: an attribute or a property.
        init_images: Number of training images that `initialize` needs; 0: it is not called.
    """

    in_channels: int
    num_classes: int
    num_features: int
    head: nn.Module
    init_images: int = 0

    @abstractmethod
    def forward_features(self, x: Tensor) -> Tensor:
        """Return the inputs of the head: (N, in_channels, H, W) -> (N, num_features)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))

    def initialize(self, images: Tensor) -> None:
        """Set initial weights that depend on the data; called once, before training from scratch.

        Args:
            images: `init_images` training images without augmentation, normalized: float32 (N, in_channels, H, W).
        """

    def layer_groups(self) -> dict[str, list[nn.Module | nn.Parameter]]:
        """Return all layers by name, ordered from input to output; the last group is the head.

        Every parameter is in exactly one group. Override this if your layers are not registered in the order in
        which they run, or to give the groups better names. By default each child is a group, and each layer inside
        a child that is named in `CONTAINERS`. Parameters outside of these layers belong to the first group.
        """
        groups: dict[str, list[nn.Module | nn.Parameter]] = {}
        loose: list[nn.Module | nn.Parameter] = []
        for name, layer in _layers(self, {*self.head.modules()}):
            if isinstance(layer, nn.Parameter):
                loose.append(layer)
            else:  # layers that share parameters are in one group
                shared = [group for group in groups if not params([layer]).isdisjoint(params(groups[group]))]
                merged = [old for group in shared for old in groups.pop(group)]
                short = name.removeprefix("model.")
                groups[[*shared, name if short == "head" else short][0]] = [*merged, layer]
        if loose:
            first = next(iter(groups), "stem")
            groups[first] = [*loose, *groups.get(first, [])]
        return {**groups, "head": [self.head]}

    def blocks(self) -> list[nn.Module]:
        """Return the units of FSDP2 sharding: disjoint modules, each gathered as a whole when it runs.

        By default these are the repeated modules inside the groups between the first one and the head.
        """
        blocks: list[nn.Module] = []
        for group in list(self.layer_groups().values())[1:-1]:
            for block in (unit for layer in group if isinstance(layer, nn.Module) for unit in _units(layer)):
                if params([block]).isdisjoint(params(blocks)):
                    blocks.append(block)
        return blocks


def params(layers: Iterable[nn.Module | nn.Parameter]) -> set[nn.Parameter]:
    """Return all parameters in the layers."""
    return {p for layer in layers for p in (layer.parameters() if isinstance(layer, nn.Module) else [layer])}


def _layers(
    parent: nn.Module, head: set[nn.Module], prefix: str = ""
) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
    """Yield the layers below `parent` that have weights or buffers, except the head, and parameters outside of them."""
    yield from ((prefix + name, p) for name, p in parent.named_parameters(recurse=False))
    for name, child in parent.named_children():
        if child in head or not child.state_dict():
            continue
        if name in CONTAINERS or not head.isdisjoint(child.modules()):
            yield from _layers(child, head, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of a stage, or the module itself if it is one block."""
    is_list = type(module) in (nn.Sequential, nn.ModuleList)
    inside = [child for name, child in module.named_children() if is_list or name in CONTAINERS]
    if type(module) is nn.ModuleList or any(next(child.children(), None) is not None for child in inside):
        for child in inside:
            yield from _units(child)
    # Sharding vectors alone (a norm) costs more collectives than it saves memory.
    elif any(p.ndim > 1 for p in module.parameters()):
        yield module


def check_network(net: nn.Module) -> None:
    """Check that a module keeps the contract of `Network`.

    Raises:
        ModelError: The message lists everything that is missing or wrong.
    """
    kinds: dict[str, Any] = {"in_channels": int, "num_classes": int, "num_features": int, "head": nn.Module}
    kinds |= {"forward_features": Callable, "layer_groups": Callable, "blocks": Callable}
    unfit = [name for name, kind in kinds.items() if not isinstance(getattr(net, name, None), kind)]
    wrong = [f"{name} must be a {kinds[name].__name__}" for name in unfit]
    wrong = wrong or list(_layer_errors(net))  # type: ignore[arg-type]
    if wrong:
        raise ModelError(f"{type(net).__name__} is not a complete reslab.models.Network: {'; '.join(wrong)}")


def _layer_errors(net: Network) -> Iterator[str]:
    groups = [params(group) for group in net.layer_groups().values()]
    count = Counter(p for group in groups for p in group)
    misplaced = [f"{name} is in {count[p]}" for name, p in net.named_parameters() if count[p] != 1]
    if misplaced:
        yield f"each parameter must be in one group of layer_groups(): {', '.join(misplaced[:3])}"
    if not groups or not params([net.head]) <= groups[-1]:
        yield "the last group of layer_groups() must hold the head"
    if max(Counter(p for block in net.blocks() for p in block.parameters()).values(), default=1) > 1:
        yield "blocks() must be disjoint"

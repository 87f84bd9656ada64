"""What the networks of timm and torchvision have in common."""

from torch import Tensor, nn

from reslab.models.network import Network


class LibraryNetwork(Network):
    """A classifier of another library: held as `model`, and run as it is.

    In the state dict, the library's keys have the prefix `model.`; `load_weights` adds and removes it.

    Args:
        model: Maps images to logits.
        heads: One module that ends with the layer that gives the logits, or several whose outputs the model averages.
        in_channels: Channels of the images.
        num_classes: Outputs of the model; 0 if it returns features.
    """

    def __init__(self, model: nn.Module, heads: list[nn.Module], in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.in_channels, self.num_classes = in_channels, num_classes
        self.model = model
        # Some heads begin with a norm or a pooling.
        heads = [[head, *(m for m in head.modules() if isinstance(m, nn.Linear | nn.Conv2d))][-1] for head in heads]
        # Names, not modules: a module may be replaced (SyncBatchNorm, FSDP2).
        self._head_names = [name for name, module in model.named_modules() if any(module is head for head in heads)]
        inputs = getattr(heads[0], "in_features", None) or getattr(heads[0], "in_channels", None)
        self.num_features = int(inputs or getattr(model, "head_hidden_size", model.num_features))  # type: ignore[arg-type]

    @property
    def head(self) -> nn.Module:  # type: ignore[override]
        heads = [self.model.get_submodule(name) for name in self._head_names]
        return heads[0] if len(heads) == 1 else nn.ModuleList(heads)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the inputs of the head: (N, in_channels, H, W) -> (N, num_features).

        The head of a few models is a convolution. Then a feature is the mean over the positions.
        """
        features: list[Tensor] = []
        first = self.model.get_submodule(self._head_names[0])
        with first.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0])):
            self.model(x)
        return features[0].mean((2, 3)) if features[0].ndim == 4 else features[0]

    def convert_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a published state dict by the keys (and for the image size) of this version of the library."""
        return state

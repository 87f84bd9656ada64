"""Training losses, also of images that are mixed in pairs."""

import torch.nn.functional as F
from torch import Tensor

from reslab.data.augment import swap_pairs


def cross_entropy(logits: Tensor, labels: Tensor, own: Tensor | None, smoothing: float) -> Tensor:
    """The mean cross-entropy over images.

    Args:
        logits: (N, num_classes).
        labels: int64 (N,).
        own: The weight (), of the images' own labels, the rest being that of `swap_pairs(labels)`; None: not mixed.
        smoothing: The share of each label spread over all classes (Szegedy et al. 2016).
    """
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    if own is None:
        return loss
    return own * loss + (1 - own) * F.cross_entropy(logits, swap_pairs(labels), label_smoothing=smoothing)


def binary_cross_entropy(
    logits: Tensor, labels: Tensor, own: Tensor | None, smoothing: float, threshold: float | None = None
) -> Tensor:
    """The mean over images and classes, each class a yes or no of its own (Wightman et al. 2021, section 2.2).

    Arguments as for `cross_entropy`, and:
        threshold: Targets above it become 1, all others 0: both labels of a mixed image are then present, as long as
            their weights are above it. None keeps the weights as targets.
    """
    classes = logits.shape[1]
    targets = F.one_hot(labels, classes).float()
    if own is not None:
        targets = swap_pairs(targets).lerp_(targets, own)
    targets = targets * (1 - smoothing) + smoothing / classes
    if threshold is not None:
        targets = (targets > threshold).float()
    return F.binary_cross_entropy_with_logits(logits, targets)

"""All randomness of the data, as pure functions of (seed, epoch, sample index).

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") maps a counter to 128 random bits
without any state. So no random number depends on the number of loader workers, the validation schedule or whether the
run was resumed. Unlike numpy's Philox, it gives random access by sample index.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from reslab.errors import UserError

Ints = npt.NDArray[np.int64]

_MASK = 0xFFFFFFFF
# The fourth word of the counter identifies the purpose, so that no two purposes share random numbers.
ORDER, AUGMENT, RESIZED_CROP, SPLIT, STEP, MIX, ERASE, TRANSFORM = range(8)


def philox(counter: tuple[Any, Any, Any, Any], key: int) -> tuple[Any, Any, Any, Any]:
    """Return four 32-bit random words for each counter of four 32-bit words, under a 64-bit key.

    The words of the counter are Python ints or uint64 arrays that broadcast together; the result has the same type.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 32 × 32 bits: no overflow in uint64
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _words(n: int | npt.ArrayLike) -> npt.NDArray[np.uint64]:
    return np.arange(n, dtype=np.uint64) if isinstance(n, int) else np.asarray(n).astype(np.uint64)


def _random_bits(counter: tuple[Any, Any, Any, Any], seed: int) -> npt.NDArray[np.uint64]:
    high, low, _, _ = philox(counter, seed)
    return (high << 32) | low


def permutation(seed: int, epoch: int, n: int) -> Ints:
    """Return a random permutation of range(n), int64 (n,): the indices, sorted by 64 random bits each."""
    return _argsort(_random_bits((_words(n), 0, epoch, ORDER), seed))


def _argsort(keys: npt.NDArray[np.uint64]) -> Ints:
    """Return the stable sort order, by numpy's faster sort unless keys are equal, which 64 random bits rarely are."""
    fast = np.argsort(keys)
    ordered = keys[fast]
    return fast if (ordered[1:] != ordered[:-1]).all() else np.argsort(keys, kind="stable")


def uniforms(
    seed: int, epoch: int, indices: npt.ArrayLike, count: int, stream: int = AUGMENT
) -> npt.NDArray[np.float32]:
    """Return random numbers in [0, 1), float32 (len(indices), count); row i depends on no index but indices[i]."""
    index = _words(indices)[:, None]
    block = _words(-(-count // 4))[None]
    words = philox((index, block, epoch, stream), seed)
    bits = np.stack(np.broadcast_arrays(*words), axis=-1).reshape(len(index), -1)[:, :count]
    return (bits >> 8).astype(np.float32) * np.float32(2**-24)


def sample_seeds(seed: int, epoch: int, indices: npt.ArrayLike) -> Ints:
    """Return a seed for each sample, int64 (n,), for transforms that use a stateful generator."""
    high, low, _, _ = philox((_words(indices), 0, epoch, TRANSFORM), seed)
    return ((high << 32 | low) >> 1).astype(np.int64)  # 63 bits: torch requires a signed integer


def step_seed(seed: int, global_step: int, rank: int) -> int:
    """Return the `torch.manual_seed` of one training step on one rank, for dropout and stochastic depth."""
    high, low, _, _ = philox((global_step & _MASK, global_step >> 32, rank, STEP), seed)
    return (high << 32 | low) >> 1  # 63 bits: torch requires a signed integer


def repeat(order: Ints, repeats: int, batch_size: int, n: int) -> Ints:
    """Repeat each sample `repeats` times within its batch (Hoffer et al. 2020; Berman et al. 2019).

    The number of batches per epoch stays, so an epoch has the first 1 / `repeats` of the samples. A batch lists all of
    its samples, then all of them again, so that neighbours, which mixup mixes, are different samples. If the batch size
    is not a multiple of `repeats`, the last copies are missing. Copy k of a sample in a data set of n samples has
    the index: index + k × n, and so its own augmentation.
    """
    steps, distinct = len(order) // batch_size, -(-batch_size // repeats)
    copy, sample = np.divmod(np.arange(batch_size), distinct)
    return (order[: steps * distinct].reshape(steps, distinct)[:, sample] + n * copy).ravel()


def micro_batch(order: Ints, position: int, batch_size: int, accumulate: int, world: int, rank: int) -> Ints:
    """Return the samples of one forward pass on one rank, from the order of an epoch.

    Global batch b is order[b*B:(b+1)*B], where B is `batch_size`, a multiple of accumulate × world. It is split into
    `accumulate` micro-batches and each of those among `world` ranks, all contiguous, so an optimizer step has the same
    samples for any number of ranks. `position` counts the micro-batches of this rank in the epoch before this one.
    """
    size = batch_size // (accumulate * world)
    start = (position * world + rank) * size
    return order[start : start + size]


def evaluation_share(indices: Ints, world: int, rank: int) -> Ints:
    """Return this rank's share of an evaluation set: every world-th index, padded with -1.

    All shares have the same size, so that ranks stay in step, and no index occurs twice.
    """
    return np.pad(indices, (0, -len(indices) % world), constant_values=-1)[rank::world]


def hold_out(keys: npt.ArrayLike, labels: npt.ArrayLike, amount: int | float, seed: int) -> tuple[Ints, Ints]:
    """Split off samples for validation by one random number per sample, a function of its key and the seed.

    With a fraction, a sample is held out if its number is below the fraction. So adding or removing a sample moves no
    other one, samples with equal keys stay together, and the number of samples held out, in total and per class, is the
    fraction only in expectation. With a count, exactly that many are held out, in the proportions of the classes
    (largest remainders; ties are broken by the seed): those with the smallest numbers of each class.

    Args:
        keys: Identity of each sample, uint64 (n,).
        labels: Class of each sample, (n,).
        amount: A fraction of all samples if below 1, else a count.
        seed: Chooses the samples.

    Returns:
        Sorted indices of the remaining samples, and of the samples held out.

    Raises:
        UserError: The amount is negative or holds out nothing, or a class would have no remaining sample.
    """
    key, labels = np.asarray(keys).astype(np.uint64), np.asarray(labels)
    classes, sizes = np.unique(labels, return_counts=True)
    most = len(labels) - len(classes)
    if not 0 <= amount <= max(most, 0) or (amount > 1 and amount != int(amount)):
        raise UserError(
            f"data.val_split {amount} does not fit {len(labels)} images of {len(classes)} classes: "
            f"use a fraction from 0 to below 1 or a count of at most {most}"
        )
    numbers = _random_bits((key & _MASK, key >> 32, 0, SPLIT), seed)
    if amount < 1:
        held_out = numbers < np.uint64(int(amount * 2**64))
    else:
        small = (labels - classes[0]).astype(np.min_scalar_type(classes[-1] - classes[0]))  # radix sort, up to 16 bits
        held_out = _smallest_of_each_class(numbers, small, sizes, _quotas(classes, sizes, int(amount), seed))
    if len(left := np.unique(labels[~held_out])) < len(classes):
        c = int(np.argmin(np.isin(classes, left)))
        raise UserError(
            f"data.val_split {amount} would hold out all {sizes[c]} images of class {classes[c]}: use less or 0"
        )
    if amount and not held_out.any():
        count = math.ceil(amount * len(labels))
        raise UserError(f"data.val_split {amount} holds out none of {len(labels)} images: use a count, such as {count}")
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def check_folds(folds: int | None, fold: int | None) -> None:
    """Raise a UserError unless `data.folds` and `data.fold` state one fold, or neither is given."""
    example = "data.folds 5 and data.fold 0 validate on the first of five folds"
    if folds is not None and folds < 2:
        raise UserError(f"data.folds must be at least 2, got {folds}: {example}")
    if (folds is None) != (fold is None):
        present, missing = ("fold", "folds") if folds is None else ("folds", "fold")
        raise UserError(f"data.{present} requires data.{missing}: {example}")
    if folds is not None and fold is not None and not 0 <= fold < folds:
        raise UserError(f"data.fold must be from 0 to {folds - 1} (data.folds is {folds}), got {fold}")


def fold_out(keys: npt.ArrayLike, labels: npt.ArrayLike, folds: int, fold: int, seed: int) -> tuple[Ints, Ints]:
    """Split off one of `folds` folds for validation, by the random number per sample that `hold_out` uses.

    A sample belongs to fold floor(number * folds), with its number in [0, 1): every sample is in exactly one fold,
    samples with equal keys are in the same one, and adding or removing a sample moves no other one. So folds have equal
    sizes, in total and per class, only in expectation. Fold 0 of 10 is what a fraction of 0.1 holds out.

    Returns:
        Sorted indices of the remaining samples, and of the samples of the fold.

    Raises:
        UserError: The fold is out of range or empty, or a class would have no remaining sample.
    """
    check_folds(folds, fold)
    key, labels = np.asarray(keys).astype(np.uint64), np.asarray(labels)
    numbers = _random_bits((key & _MASK, key >> 32, 0, SPLIT), seed)
    n = min(folds, _MASK)  # more would be empty: below, the high word of the 128-bit product numbers * n
    in_fold = ((numbers >> 32) * n + ((numbers & _MASK) * n >> 32)) >> 32 == fold
    name = f"fold {fold} of {folds} (data.fold, data.folds)"
    if folds > len(labels) or not in_fold.any():
        raise UserError(f"{name} has none of the {len(labels)} images: use fewer folds")
    if len(lost := np.setdiff1d(labels, labels[~in_fold])):
        raise UserError(f"{name} has all images of class {lost[0]}: use more folds, or another data.split_seed")
    return np.flatnonzero(~in_fold), np.flatnonzero(in_fold)


def _quotas(classes: Ints, sizes: Ints, count: int, seed: int) -> Ints:
    """Divide `count` among the classes in proportion to their sizes, by largest remainders; the seed breaks ties."""
    quotas, remainders = np.divmod(sizes * count, sizes.sum())
    ties = _random_bits((_words(classes) & _MASK, 0, 1, SPLIT), seed)
    quotas[np.lexsort((ties, -remainders))[: count - quotas.sum()]] += 1
    return quotas


def _smallest_of_each_class(
    numbers: npt.NDArray[np.uint64], labels: npt.NDArray[Any], sizes: Ints, counts: Ints
) -> npt.NDArray[np.bool_]:
    """Return which samples have the smallest numbers of their class: `counts` of the `sizes` of each class."""
    ascending = _argsort(numbers)
    by_class = ascending[np.argsort(labels[ascending], kind="stable")]
    rank_in_class = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    chosen = np.zeros(len(labels), bool)
    chosen[by_class[rank_in_class < np.repeat(counts, sizes)]] = True
    return chosen

"""All randomness of the data, as pure functions of (seed, epoch, sample index).

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a counter into 128
random bits without any state, so neither the number of loader workers, nor the validation schedule, nor a
resumed run can move a draw. numpy's own Philox would be faster, but numpy does not promise the same streams
in its next version.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from reslab.errors import UserError

Ints = npt.NDArray[np.int64]

_MASK = 0xFFFFFFFF
# The last counter word: which use the draws are for, so that no two uses share a draw.
ORDER, AUGMENT, RESIZED_CROP, SPLIT, STEP, MIX, ERASE, TRANSFORM = range(8)


def philox(counter: tuple[Any, Any, Any, Any], key: int) -> tuple[Any, Any, Any, Any]:
    """Four words of 32 random bits for each counter of four 32-bit words, under a 64-bit key.

    The words are Python ints or uint64 arrays that broadcast together; the result is of the same kind.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 32 × 32 -> 64 bits: no overflow in uint64
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _words(n: int | npt.ArrayLike) -> npt.NDArray[np.uint64]:
    return np.arange(n, dtype=np.uint64) if isinstance(n, int) else np.asarray(n).astype(np.uint64)


def _sort_keys(seed: int, epoch: int, n: int, stream: int) -> npt.NDArray[np.uint64]:
    high, low, _, _ = philox((_words(n), 0, epoch, stream), seed)
    return (high << 32) | low


def permutation(seed: int, epoch: int, n: int) -> Ints:
    """A random order of range(n), int64 (n,): the indices sorted by 64 random bits each."""
    return _argsort(_sort_keys(seed, epoch, n, ORDER))


def _argsort(keys: npt.NDArray[np.uint64]) -> Ints:
    """The stable order, by numpy's faster sort if no two keys are equal: of 64 random bits hardly ever."""
    fast = np.argsort(keys)
    ordered = keys[fast]
    return fast if (ordered[1:] != ordered[:-1]).all() else np.argsort(keys, kind="stable")


def uniforms(
    seed: int, epoch: int, indices: npt.ArrayLike, draws: int, stream: int = AUGMENT
) -> npt.NDArray[np.float32]:
    """Random numbers in [0, 1), float32 (len(indices), draws); row i depends on no index but indices[i]."""
    index = _words(indices)[:, None]
    block = _words(-(-draws // 4))[None]
    words = philox((index, block, epoch, stream), seed)
    bits = np.stack(np.broadcast_arrays(*words), axis=-1).reshape(len(index), -1)[:, :draws]
    return (bits >> 8).astype(np.float32) * np.float32(2**-24)


def sample_seeds(seed: int, epoch: int, indices: npt.ArrayLike) -> Ints:
    """A seed for each sample, int64 (n,), of what draws from a generator with a state of its own."""
    high, low, _, _ = philox((_words(indices), 0, epoch, TRANSFORM), seed)
    return ((high << 32 | low) >> 1).astype(np.int64)  # 63 bits: torch takes a signed integer


def step_seed(seed: int, global_step: int, rank: int) -> int:
    """The seed for `torch.manual_seed` at one training step of one process: dropout, stochastic depth."""
    high, low, _, _ = philox((global_step & _MASK, global_step >> 32, rank, STEP), seed)
    return (high << 32 | low) >> 1  # 63 bits: torch takes a signed integer


def repeat(order: Ints, repeats: int, batch_size: int, n: int) -> Ints:
    """Repeated augmentation (Hoffer et al. 2020; Berman et al. 2019): each sample `repeats` times, in one batch.

    The epoch keeps its number of batches, so it shows the first 1 / `repeats` of the samples. A batch has all its
    samples, then all of them again: neighbours, which are mixed with each other, are different samples. Where its
    size is no multiple of `repeats`, its last copies are missing.

    Args:
        order: Sample indices of the whole epoch.
        repeats: How often a sample comes.
        batch_size: Samples of one optimizer step.
        n: Samples of the data set: index + n × copy stands for a copy, so that each has draws of its own.

    Returns:
        Whole batches, int64.
    """
    steps, distinct = len(order) // batch_size, -(-batch_size // repeats)
    copy, sample = np.divmod(np.arange(batch_size), distinct)
    return (order[: steps * distinct].reshape(steps, distinct)[:, sample] + n * copy).ravel()


def micro_batch(order: Ints, position: int, batch_size: int, accumulate: int, world: int, rank: int) -> Ints:
    """The samples of one forward pass of one rank, from the order of an epoch.

    Global batch b is order[b*B:(b+1)*B]; it is cut into `accumulate` micro-batches, each of those into
    `world` ranks, all contiguous: an optimizer step has the same samples whatever the number of processes.

    Args:
        order: Sample indices of the whole epoch.
        position: Micro-batches of this rank before this one in the epoch.
        batch_size: Samples of one optimizer step, over all ranks: a multiple of accumulate × world.
        accumulate: Micro-batches of one optimizer step.
        world: Number of ranks.
        rank: This rank.
    """
    size = batch_size // (accumulate * world)
    start = (position * world + rank) * size
    return order[start : start + size]


def evaluation_share(indices: Ints, world: int, rank: int) -> Ints:
    """This rank's part of an evaluation set: every world-th index, -1 where the others have one more.

    All ranks take equally many, so they stay in step, and no index is there twice.
    """
    return np.pad(indices, (0, -len(indices) % world), constant_values=-1)[rank::world]


def stratified_split(labels: npt.ArrayLike, amount: int | float, seed: int) -> tuple[Ints, Ints]:
    """Splits off `amount` samples with the class shares of the whole, by largest remainders.

    Args:
        labels: Class of each sample, (n,).
        amount: Below 1 a fraction of all samples, else a count; 0 splits off nothing.
        seed: Chooses which samples of each class.

    Returns:
        Sorted indices of the rest, and sorted indices of the samples split off.

    Raises:
        UserError: the amount is negative or would leave a class without a sample in the rest.
    """
    labels = np.asarray(labels)
    n = len(labels)
    count = round(amount * n) if amount < 1 else int(amount)
    classes, sizes = np.unique(labels, return_counts=True)
    if not 0 <= count <= n - len(classes) or (amount > 1 and amount != count):
        raise UserError(
            f"a split of {amount} does not fit {n} samples of {len(classes)} classes: "
            f"give a fraction from 0 to below 1 or a count of at most {n - len(classes)}"
        )
    takes = _apportion(sizes, count)
    if (takes >= sizes).any():
        c = int(np.argmax(takes >= sizes))
        raise UserError(
            f"a split of {amount} would take all {sizes[c]} samples of class {classes[c]}: use a smaller one"
        )
    shuffled = _argsort(_sort_keys(seed, 0, n, SPLIT))
    small = (labels - classes[0]).astype(np.min_scalar_type(classes[-1] - classes[0]))  # numpy sorts 16 bits by radix
    by_class = shuffled[np.argsort(small[shuffled], kind="stable")]  # classes in a row, each in random order
    place = np.arange(n) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    taken = place < np.repeat(takes, sizes)
    return np.sort(by_class[~taken]), np.sort(by_class[taken])


def _apportion(sizes: Ints, count: int) -> Ints:
    quotas = sizes * count / sizes.sum()
    takes = np.floor(quotas).astype(np.int64)
    largest = np.argsort(takes - quotas, kind="stable")[: count - takes.sum()]
    takes[largest] += 1
    return takes

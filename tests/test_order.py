"""Order and randomness of the data: pure functions, identical on every machine."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reslab.data import order
from reslab.errors import UserError

seeds = st.integers(0, 2**64 - 1)
epochs = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_matches_the_known_answers_of_random123(counter, key, expected):
    assert order.philox(counter, key) == expected
    words = order.philox(tuple(np.full(3, word, np.uint64) for word in counter), key)
    assert [list(word) for word in words] == [[word] * 3 for word in expected]


@given(seeds, epochs, st.integers(1, 300))
def test_permutation_has_each_index_once(seed, epoch, n):
    assert sorted(order.permutation(seed, epoch, n)) == list(range(n))


@given(seeds, st.integers(0, 2**31))
def test_permutations_differ_between_epochs_and_seeds(seed, epoch):
    first = order.permutation(seed, epoch, 100)
    assert not np.array_equal(first, order.permutation(seed, epoch + 1, 100))
    assert not np.array_equal(first, order.permutation(seed ^ 1, epoch, 100))


def test_order_is_the_same_on_every_machine_and_version():
    # Fixed values: a change here changes every published run.
    assert order.permutation(0, 0, 10).tolist() == [2, 8, 0, 5, 9, 7, 6, 3, 4, 1]
    assert (order.uniforms(7, 3, [5], 2) * 2**24).tolist() == [[1720454, 12268649]]
    assert order.step_seed(0, 1, 2) == 9_106_981_211_251_777_562


@given(seeds, epochs, st.lists(st.integers(0, 2**31), min_size=1, max_size=50), st.integers(1, 23))
def test_uniforms_of_an_image_do_not_depend_on_the_others(seed, epoch, indices, count):
    together = order.uniforms(seed, epoch, indices, count)
    alone = [order.uniforms(seed, epoch, [index], count)[0] for index in indices]
    assert together.dtype == np.float32
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together[:, :1], order.uniforms(seed, epoch, indices, 1))
    assert (together >= 0).all()
    assert (together < 1).all()


def test_uniforms_are_uniform_and_differ_between_seeds_epochs_and_streams():
    base = order.uniforms(0, 0, range(20_000), 5)
    np.testing.assert_allclose(base.mean(0), 0.5, atol=0.01)  # five standard errors
    np.testing.assert_allclose(base.var(0), 1 / 12, atol=0.003)
    assert abs(np.corrcoef(base.T) - np.eye(5)).max() < 0.03
    others = [
        order.uniforms(1, 0, range(20_000), 5),
        order.uniforms(0, 1, range(20_000), 5),
        order.uniforms(0, 0, range(20_000), 5, order.RESIZED_CROP),
    ]
    for other in others:
        assert abs(np.corrcoef(base[:, 0], other[:, 0])[0, 1]) < 0.03


def test_step_seeds_fit_torch_and_differ_between_steps_ranks_and_seeds():
    all_seeds = {order.step_seed(seed, step, rank) for seed in range(5) for step in (0, 1, 2**33) for rank in (0, 1)}
    assert len(all_seeds) == 30
    assert all(0 <= seed < 2**63 for seed in all_seeds)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 30))
def test_ranks_and_micro_batches_partition_every_global_batch(batches, accumulate, world, size, rest):
    batch_size = size * accumulate * world
    samples = order.permutation(0, 0, batches * batch_size + rest)
    for b in range(batches):
        parts = [
            order.micro_batch(samples, b * accumulate + micro, batch_size, accumulate, world, rank)
            for micro in range(accumulate)
            for rank in range(world)
        ]
        assert all(len(part) == size for part in parts)
        np.testing.assert_array_equal(np.concatenate(parts), samples[b * batch_size : (b + 1) * batch_size])


@given(st.integers(0, 50), st.integers(1, 9))
def test_evaluation_shares_are_equal_in_size_and_have_each_index_once(n, world):
    shares = [order.evaluation_share(np.arange(n), world, rank) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    together = np.concatenate(shares)
    assert sorted(together[together >= 0]) == list(range(n))
    assert (together < 0).sum() < world


@given(st.integers(1, 200), st.integers(1, 5), st.integers(1, 40))
def test_repeats_are_in_one_batch_but_not_adjacent(n, repeats, batch_size):
    permutation = order.permutation(0, 0, n)
    indices = order.repeat(permutation, repeats, batch_size, n)
    assert len(indices) == n // batch_size * batch_size  # as many steps as without repeats
    assert len(set(indices.tolist())) == len(indices)  # each copy has its own augmentation
    batches = indices.reshape(-1, batch_size) % n
    distinct = -(-batch_size // repeats)
    assert np.array_equal(np.unique(batches), np.sort(permutation[: len(batches) * distinct]))
    for batch in batches:
        assert set(np.bincount(batch)) - {0} <= {batch_size // distinct, -(-batch_size // distinct)}
        assert distinct == 1 or (batch[1:] != batch[:-1]).all()  # neighbours are different images


labels_of_few_classes = st.lists(st.integers(0, 4), max_size=100).map(lambda labels: labels + [*range(5)] * 4)


@settings(max_examples=50)
@given(labels_of_few_classes, st.floats(0, 0.5), seeds)
def test_split_keeps_the_class_proportions(labels, fraction, seed):
    train, val = order.stratified_split(labels, fraction, seed)
    assert sorted([*train, *val]) == list(range(len(labels)))
    assert len(val) == round(fraction * len(labels))
    for c in set(labels):
        assert abs(sum(labels[i] == c for i in val) - fraction * labels.count(c)) <= 2


def test_split_by_count_depends_on_the_seed_only():
    labels = np.repeat(np.arange(10), 100)
    _, val = order.stratified_split(labels, 50, seed=0)
    assert np.bincount(labels[val]).tolist() == [5] * 10
    np.testing.assert_array_equal(val, order.stratified_split(labels, 50, seed=0)[1])
    assert not np.array_equal(val, order.stratified_split(labels, 50, seed=1)[1])
    assert len(order.stratified_split(labels, 0, seed=0)[1]) == 0


@pytest.mark.parametrize("amount", [-1, 1000, 991, 2.5])
def test_split_that_does_not_fit_is_rejected(amount):
    with pytest.raises(UserError, match="a fraction from 0 to below 1 or a count of at most 990"):
        order.stratified_split(np.repeat(np.arange(10), 100), amount, seed=0)


def test_split_that_empties_a_class_is_rejected_with_its_name():
    labels = [0] * 20 + [7]
    with pytest.raises(UserError, match=r"all 1 samples of class 7"):
        order.stratified_split(labels, 0.9, seed=0)

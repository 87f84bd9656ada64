"""Order and randomness of the data: pure functions, identical on every machine."""

import numpy as np
import pytest
from hypothesis import given
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


keys_and_labels = st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 4)), max_size=60, unique=True)


def with_enough_of_each_class(rows: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    rows = rows + [(key, label) for label in range(5) for key in range(label * 100, label * 100 + 20)]
    return np.array([key for key, _ in rows], np.uint64), np.array([label for _, label in rows])


@given(keys_and_labels, st.floats(0.05, 0.5), seeds, st.data())
def test_fraction_decides_about_each_sample_alone(rows, fraction, seed, data):
    keys, labels = with_enough_of_each_class(rows)
    kept = np.delete(np.arange(len(keys)), data.draw(st.integers(0, len(keys) - 1)))
    order_ = np.array(data.draw(st.permutations(kept.tolist())))
    try:
        _, val = order.hold_out(keys, labels, fraction, seed)
        _, fewer = order.hold_out(keys[order_], labels[order_], fraction, seed)
    except UserError:  # by chance, no sample or all of a class
        return
    assert set(keys[order_][fewer]) == set(keys[val]) & set(keys[kept])


@given(keys_and_labels, st.integers(1, 60), seeds)
def test_count_is_exact_and_keeps_the_class_proportions(rows, count, seed):
    keys, labels = with_enough_of_each_class(rows)
    train, val = order.hold_out(keys, labels, count, seed)
    assert sorted([*train, *val]) == list(range(len(labels)))
    assert np.array_equal(val, np.sort(val)) and np.array_equal(train, np.sort(train))
    assert len(val) == count
    for c in set(labels):
        assert abs((labels[val] == c).sum() - count * (labels == c).mean()) < 1


def test_fraction_holds_out_about_that_share_of_each_class():
    keys, labels = np.arange(100_000) * 77, np.arange(100_000) % 4
    for fraction in (0.01, 0.1, 0.5):
        _, val = order.hold_out(keys, labels, fraction, seed=3)
        share = np.bincount(labels[val]) / 25_000
        assert (abs(share - fraction) < 5 * np.sqrt(fraction * (1 - fraction) / 25_000)).all()  # five standard errors


def test_equal_keys_are_on_one_side():
    keys = np.repeat(np.arange(100), 3)
    train, val = order.hold_out(keys, np.zeros(300, int), 0.3, seed=0)
    assert not set(keys[train]) & set(keys[val])


def test_ties_between_classes_are_broken_by_the_seed():
    labels, keys = np.repeat(np.arange(20), 5), np.arange(100)
    chosen = np.zeros(20, int)
    for seed in range(400):
        _, val = order.hold_out(keys, labels, 10, seed)
        counts = np.bincount(labels[val], minlength=20)
        assert set(counts) == {0, 1}
        chosen += counts
    assert (abs(chosen - 200) < 50).all()  # five standard errors of 400 throws of a coin


def test_labels_of_any_integers_can_be_split():
    labels = np.repeat([-3, 5, 2**40], 20)
    _, val = order.hold_out(np.arange(60), labels, 6, seed=0)
    assert np.unique(labels[val], return_counts=True)[1].tolist() == [2, 2, 2]


def test_split_is_the_same_on_every_machine_and_version():
    # Fixed values: a change here changes every published run.
    keys, labels = np.arange(40, dtype=np.uint64) << np.uint64(57), np.arange(40) % 2
    assert order.hold_out(keys, labels, 0.3, seed=0)[1].tolist() == [5, 6, 9, 13, 14, 25, 28, 29, 32, 35, 39]
    assert order.hold_out(keys, labels, 8, seed=0)[1].tolist() == [6, 13, 14, 25, 28, 29, 32, 35]


def test_split_by_count_depends_on_the_seed_only():
    labels, keys = np.repeat(np.arange(10), 100), np.arange(1000)
    _, val = order.hold_out(keys, labels, 50, seed=0)
    assert np.bincount(labels[val]).tolist() == [5] * 10
    np.testing.assert_array_equal(val, order.hold_out(keys, labels, 50, seed=0)[1])
    assert not np.array_equal(val, order.hold_out(keys, labels, 50, seed=1)[1])
    assert len(order.hold_out(keys, labels, 0, seed=0)[1]) == 0


@pytest.mark.parametrize("amount", [-1, -0.1, 1000, 991, 2.5, float("nan")])
def test_split_that_does_not_fit_is_rejected(amount):
    with pytest.raises(UserError, match="a fraction from 0 to below 1 or a count of at most 990"):
        order.hold_out(np.arange(1000), np.repeat(np.arange(10), 100), amount, seed=0)


@pytest.mark.parametrize("amount", [0.9999, 20])
def test_split_that_empties_a_class_is_rejected_with_its_name(amount):
    labels = [0] * 20 + [7] * 2
    with pytest.raises(UserError, match=rf"data\.val_split {amount} would hold out all \d+ images of class [07]"):
        order.hold_out(np.arange(22), labels, amount, seed=0)


def test_fraction_that_holds_out_nothing_is_rejected_with_a_count():
    with pytest.raises(UserError, match=r"data\.val_split 0\.01 holds out none of 120 images: use a count, such as 2"):
        order.hold_out(np.arange(120), np.arange(120) % 2, 0.01, seed=3)

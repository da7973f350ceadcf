"""The order of samples: a function of seed and place alone, whatever is taken how."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trimpot.runner.data.cursor import Cursor, deal, steps_in

DRAW = np.random.default_rng(1)


@pytest.mark.parametrize("samples", [1, 2, 7, 100])
def test_each_epoch_has_every_sample_once(samples: int) -> None:
    order = Cursor(samples, seed=3).take(0, 4 * samples).reshape(4, samples)
    assert np.array_equal(np.sort(order, axis=1), np.tile(np.arange(samples), (4, 1)))


def test_epochs_and_seeds_differ() -> None:
    orders = [Cursor(50, seed).take(epoch * 50, 50) for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9


@pytest.mark.parametrize("samples", [1, 3, 10, 64])
def test_the_same_however_it_is_cut(samples: int) -> None:
    """Any cutting of the run into pieces, across ends of epochs, gives the same sequence."""
    cursor = Cursor(samples, seed=5)
    whole = cursor.take(0, 200)
    assert len(whole) == 200
    for _ in range(20):
        cuts = [0, *np.sort(DRAW.integers(0, 201, size=6)).tolist(), 200]
        pieces = [cursor.take(a, b - a) for a, b in itertools.pairwise(cuts)]
        assert np.array_equal(np.concatenate(pieces), whole)
    assert cursor.take(17, 0).dtype == np.int64
    # A start far in needs nothing that came before.
    assert np.array_equal(Cursor(samples, 5).take(150, 50), whole[150:])


def test_the_order_itself() -> None:
    """Numbers that stood when runs were saved: other ones would break their resumption."""
    assert Cursor(6, seed=0).take(0, 12).tolist() == GOLDEN_0
    assert Cursor(6, seed=2**32 - 1).take(6 * 1000, 6).tolist() == GOLDEN_1


GOLDEN_0 = [0, 5, 1, 2, 4, 3, 2, 0, 4, 1, 5, 3]
GOLDEN_1 = [1, 5, 4, 3, 2, 0]


@pytest.mark.parametrize("micro", [1, 2, 4, 12])
def test_deal_covers_each_sample_once(micro: int) -> None:
    lengths = DRAW.integers(1, 9, size=40)
    indices = Cursor(40, seed=0).take(7, 12)
    micros = deal(indices, lengths, micro)
    assert micros.shape == (12 // micro, micro)
    assert sorted(micros.ravel().tolist()) == sorted(indices.tolist())


def test_deal_keeps_samples_that_come_twice() -> None:
    """A batch larger than the data has some of them twice; both are trained."""
    indices = Cursor(3, seed=0).take(0, 6)
    assert sorted(deal(indices, np.array([5, 1, 3]), 2).ravel().tolist()) == [0, 0, 1, 1, 2, 2]


def test_deal_puts_like_lengths_together() -> None:
    lengths = DRAW.integers(1, 1000, size=64)
    indices = np.arange(64)
    micros = deal(indices, lengths, 8)
    dealt = lengths[micros]
    assert dealt.ravel().tolist() == sorted(
        lengths.tolist(), reverse=True
    )  # too long shows at once
    padded = int((dealt.max(axis=1) * 8).sum())
    # No way to form eights pads less than that in order of length.
    assert padded == int(np.sort(lengths)[::-1].reshape(8, 8)[:, 0].sum() * 8)
    assert padded < int((lengths.reshape(8, 8).max(axis=1) * 8).sum())


def test_deal_breaks_ties_by_place_in_the_run() -> None:
    indices = np.array([4, 2, 9, 7])
    lengths = np.full(10, 3)
    assert deal(indices, lengths, 2).tolist() == [[4, 2], [9, 7]]


@pytest.mark.parametrize(
    ("samples", "batch", "epochs", "steps"),
    [
        (100, 10, 1, 10),
        (100, 10, 2.5, 25),
        (104, 10, 1, 10),
        (106, 10, 1, 11),
        (3, 8, 1, 1),
        (3, 8, 8, 3),
    ],
)
def test_steps_in(samples: int, batch: int, epochs: float, steps: int) -> None:
    assert steps_in(samples, batch, epochs) == steps

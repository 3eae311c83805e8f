from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from qlora_trainer.data import shuffle
from qlora_trainer.data.shuffle import NUM_ROUNDS, shuffled

WORD = 2**64 - 1
KEYS = st.integers(0, WORD)


def whole(size: int, *, seed: int = 0, number: int = 0) -> list[int]:
    return shuffled(range(size), seed=seed, number=number, size=size)


def excess(counts: ArrayLike) -> float:
    """By how many standard deviations a chi-square of equal counts is above its mean; about normal."""
    counts_K = np.asarray(counts, dtype=np.float64).ravel()
    expected = counts_K.mean()
    free = counts_K.size - 1
    return float((((counts_K - expected) ** 2 / expected).sum() - free) / np.sqrt(2 * free))


def neighbours_excess(size: int) -> float:
    """Of the steps from each to the next, which are all lengths equally often."""
    steps_N = np.diff(np.array(whole(size))) % size
    return excess(np.bincount(steps_N * 50 // size, minlength=50))


@given(size=st.integers(1, 3000), seed=KEYS, number=KEYS)
def test_every_position_is_taken_once(size: int, seed: int, number: int) -> None:
    assert sorted(whole(size, seed=seed, number=number)) == list(range(size))


@given(size=st.integers(1, 2**62 - 1), seed=KEYS, number=KEYS, data=st.data())
def test_it_is_a_feistel_network_that_is_walked(size: int, seed: int, number: int, data: st.DataObject) -> None:
    """Against the same in Python's own numbers. One position alone gives what it gives among others."""
    positions = data.draw(st.lists(st.integers(0, size - 1), max_size=4))
    found = shuffled(positions, seed=seed, number=number, size=size)
    assert found == [walked(position, seed=seed, number=number, size=size) for position in positions]
    assert found == [shuffled([position], seed=seed, number=number, size=size)[0] for position in positions]


def walked(position: int, *, seed: int, number: int, size: int) -> int:
    half = next(bits for bits in range(1, 32) if 4**bits >= size)
    *keys, swap = np.random.Philox(key=np.array([seed, number], dtype=np.uint64)).random_raw(NUM_ROUNDS + 1).tolist()
    while True:
        left, right = divmod(position, 2**half)
        for key in keys:
            left, right = right, left ^ (mixed(right ^ key) >> (64 - half))
        position = left * 2**half + right
        if position < size:
            return 1 - position if size > 1 and position < 2 and swap % 2 else position


def mixed(word: int) -> int:
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & WORD
    return word ^ word >> 31


@pytest.mark.parametrize(
    "size, seed, number, positions, found",
    [
        (1, 0, 0, [0], [0]),
        (2, 0, 1, [0, 1], [1, 0]),
        (13, WORD, WORD, [0, 1, 6, 12], [4, 9, 11, 3]),
        (1000, 3, 4, [0, 1, 500, 999], [693, 797, 365, 81]),
        (10**6, 0, 0, [0, 1, 500_000, 999_999], [448629, 35945, 560446, 653700]),
        (2**61 + 1, 5, 6, [0, 2**61], [462764643202598450, 132977159230977227]),
    ],
)
def test_it_is_the_same_for_ever(size: int, seed: int, number: int, positions: Sequence[int], found: list[int]) -> None:
    """A checkpoint holds no order, so another one must have another `ORDER_VERSION`."""
    assert shuffled(positions, seed=seed, number=number, size=size) == found


def test_all_permutations_of_few_numbers_are_equally_likely() -> None:
    drawn = Counter(tuple(whole(5, seed=seed)) for seed in range(2400))
    assert excess([*drawn.values()] + [0] * (120 - len(drawn))) < 4


def test_even_and_odd_permutations_are_equally_likely() -> None:
    """Mutation tried: without the last swap 42 % of the permutations of seven numbers are even ones."""
    drawn = [whole(7, seed=seed) for seed in range(2000)]
    num_even = sum(sum(a > b for a, b in combinations(order, 2)) % 2 == 0 for order in drawn)
    assert abs(num_even - 1000) < 4 * np.sqrt(2000 / 4)


@pytest.mark.parametrize("position", [0, 499, 999])
def test_a_document_may_come_anywhere_in_an_epoch(position: int) -> None:
    places = [shuffled([position], seed=11, number=epoch, size=1000)[0] for epoch in range(1000)]
    assert excess(np.bincount(np.array(places) // 50, minlength=20)) < 4


@pytest.mark.parametrize("size", [4096, 20_000, 65_537])
def test_neighbours_have_nothing_in_common(size: int) -> None:
    assert neighbours_excess(size) < 4
    order_N = np.array(whole(size))
    assert abs(np.corrcoef(order_N[:-1], order_N[1:])[0, 1]) < 4 / np.sqrt(size)


def test_one_round_would_be_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    monkeypatch.setattr(shuffle, "NUM_ROUNDS", 1)
    assert sorted(whole(4096)) == list(range(4096))
    assert neighbours_excess(4096) > 100


@pytest.mark.parametrize("other", [{"number": 1}, {"seed": 1}, {"seed": 1, "number": 1}, {"seed": 2**63}])
def test_epochs_and_seeds_have_nothing_in_common(other: dict[str, int]) -> None:
    size = 10_000
    one_N, other_N = np.array(whole(size)), np.array(whole(size, **other))
    assert abs(np.corrcoef(one_N, other_N)[0, 1]) < 4 / np.sqrt(size)
    assert excess(np.bincount(one_N * 10 // size * 10 + other_N * 10 // size, minlength=100)) < 4

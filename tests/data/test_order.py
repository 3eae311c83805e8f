from __future__ import annotations

import time
import tracemalloc
from itertools import chain, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.data.order import Order


@given(
    num_documents=st.integers(1, 60),
    global_batch_size=st.integers(1, 40),
    seed=st.integers(0, 2**64 - 1),
    num_epochs=st.integers(1, 4),
)
def test_each_epoch_is_a_permutation(num_documents: int, global_batch_size: int, seed: int, num_epochs: int) -> None:
    order = Order(num_documents=num_documents, global_batch_size=global_batch_size, seed=seed, epochs=float(num_epochs))
    seen = iter(chain.from_iterable(order.batch(step) for step in range(order.num_steps)))
    for _ in range(num_epochs):
        assert sorted(islice(seen, num_documents)) == list(range(num_documents))
    assert list(seen) == []


@given(
    num_documents=st.integers(1, 200),
    global_batch_size=st.integers(1, 64),
    epochs=st.floats(0.01, 5),
    max_steps=st.none() | st.integers(1, 50),
)
def test_steps_and_samples_add_up(
    num_documents: int, global_batch_size: int, epochs: float, max_steps: int | None
) -> None:
    order = Order(
        num_documents=num_documents, global_batch_size=global_batch_size, seed=0, epochs=epochs, max_steps=max_steps
    )
    sizes = [len(order.batch(step)) for step in range(order.num_steps)]
    assert sizes[:-1] == [global_batch_size] * (order.num_steps - 1)
    assert 1 <= sizes[-1] <= global_batch_size
    assert sum(sizes) == order.num_samples == order.samples_seen(order.num_steps)
    assert order.samples_seen(0) == 0
    assert order.epoch(order.num_steps) == order.num_samples / num_documents
    if max_steps is not None:
        assert order.num_steps == max_steps
        assert sizes[-1] == global_batch_size


def test_the_order_is_the_same_for_ever() -> None:
    order = Order(num_documents=8, global_batch_size=4, seed=7, epochs=2)
    assert [order.batch(step) for step in range(4)] == [[2, 5, 7, 4], [6, 0, 1, 3], [3, 4, 0, 5], [1, 6, 7, 2]]


def test_seeds_and_epochs_differ() -> None:
    def whole(seed: int, step: int) -> list[int]:
        return Order(num_documents=50, global_batch_size=50, seed=seed, epochs=2).batch(step)

    assert whole(0, 0) != whole(0, 1)
    assert whole(0, 0) != whole(1, 0)
    assert whole(0, 1) != whole(1, 0)


def test_a_batch_may_span_two_epochs() -> None:
    order = Order(num_documents=5, global_batch_size=4, seed=0, epochs=2)
    flat = Order(num_documents=5, global_batch_size=5, seed=0, epochs=2)
    assert [order.batch(step) for step in range(3)] == [
        flat.batch(0)[:4],
        [*flat.batch(0)[4:], *flat.batch(1)[:3]],
        flat.batch(1)[3:],
    ]


@pytest.mark.parametrize(
    "epochs, num_documents, num_samples", [(0.1, 30, 3), (0.07, 100, 7), (1.1, 10, 11), (0.001, 5, 1)]
)
def test_fractional_epochs_are_counted_in_decimals(epochs: float, num_documents: int, num_samples: int) -> None:
    order = Order(num_documents=num_documents, global_batch_size=1, seed=0, epochs=epochs)
    assert order.num_samples == num_samples


def test_any_step_of_a_million_documents_is_found_at_once() -> None:
    order = Order(num_documents=10**6, global_batch_size=16, seed=1, epochs=1000)
    begun = time.perf_counter()
    assert len(order.batch(order.num_steps - 1)) == 16
    assert time.perf_counter() - begun < 1


def test_documents_without_number_take_no_memory() -> None:
    order = Order(num_documents=10**12, global_batch_size=16, seed=1, epochs=1)
    tracemalloc.start()
    try:
        assert len(set(order.batch(10**10))) == 16
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("step", [-1, 3])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    with pytest.raises(IndexError, match="of a run with 3 steps"):
        Order(num_documents=10, global_batch_size=4, seed=0, epochs=1).batch(step)


@pytest.mark.parametrize(
    "wrong",
    [{"num_documents": 0}, {"global_batch_size": 0}, {"epochs": 0.0}, {"max_steps": 0}, {"seed": -1}, {"seed": 2**64}],
)
def test_an_empty_order_is_refused(wrong: dict[str, int]) -> None:
    right = {"num_documents": 10, "global_batch_size": 4, "seed": 0, "epochs": 1}
    with pytest.raises(ValueError, match="Order"):
        Order(**{**right, **wrong})


@pytest.mark.parametrize("num_documents, global_batch_size, epochs", [(10, 4, 2.5), (12, 4, 3.0), (7, 7, 3.0)])
def test_a_run_that_is_cut_anywhere_sees_the_same_documents(
    num_documents: int, global_batch_size: int, epochs: float
) -> None:
    """At step 0, 1, within an epoch, at its edge, in the last batch, after two epochs: whatever the cut.

    Mutation tried: a permutation drawn from a generator that goes on, not from (seed, epoch), differs after a cut.
    """

    def order() -> Order:
        return Order(num_documents=num_documents, global_batch_size=global_batch_size, seed=3, epochs=epochs)

    num_steps = order().num_steps
    whole = [document for step in range(num_steps) for document in order().batch(step)]
    for epoch in range(int(epochs)):
        seen = whole[epoch * num_documents : (epoch + 1) * num_documents]
        assert sorted(seen) == list(range(num_documents))  # each once
    for cut in range(num_steps + 1):
        before, after = order(), order()  # two processes
        first = [document for step in range(cut) for document in before.batch(step)]
        assert len(first) == before.samples_seen(cut)
        rest = [document for step in range(cut, num_steps) for document in after.batch(step)]
        assert first + rest == whole

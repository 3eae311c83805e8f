"""Which sets of levers are looked at, and which is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import combinations

import pytest

from qlora_trainer.config.levers import NO_LEVERS
from qlora_trainer.planning.planner import Planner
from qlora_trainer.planning.price import Usage
from qlora_trainer.planning.rungs import (
    MAX_LOSS,
    MIN_GAIN,
    Lever,
    fastest_that_fits,
    pulled_levers,
    tried,
    with_levers,
)
from qlora_trainer.planning.search import Candidate, Space, find, layout_of, smallest
from tests.planning.test_price import GPU, RANK, SEQ_LEN, make_planner

NUM_LAYERS = 4
SPACE = Space(
    rank=8,
    seq_len=64,
    rows_of=lambda _: 1,
    tokens=(64,),
    loss_chunks=(64,),
    recompute=(0, NUM_LAYERS),
    optimizer="adamw_32bit",
)
LEVERS = (Lever("offload", NUM_LAYERS), Lever("tile_tokens", 32), Lever("base_residency", "streamed"))
EMPTY = Usage({"load": 0}, "load", {}, {})


@pytest.fixture(scope="module")
def planner() -> Planner:
    """Of a tiny Llama on a GPU; one size of loss chunk is enough."""
    return make_planner("llama", GPU, "memory.loss_chunk_tokens=256")


def name_of(space: Space) -> str:
    return "+".join(pulled_levers(space.levers, num_offloaded=space.offload[1])) or "none"


def searched(speeds: Mapping[str, float], *, num_kept: int = 0) -> tuple[list[str], Callable[[Space], list[Candidate]]]:
    """Sets that were looked at, and a search in which only those of `speeds` fit, and what offloads more slowly.

    Who may offload and does not fit or is slower so, does not.
    """
    seen: list[str] = []

    def search(space: Space) -> list[Candidate]:
        seen.append(name_of(space))
        without = name_of(replace(space, offload=(0, 0)))
        name = max((name_of(space), without), key=lambda one: speeds.get(one, 0.0))
        if name not in speeds:
            return []
        num_offloaded = space.offload[1] if name != without else 0
        layout = layout_of(space, 64, 64, NUM_LAYERS - num_kept, num_offloaded)
        return [Candidate(layout, "adamw_32bit", EMPTY, speeds[name])]

    return seen, search


def chosen(speeds: Mapping[str, float]) -> str:
    """The set that is taken, and what is found is of its space."""
    _, search = searched(speeds)
    found, space = fastest_that_fits(SPACE, LEVERS, search)
    assert found == search(space)
    return name_of(space)


def test_without_need_nothing_is_pulled_or_looked_at() -> None:
    seen, search = searched({"none": 10.0, "offload": 99.0}, num_kept=NUM_LAYERS)
    found, space = fastest_that_fits(SPACE, LEVERS, search)
    assert (name_of(space), seen) == ("none", ["none"])
    assert found[0].layout.levers == NO_LEVERS


@pytest.mark.parametrize("gain, taken", [(MIN_GAIN / 2, "none"), (2 * MIN_GAIN, "base_residency")])
def test_one_lever_is_pulled_where_that_is_clearly_faster_than_to_recompute(gain: float, taken: str) -> None:
    assert chosen({"none": 10.0, "offload": 9.0, "base_residency": 10.0 * (1 + gain)}) == taken


def test_of_single_levers_that_fit_the_fastest_is_taken() -> None:
    assert chosen({"offload": 5.0, "tile_tokens": 5.1, "base_residency": 5.0}) == "tile_tokens"


@pytest.mark.parametrize("speed", [{}, {"none": 3.0}, {"base_residency": 4.5}, {"tile_tokens+base_residency": 5.0}])
def test_several_are_pulled_where_that_is_clearly_faster_than_fewer(speed: dict[str, float]) -> None:
    """Though one fits alone, and though two of them gain nothing without the third."""
    assert chosen({"tile_tokens+base_residency+offload": 9.0, **speed}) == "tile_tokens+base_residency+offload"


@pytest.mark.parametrize(
    "loss, taken", [(MAX_LOSS / 2, "base_residency"), (2 * MAX_LOSS, "tile_tokens+base_residency")]
)
def test_the_fewest_that_come_near_the_fastest_are_taken(loss: float, taken: str) -> None:
    assert chosen({"base_residency": 10.0 * (1 - loss), "tile_tokens+base_residency": 10.0, "none": 1.0}) == taken


def test_what_gains_nothing_is_not_pulled() -> None:
    every = ("none", "tile_tokens", "base_residency", "offload")
    assert chosen(
        {**dict.fromkeys(every, 4.0), "base_residency+offload": 5.0, "tile_tokens+base_residency+offload": 5.0}
    ) == ("base_residency+offload")


def test_what_fits_only_without_a_lever_is_found() -> None:
    """What waits on the host may be too much for the host."""
    assert chosen({"tile_tokens+base_residency": 5.0}) == "tile_tokens+base_residency"
    seen, search = searched({})
    assert fastest_that_fits(SPACE, LEVERS, search)[0] == []
    assert {name_of(space) for space in tried(SPACE, LEVERS)} == set(seen)
    assert len(tried(SPACE, LEVERS)) == 2 ** len(LEVERS)


def test_where_nothing_fits_the_smallest_has_all_levers_pulled() -> None:
    _, search = searched({})
    found, space = fastest_that_fits(SPACE, LEVERS, search)
    assert found == []
    assert name_of(space) == "tile_tokens+base_residency+offload"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6, 0.9])
def test_no_set_of_levers_is_much_faster_than_what_is_taken(share: float, planner: Planner) -> None:
    """By the planner's own estimate, from the least memory that any set takes to what none takes."""
    levers, space = planner.levers(), planner.space(RANK, SEQ_LEN)
    assert len(levers) == 5
    sets = [with_levers(space, pulled) for number in range(6) for pulled in combinations(levers, number)]
    needed = [planner.needed_bytes(smallest(one, planner.price, planner.estimate).usage) for one in sets]
    least_bytes = round(1.03 * min(needed))
    own = replace(
        planner, budget=replace(planner.budget, budget_bytes=least_bytes + round(share * (needed[0] - least_bytes)))
    )
    search = partial(find, price=own.price, estimate=own.estimate, fits=own.is_well_within)
    speeds = [found[0].tokens_per_second for found in map(search, sets) if found]
    found, taken = fastest_that_fits(space, levers, search)
    num_pulled = len(pulled_levers(found[0].layout.levers, num_offloaded=found[0].layout.num_offloaded))
    assert found[0].tokens_per_second >= 0.97 * max(speeds)
    assert num_pulled == len(pulled_levers(taken.levers, num_offloaded=taken.offload[1])), "pulled, and not used"


def test_ways_to_hold_activations_from_the_least_memory_to_the_most() -> None:
    space = LEVERS[0].pulled(SPACE)
    ways = [space.policy(index) for index in range(space.num_policies)]
    assert ways == [(4, 4), (4, 3), (4, 2), (4, 1), (4, 0), (3, 0), (2, 0), (1, 0), (0, 0)]
    assert [SPACE.policy(index) for index in range(SPACE.num_policies)] == [(4, 0), (3, 0), (2, 0), (1, 0), (0, 0)]


def test_a_pinned_number_of_offloaded_layers_stays() -> None:
    pinned = Space(
        rank=8,
        seq_len=64,
        rows_of=lambda _: 1,
        tokens=(64,),
        loss_chunks=(64,),
        recompute=(0, NUM_LAYERS),
        optimizer="adamw_32bit",
        offload=(2, 2),
    )
    ways = [pinned.policy(index) for index in range(pinned.num_policies)]
    assert ways == [(4, 2), (3, 2), (2, 2), (1, 1), (0, 0)]

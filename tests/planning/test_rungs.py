"""Which sets of levers are looked at, and which is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from qlora_trainer.config.levers import NO_LEVERS
from qlora_trainer.planning.price import Usage
from qlora_trainer.planning.rungs import MIN_GAIN, Lever, fastest_that_fits, pulled_levers
from qlora_trainer.planning.search import Candidate, Space, layout_of

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


def name_of(space: Space) -> str:
    return "+".join(pulled_levers(space.levers, num_offloaded=space.offload[1])) or "none"


def searched(speeds: Mapping[str, float], *, num_kept: int = 0) -> tuple[list[str], Callable[[Space], list[Candidate]]]:
    """Sets that were looked at, and a search in which only those of `speeds` fit."""
    seen: list[str] = []

    def search(space: Space) -> list[Candidate]:
        seen.append(name_of(space))
        if name_of(space) not in speeds:
            return []
        layout = layout_of(space, 64, 64, NUM_LAYERS - num_kept)
        return [Candidate(layout, "adamw_32bit", EMPTY, speeds[name_of(space)])]

    return seen, search


def test_without_need_nothing_is_pulled_or_looked_at() -> None:
    seen, search = searched({"none": 10.0, "offload": 99.0}, num_kept=NUM_LAYERS)
    found, space = fastest_that_fits(SPACE, LEVERS, search)
    assert (name_of(space), seen) == ("none", ["none"])
    assert found[0].layout.levers == NO_LEVERS


@pytest.mark.parametrize("gain, taken", [(MIN_GAIN / 2, "none"), (2 * MIN_GAIN, "base_residency")])
def test_one_lever_is_pulled_where_that_is_clearly_faster_than_to_recompute(gain: float, taken: str) -> None:
    seen, search = searched({"none": 10.0, "offload": 9.0, "base_residency": 10.0 * (1 + gain)})
    _, space = fastest_that_fits(SPACE, LEVERS, search)
    assert name_of(space) == taken
    assert seen == ["none", "offload", "tile_tokens", "base_residency"]


def test_of_single_levers_that_fit_the_fastest_is_taken() -> None:
    seen, search = searched({"offload": 5.0, "tile_tokens": 5.1, "base_residency": 5.0})
    _, space = fastest_that_fits(SPACE, LEVERS, search)
    assert name_of(space) == "tile_tokens"
    assert not any("+" in name for name in seen)


def test_several_are_pulled_only_together_where_none_alone_fits() -> None:
    seen, search = searched({"tile_tokens+offload": 4.0, "tile_tokens+base_residency+offload": 9.0})
    _, space = fastest_that_fits(SPACE, LEVERS, search)
    assert name_of(space) == "tile_tokens+offload"
    assert seen[4:] == ["tile_tokens+offload", "tile_tokens"]


def test_what_is_not_needed_is_left_out_again() -> None:
    speeds = {"tile_tokens+base_residency+offload": 4.0, "base_residency+offload": 5.0}
    _, search = searched(speeds)
    _, space = fastest_that_fits(SPACE, LEVERS, search)
    assert name_of(space) == "base_residency+offload"

    _, search = searched({**speeds, "base_residency+offload": 3.0})
    _, space = fastest_that_fits(SPACE, LEVERS, search)
    assert name_of(space) == "tile_tokens+base_residency+offload", "slower without it"


def test_where_nothing_fits_the_smallest_has_all_levers_pulled() -> None:
    _, search = searched({})
    found, space = fastest_that_fits(SPACE, LEVERS, search)
    assert found == []
    assert name_of(space) == "tile_tokens+base_residency+offload"


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

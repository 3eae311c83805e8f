"""What each lever buys: sets of them compared, on an accelerator and on a CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qlora_trainer.planning.lever_gains import LENGTH_STEP, lever_gains
from qlora_trainer.planning.make_plan import choose
from qlora_trainer.planning.plan import LeverGain, Plan
from qlora_trainer.planning.planner import Planner
from tests.planning.test_price import BUDGETS, RANK, make_planner


@pytest.fixture(scope="module")
def planner() -> Planner:
    return make_planner("llama", BUDGETS["accelerator"])


def at(planner: Planner, budget_bytes: int) -> tuple[Planner, Plan]:
    own = replace(planner, budget=replace(planner.budget, budget_bytes=budget_bytes))
    return own, choose(own, RANK)


def compared(planner: Planner, budget_bytes: int) -> dict[tuple[str, ...], LeverGain]:
    own, plan = at(planner, budget_bytes)
    return {gain.levers: gain for gain in lever_gains(own, plan.knobs)}


def test_each_is_there_alone_and_together_and_saves_what_is_priced(planner: Planner) -> None:
    """Mutation tried: every set priced with no lever pulled."""
    gains = compared(planner, planner.budget.budget_bytes)
    names = [lever.name for lever in planner.levers()]
    assert list(gains) == [(), *((name,) for name in names), tuple(names)]
    none, every = gains[()], gains[tuple(names)]
    for name in ("base_residency", "embedding_residency"):
        assert gains[(name,)].least_bytes < none.least_bytes
        assert every.least_bytes < gains[(name,)].least_bytes
    assert all(gain.tokens_per_second > 0 for gain in gains.values())
    assert gains[("base_residency",)].tokens_per_second <= none.tokens_per_second


def test_a_budget_that_only_some_fit_tells_which(planner: Planner) -> None:
    """Mutation tried: speeds of what does not fit."""
    ample = compared(planner, planner.budget.budget_bytes)
    streamed = ample[("base_residency",)].least_bytes
    gains = compared(planner, streamed)
    for levers, gain in gains.items():
        fits = gain.least_bytes <= streamed
        assert (gain.tokens_per_second > 0) == fits
        own_length = planner.documents.seq_len
        assert (gain.longest_tokens >= own_length) == fits, levers
        assert gain.longest_tokens <= ample[levers].longest_tokens
    assert {levers for levers, gain in gains.items() if gain.tokens_per_second} >= {("base_residency",)}
    assert not gains[()].tokens_per_second


def test_lengths_end_at_the_positions_of_the_model_and_at_a_pinned_micro_batch(planner: Planner) -> None:
    own, plan = at(planner, 2**40)
    positions = planner.dry.model.module.config.max_position_embeddings
    assert {gain.longest_tokens for gain in lever_gains(own, plan.knobs)} == {positions}
    memory = planner.config.memory.model_copy(update={"micro_batch_tokens": 3 * LENGTH_STEP})
    pinned = replace(own, config=own.config.model_copy(update={"memory": memory}))
    assert {gain.longest_tokens for gain in lever_gains(pinned, plan.knobs)} == {3 * LENGTH_STEP}


def test_what_is_pinned_is_not_compared(planner: Planner) -> None:
    own, plan = at(planner, planner.budget.budget_bytes)
    memory = own.config.memory.model_copy(update={"base_residency": "device", "tile_tokens": 64})
    pinned = replace(own, config=own.config.model_copy(update={"memory": memory}))
    gains = lever_gains(pinned, plan.knobs)
    assert [gain.levers for gain in gains][1:-1] == [("offload",), ("optimizer_on_host",), ("embedding_residency",)]
    everything = {
        "activation_offload": False, "optimizer_residency": "paged", "embedding_residency": "device"
    }  # fmt: skip
    memory = memory.model_copy(update=everything)
    assert lever_gains(replace(own, config=own.config.model_copy(update={"memory": memory})), plan.knobs) == ()

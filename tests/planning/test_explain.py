"""What is offered where nothing fits: changes to the smallest plan as it is, with every lever that it pulls."""

from __future__ import annotations

from dataclasses import replace

from qlora_trainer.config.levers import NO_LEVERS
from qlora_trainer.planning.document_lengths import DocumentLengths
from qlora_trainer.planning.full_trace import without_collector
from qlora_trainer.planning.make_plan import choose
from tests.planning.test_make_plan import BARE_GPU, Traced, within


def test_shorter_documents_are_offered_with_the_levers_that_are_pulled() -> None:
    """Fails where their plan is priced without them, as it was: none of any length then seems to fit."""
    traced = Traced(BARE_GPU)
    budget = within(BARE_GPU, round(0.995 * traced.least_bytes()))
    plan = traced.plan(budget.budget_bytes)
    assert not plan.fits
    assert plan.knobs.levers != NO_LEVERS

    (seq_len,) = [change.after for change in plan.would_fit if change.knob == "data.seq_len"]
    documents = DocumentLengths.of_full_length(int(seq_len), global_batch_size=16)
    planner = replace(traced.planner, budget=budget, documents=documents)
    with without_collector():
        assert choose(planner, plan.knobs.rank).fits

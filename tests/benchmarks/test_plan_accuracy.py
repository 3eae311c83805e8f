"""The accuracy benchmark compares every phase, or says which one it could not see."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.plan_accuracy import _compared
from qlora_trainer.planning.price import PHASES

PREDICTED: dict[str, Any] = {"phases": dict.fromkeys(PHASES, 1000), "resident": {"base": 400}}
RUN = dict.fromkeys(("load", "loss", "backward", "optimizer", "eval", "save", "rehearsal"), 1000)


def test_of_run_and_resume_the_one_that_is_further_off_counts() -> None:
    found = _compared(PREDICTED, [RUN | {"save": 990}, RUN | {"save": 900, "resume": 1000}])
    assert found.keys() == {*RUN, "resume"}
    assert found["save"] == (1000, 900)


@pytest.mark.parametrize("phase", [*RUN, "resume"])
def test_a_phase_that_no_profile_shows_is_an_error(phase: str) -> None:
    resumed = RUN | {"resume": 1000}
    del resumed[phase]
    first = {name: value for name, value in RUN.items() if name != phase}
    with pytest.raises(RuntimeError, match=f"no profile shows the phase {phase}"):
        _compared(PREDICTED, [first, resumed])

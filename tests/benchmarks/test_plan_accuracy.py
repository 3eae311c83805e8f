"""The accuracy benchmark compares every phase, or says which one it could not see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.plan_accuracy import BASE, Mapped, Outcome, _compared, _overrides, planned_and_taken
from benchmarks.plan_accuracy_inputs import LEVER_CASES
from benchmarks.plan_accuracy_run import paged_state_bytes, resident_base_bytes
from qlora_trainer.config.load import load_config
from qlora_trainer.hardware.paging import zeros_paged
from qlora_trainer.planning.price import PHASES

PREDICTED: dict[str, Any] = {"phases": dict.fromkeys(PHASES, 1000), "resident": {"base": 400}}
RUN = dict.fromkeys(("load", "loss", "backward", "optimizer", "eval", "save", "rehearsal"), 1000)


def test_of_run_and_resume_the_one_that_is_further_off_counts() -> None:
    found = _compared(PREDICTED, [RUN | {"save": 990}, RUN | {"save": 900, "resume": 1000}])
    assert found.keys() == {*RUN, "resume"}
    assert found["save"] == (1000, 900)


def test_a_rehearsal_is_held_against_the_resume_where_there_is_one() -> None:
    predicted = PREDICTED | {"phases": PREDICTED["phases"] | {"resume": 1100}}
    found = _compared(predicted, [RUN, RUN | {"rehearsal": 1100, "resume": 1100}])
    assert {planned for planned, counted in found.values() if planned != counted} == set()


@pytest.mark.parametrize("phase", [*RUN, "resume"])
def test_a_phase_that_no_profile_shows_is_an_error(phase: str) -> None:
    resumed = RUN | {"resume": 1000}
    del resumed[phase]
    first = {name: value for name, value in RUN.items() if name != phase}
    with pytest.raises(RuntimeError, match=f"no profile shows the phase {phase}"):
        _compared(PREDICTED, [first, resumed])


MIB = 2**20


def outcome(mapped: Mapped) -> Outcome:
    return Outcome(name="a", phases={"eval": (100, 100)}, allocated=(100, 100), resident=((100, 100),), mapped=mapped)


def test_a_lever_that_saves_nothing_of_the_base_fails() -> None:
    """The resident set alone would not tell: it has 64 MiB of room. Mutation tried: without the mapped files."""
    predicted = {"resident": dict.fromkeys(BASE, 2 * MIB) | {"adapter": 100 * MIB}}
    for taken, is_right in ((2 * MIB, True), (11 * MIB, True), (13 * MIB, False), (20 * MIB, False)):
        parts = {"load": {"base": 24 * MIB}, "step": {"base": taken}, "eval": {"base": MIB}}
        found = planned_and_taken(predicted, {"run": parts, "resume": {"load": {"base": 24 * MIB}}})
        assert found == (6 * MIB, taken)
        mapped = Mapped(planned=(24 * MIB, found[0]), taken=(20 * MIB, found[1]))
        assert outcome(mapped).is_right == is_right


def test_what_is_there_of_the_base_is_read_of_its_files_alone(
    disk_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk_folder / "cache"))
    (disk_folder / "cache").mkdir()
    for folder in ("cache", "."):
        save_file({"a": torch.ones(MIB)}, disk_folder / folder / "model.safetensors")
    seen = [resident_base_bytes()]
    with (
        safe_open(disk_folder / "model.safetensors", framework="pt") as other,
        safe_open(disk_folder / "cache" / "model.safetensors", framework="pt") as own,
    ):
        for file in (other, own):
            tensor = file.get_tensor("a")
            assert tensor.sum() == MIB
            seen.append(resident_base_bytes())
            del tensor
    assert seen[:2] == [0, 0]
    assert 4 * MIB <= seen[2] <= 4 * MIB + 2**17


def test_paged_state_is_found_while_it_is_there(disk_folder: Path) -> None:
    before = paged_state_bytes()
    state = zeros_paged(MIB, dtype=torch.float32, device=torch.device("cpu"), folder=disk_folder)
    assert paged_state_bytes() - before == state.nbytes
    del state
    assert paged_state_bytes() == before


def test_an_optimizer_that_a_case_names_is_the_run_s() -> None:
    (paged, *_) = [case for case in LEVER_CASES if "training.optimizer=paged_adamw_32bit" in case.options]
    for case, name in ((paged, "paged_adamw_32bit"), (LEVER_CASES[0], "adamw_32bit")):
        overrides = _overrides(case, "base", Path("a.jsonl"), Path("b.jsonl"), seq_len=8)
        assert load_config(None, overrides).training.optimizer == name

"""The comparison with TRL: its forms, the choice among them, rows, and the figures. Nothing is trained here."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import pytest
import torch

from benchmarks.versus_forms import (
    MEMORY_AXES,
    SPEED_AXES,
    VALUES,
    Form,
    Trial,
    close_to_best,
    descend,
    largeness,
    packs_per_step,
    parse_form,
    slowness,
    variants,
    with_our_order,
)
from benchmarks.versus_inputs import InputSpec, choose_rows
from benchmarks.versus_peer import CountingCollator
from benchmarks.versus_report import fastest_and_smallest, figures, later_speed, median_ratio, speed, table, taken_bytes
from benchmarks.versus_runs import FirstPass

ALL_FORMS = [Form(**dict(zip(VALUES, values, strict=True))) for values in product(*VALUES.values())]


def _trial(form: Form, *, seconds: float = 1.0, peak: int = 100, error: str = "") -> Trial:
    return Trial(
        form=form,
        tokens_of_steps=(100, 100),
        seconds_of_steps=(seconds, seconds),
        import_bytes=10,
        peak_bytes=peak,
        error=error,
    )


def test_every_form_has_a_name_of_its_own_that_is_read_back() -> None:
    assert len({form.name for form in ALL_FORMS}) == len(ALL_FORMS) == 192
    assert all(parse_form(form.name) == form for form in ALL_FORMS)


def test_a_name_of_no_form_is_refused_with_an_example() -> None:
    with pytest.raises(ValueError, match="3-plain-keep-fp32: expected a form such as 8-grouped-keep-fp32-compile-nomm"):
        parse_form("3-plain-keep-fp32")


@pytest.mark.parametrize(
    "name, is_possible",
    [
        ("8-plain-keep-fp32", True),
        ("1-grouped-keep-fp32", False),  # the same as plain
        ("2-grouped-keep-fp32", True),
        ("1-packed-keep-fp32", True),
        ("2-packed-keep-fp32", False),  # three packed rows a step
        ("4-packed-keep-fp32", False),
    ],
)
def test_forms_that_cannot_cut_the_effective_batch_are_passed_over(name: str, is_possible: bool) -> None:
    num_packs = packs_per_step(8, 200.0, 512)

    assert num_packs == 3
    assert parse_form(name).is_possible(8, num_packs) == is_possible


def test_only_the_malloc_setting_is_in_the_environment() -> None:
    assert parse_form("1-plain-keep-fp32").environment == {}
    assert parse_form("1-plain-keep-fp32-nommap").environment == {"MALLOC_MMAP_MAX_": "0"}


def test_variants_differ_in_the_fields_of_the_axis_alone() -> None:
    found = list(variants(Form(micro_batch=1), ("micro_batch", "batching")))

    assert len(found) == 11
    assert {form.dtype for form in found} == {"fp32"}


@pytest.mark.parametrize("best", [form for form in ALL_FORMS if not form.is_compiled], ids=lambda form: form.name)
def test_the_descent_finds_the_best_of_factors_that_do_not_depend_on_each_other(best: Form) -> None:
    def badness(form: Form) -> float:
        wrong: int = sum(getattr(form, name) != getattr(best, name) for name in VALUES)
        return float(1.5**wrong)

    tried: dict[Form, Trial] = {}

    def measure(form: Form) -> Trial:
        tried[form] = tried.get(form) or _trial(form, seconds=badness(form))
        return tried[form]

    found = descend(Form(micro_batch=1), SPEED_AXES, measure=measure, is_possible=lambda _: True, badness=slowness)

    assert found is not None
    assert found.form == best
    assert len(tried) <= 26


def test_memory_is_sought_among_micro_batches_of_one_document() -> None:
    tried: list[Form] = []

    def measure(form: Form) -> Trial:
        tried.append(form)
        return _trial(form, peak=100 - 20 * form.is_recomputed - 10 * (form.dtype == "bf16"))

    found = descend(
        Form(micro_batch=1),
        MEMORY_AXES,
        measure=measure,
        is_possible=lambda form: form.batching != "grouped",
        badness=largeness,
    )

    assert found is not None
    assert found.form == parse_form("1-plain-recompute-bf16")
    assert {form.micro_batch for form in tried} == {1}


def test_what_time_is_not_left_for_does_not_end_the_descent() -> None:
    fast = parse_form("2-plain-keep-fp32")

    def measure(form: Form) -> Trial | None:
        return _trial(form, seconds=0.5 if form == fast else 1.0) if form.micro_batch <= 2 else None

    found = descend(Form(micro_batch=1), SPEED_AXES, measure=measure, is_possible=lambda _: True, badness=slowness)

    assert found is not None
    assert found.form == fast


def test_a_form_that_failed_is_never_the_smallest_and_one_without_a_step_never_the_fastest() -> None:
    failed = _trial(Form(micro_batch=1), peak=20, error="exit code 1")
    nothing = Trial(form=Form(micro_batch=2), error="stopped after 15 s")

    assert largeness(failed) == slowness(nothing) == float("inf")
    assert close_to_best([failed, nothing], largeness, 0.1) == []


@pytest.mark.parametrize("is_compiled", [False, True])
def test_the_first_step_is_left_out_of_a_forms_speed(is_compiled: bool) -> None:
    """As measured: 8 documents padded took 29.3 s, then 11.6, and were beaten by 13.5 and 12.6."""
    large = Form(micro_batch=8, is_compiled=is_compiled)
    trial = Trial(form=large, tokens_of_steps=(1800, 1800), seconds_of_steps=(29.3, 11.6))
    small = Trial(form=Form(micro_batch=1), tokens_of_steps=(1800, 1800), seconds_of_steps=(13.5, 12.6))

    assert 1 / slowness(trial) == pytest.approx(1800 / 11.6)
    assert slowness(trial) < slowness(small)
    assert trial.tokens_per_second == pytest.approx(3600 / 40.9)


def test_a_form_that_was_stopped_in_its_second_step_has_no_speed() -> None:
    assert slowness(Trial(form=Form(micro_batch=8), tokens_of_steps=(100,), seconds_of_steps=(9.0,))) == float("inf")


def test_large_micro_batches_are_found_where_they_are_fast_without_mapped_blocks_only() -> None:
    """One after the other, the two axes would end at the small micro-batch: it is the faster one with mapped blocks.

    Mutation tried: `is_without_mmap` as an axis of its own.
    """
    best = parse_form("8-grouped-keep-fp32-nommap")

    def measure(form: Form) -> Trial:
        return _trial(form, seconds=0.8 if form == best else 1.0 + 0.1 * form.micro_batch - 0.05 * form.is_without_mmap)

    found = descend(Form(micro_batch=1), SPEED_AXES, measure=measure, is_possible=lambda _: True, badness=slowness)

    assert found is not None
    assert found.form == best


@pytest.mark.parametrize(
    "names, added",
    [
        (["2-grouped-keep-fp32", "1-packed-recompute-fp32"], ["1-plain-keep-fp32"]),
        (["8-plain-keep-fp32-nommap"], []),
        (["2-grouped-keep-fp32", "1-plain-recompute-bf16"], []),
    ],
)
def test_losses_are_compared_with_a_form_in_our_order(names: list[str], added: list[str]) -> None:
    assert [form.name for form in with_our_order([parse_form(name) for name in names])] == names + added


class _BenchWithoutRuns:
    """Speeds and sizes by formula: documents one by one are fast, recomputing is small, compiling ends in an error."""

    spec = InputSpec(
        data="",
        model="",
        num_rows=16,
        documents_per_step=8,
        num_steps=2,
        rank=4,
        seeds=(7,),
        num_held_out=0,
        max_length=512,
    )

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def is_possible(self, form: Form) -> bool:
        return form.is_possible(8, 4)

    def peer(self, form: Form, *, seed: int, num_steps: int, **_: Any) -> tuple[Trial, dict[str, Any]]:
        assert seed == 7
        self.asked.append((form.name, num_steps))
        slow = form.micro_batch + 0.3 * form.is_recomputed + (form.dtype == "bf16") - 0.2 * form.is_without_mmap
        peak = 1000 * form.micro_batch - 400 * form.is_recomputed + 100 * form.is_without_mmap
        return _trial(form, seconds=slow, peak=peak, error="no compiler" if form.is_compiled else ""), {}


def test_the_first_pass_finds_the_fastest_and_the_smallest_form() -> None:
    bench = _BenchWithoutRuns()
    first_pass = FirstPass(bench, seconds=60.0)  # type: ignore[arg-type]

    fastest, smallest = first_pass.choose()

    assert fastest.name == "1-plain-keep-fp32-nommap"
    # In the first steps the two dtypes are equally small: both run longer, and the first one stays.
    assert smallest.name == "1-plain-recompute-fp32"
    assert len(bench.asked) == len(set(bench.asked)) < 35
    assert {form.name for form in first_pass.longer} >= {"1-plain-recompute-fp32", "1-plain-recompute-bf16"}
    assert not first_pass.not_tried


def test_a_first_pass_without_time_takes_what_it_has() -> None:
    first_pass = FirstPass(_BenchWithoutRuns(), seconds=0.0)  # type: ignore[arg-type]

    fastest, smallest = first_pass.choose()

    assert fastest == smallest == Form(micro_batch=1)
    assert first_pass.not_tried


def test_forms_close_to_the_best_run_longer() -> None:
    trials = [_trial(Form(micro_batch=size), seconds=seconds) for size, seconds in ((1, 1.05), (2, 1.0), (4, 1.2))]

    assert [form.micro_batch for form in close_to_best(trials, slowness, 0.10)] == [2, 1]


def test_rows_are_the_first_ones_and_the_last_ones_are_held_out() -> None:
    assert choose_rows([5] * 10, 4, 3, is_equal_length=False) == ([0, 1, 2, 3], [7, 8, 9])
    assert choose_rows([5] * 5, 4, 3, is_equal_length=False) == ([0, 1, 2, 3], [4])
    assert choose_rows([5] * 4, 4, 3, is_equal_length=False) == ([0, 1, 2, 3], [])


def test_rows_of_equal_length_are_those_nearest_to_the_median() -> None:
    assert choose_rows([9, 50, 10, 11, 1], 3, 9, is_equal_length=True) == ([0, 2, 3], [1, 4])


def test_real_tokens_are_counted_with_and_without_a_mask() -> None:
    batches = iter(
        [
            {"input_ids": torch.zeros(2, 4), "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])},
            {"input_ids": torch.zeros(1, 9)},
            {"input_ids": torch.zeros(1, 5)},
        ]
    )
    collator = CountingCollator(lambda _: next(batches))

    for _ in range(3):
        collator([])

    assert collator.of_steps(2, 2) == [15, 5]
    assert collator.of_steps(3, 1) == [6, 9, 5]


def _run(*, tokens_per_second: float = 100.0, taken: int = 100, loss: float | None = None, error: str = "") -> Any:
    seconds = 100.0 / tokens_per_second
    run = {"tokens_of_steps": [100, 100], "seconds_of_steps": [seconds, seconds], "import_bytes": 50}
    told: dict[str, Any] = {"process_seconds": 9.0} if error else run | {"process_seconds": 9.0}
    return told | {"peak_bytes": 50 + taken, "error": error, "eval_loss": loss}


def _round(scale: float, **ours: Any) -> dict[str, Any]:
    return {
        "trl:1-plain-keep-fp32": _run(tokens_per_second=100 * scale, taken=400, loss=1.5),
        "ours": _run(tokens_per_second=250 * scale, taken=300, loss=1.25, **ours),
        "trl:1-plain-recompute-fp32": _run(tokens_per_second=80 * scale, taken=200, loss=1.5),
        "ours_half": _run(tokens_per_second=120 * scale, taken=100),
        "ours_smallest": _run(tokens_per_second=50 * scale, taken=60),
    }


def test_ratios_are_medians_of_the_ratios_of_each_round() -> None:
    rounds = [_round(1.0), _round(0.1), _round(3.0)]
    rounds[1]["ours"] = _run(tokens_per_second=40.0, taken=300)  # 4 x the peer's in its round

    assert fastest_and_smallest(rounds) == ("trl:1-plain-keep-fp32", "trl:1-plain-recompute-fp32")
    assert median_ratio(rounds, "ours", "trl:1-plain-keep-fp32", speed) == pytest.approx(2.5)


def test_the_json_has_the_figures_that_were_asked_for() -> None:
    made = figures([_round(1.0), _round(0.5)])

    assert made["speed_ratio"] == pytest.approx(2.5)
    assert made["memory_ratio"] == pytest.approx(1.5)
    assert made["smallest_memory_ratio"] == pytest.approx(0.3)
    assert made["half_memory_ratio"] == pytest.approx(0.5)
    assert made["half_speed_ratio"] == pytest.approx(1.2)
    for side, peak, loss in (("ours", 300, 1.25), ("trl_fastest", 400, 1.5), ("trl_smallest", 200, 1.5)):
        assert made[side]["peak_rss_bytes"] == peak
        assert made[side]["eval_loss"] == pytest.approx(loss)
        assert made[side]["tokens_per_second"] > 0
    assert made["trl_smallest"]["form"] == "1-plain-recompute-fp32"
    assert made["trl_in_our_order"]["form"] == "1-plain-keep-fp32"
    assert made["loss_ratio_in_our_order"] == pytest.approx(1.25 / 1.5)
    assert json.loads(json.dumps(made, allow_nan=False)) == made


def test_without_a_form_in_our_order_no_loss_is_compared() -> None:
    packed = {side.replace("plain", "packed"): run for side, run in _round(1.0).items()}

    made = figures([packed])

    assert made["trl_in_our_order"] is made["loss_ratio_in_our_order"] is None


def test_a_side_that_failed_has_no_memory_and_no_speed_and_says_why() -> None:
    failed = _round(1.0) | {"ours_half": _run(error="0.07 GiB too little")}

    made = figures([failed])

    assert made["half_speed_ratio"] == 0.0
    assert made["half_memory_ratio"] is None
    assert made["ours_half"]["errors"] == ["0.07 GiB too little"]
    json.dumps(made, allow_nan=False)


def test_the_first_step_may_be_left_out() -> None:
    run = _run() | {"tokens_of_steps": [100, 300], "seconds_of_steps": [10.0, 1.0]}

    assert speed(run) == pytest.approx(400 / 11)
    assert later_speed(run) == pytest.approx(300.0)
    assert taken_bytes(run) == 100


def test_the_table_shows_every_side_and_the_forms_that_were_tried() -> None:
    conditions = dict.fromkeys(("mean_tokens", "longest_tokens", "max_length", "num_steps", "documents_per_step"), 8)
    conditions |= {"model": "tiny", "data": "rows.jsonl", "num_rows": 16, "num_held_out": 4, "rank": 4}  # type: ignore[dict-item]
    conditions |= {"is_equal_length": False, "base_eval_loss": 2.0}  # type: ignore[dict-item]
    choice = {"trials": [_trial(Form(micro_batch=1)).as_json()], "not_tried": ["8-plain-keep-bf16"]}
    report = figures([_round(1.0) | {"ours_half": _run(error="too little")}])
    report |= {"conditions": conditions, "choice": choice, "machine_in_words": "2 cores"}

    text = table(report)

    for expected in ("| trl, fastest | 100.0 | 1.00 |", "| ours | 250.0 | 2.50 |", "too little", "8-plain-keep-bf16"):
        assert expected in text
    assert "| 1-plain-keep-fp32 | 100.0 | 100.0 | 1.0 1.0 | 0 |" in text
    assert "| trl, in our order | 100.0 |" in text
    assert "Mean loss over that of TRL's in our order 0.8333." in text

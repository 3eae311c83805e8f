"""The table that adapters are compared by."""

from __future__ import annotations

import math

from rich.console import Console

from qlora_trainer.report.eval_tables import evaluation_table
from qlora_trainer.run.evaluation import Evaluation, Judged


def judged(name: str, loss: float, accuracy: float) -> Judged:
    path = None if name == "base" else f"runs/{name}"
    perplexity = math.exp(loss)
    return Judged(name=name, path=path, loss=loss, perplexity=perplexity, accuracy=accuracy, seconds=1.0)


def shown(evaluation: Evaluation) -> str:
    console = Console(width=120, highlight=False, color_system=None)
    with console.capture() as captured:
        console.print(evaluation_table(evaluation))
    return captured.get()


def made(*lines: Judged, num_dropped: int = 0, num_bad: int = 0) -> Evaluation:
    return Evaluation(
        base="smollm2-135m",
        data="held[out].jsonl",
        seq_len=128,
        num_documents=1200,
        num_supervised_tokens=34567,
        num_dropped=num_dropped,
        num_bad=num_bad,
        compute_dtype="float32",
        judged=lines,
    )


def test_the_base_comes_first_and_the_others_are_compared_with_it() -> None:
    text = shown(made(judged("base", 2.0, 0.25), judged("a", 1.5, 0.5), judged("b", 2.5, 0.125)))
    assert [line.split() for line in text.splitlines()] == [
        ["smollm2-135m", "on", "held[out].jsonl:", "1,200", "documents,", "34,567", "supervised", "tokens"],
        ["adapter", "loss", "of", "base", "perplexity", "token", "accuracy"],
        ["base", "2.0000", "7.39", "25.0%"],
        ["runs/a", "1.5000", "-25.0", "%", "4.48", "50.0%"],
        ["runs/b", "2.5000", "+25.0", "%", "12.18", "12.5%"],
    ]


def test_what_was_left_out_is_told_and_what_is_not_finite_is_shown() -> None:
    text = shown(made(judged("base", 12.0, 0.25), judged("a", math.nan, 0.0), num_dropped=3, num_bad=1))
    assert "34,567 supervised tokens, 3 rows dropped, 1 row bad" in text
    assert "1.6e+05" in text
    assert text.splitlines()[-1].split() == ["runs/a", "nan", "nan", "0.0%"]

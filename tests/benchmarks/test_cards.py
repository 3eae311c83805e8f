"""The page of cards is what the command makes, and a cell is what `plan` says."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import cards
from benchmarks.cards import MODELS, PAGE, Cell, main, merged, table
from benchmarks.marked_tables import marked
from qlora_trainer.config.load import load_config
from qlora_trainer.hardware.gpu_catalogue import CATALOGUE
from qlora_trainer.planning.budget import gpu_budget
from qlora_trainer.planning.make_plan import make_plan
from qlora_trainer.report.frontier_table import LEVER_LETTERS

FITS = Cell(choice="4,096 · r2/28 · s", tokens_per_second=1234.5, missing_bytes=0, longest=8192)
SHORT = replace(FITS, tokens_per_second=0.0, missing_bytes=3 * 2**29, longest=512)


def column(page: str, size: str) -> list[str]:
    """The cells of a model in the page's table."""
    header, _, *rows = [line.strip()[1:-1].split("|") for line in marked(page, cards.NAME).splitlines()]
    number = next(index for index, heading in enumerate(header) if heading.strip().startswith(f"{size}:"))
    return [row[number].strip() for row in rows]


def test_the_page_has_every_card_and_model() -> None:
    for size in MODELS:
        assert len(column(PAGE.read_text(), size)) == len(CATALOGUE)


@pytest.mark.slow
@pytest.mark.parametrize("size, key", [("1B", "rtx-4090"), ("3B", "rtx-5070")])
def test_a_cell_is_what_the_command_makes(size: str, key: str) -> None:
    """A sample; the slow test below compares all of it."""
    number, gpu = next((number, gpu) for number, gpu in enumerate(CATALOGUE) if gpu.key == key)
    (made,) = cards.column(MODELS[size], [gpu])
    assert column(PAGE.read_text(), size)[number] == str(made)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_table_is_what_the_command_makes() -> None:
    """Four minutes where two cores are free."""
    assert main(["--check"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("size, gpu", [("1B", "rtx-3060"), ("8B", "t4"), ("8B", "rtx-4060"), ("14B", "rtx-4090")])
def test_a_cell_is_what_a_plan_says(size: str, gpu: str) -> None:
    """A plan is confirmed by a trace at full depth, and a cell is not: it could promise more."""
    options = [f"model.base={MODELS[size]}", "data.train=none.jsonl", "data.seq_len=2048", "lora.rank=16"]
    plan = make_plan(load_config(None, options), gpu_budget(gpu, None))
    number = next(index for index, known in enumerate(CATALOGUE) if known.key == gpu)
    cell = column(PAGE.read_text(), size)[number]
    if plan.fits:
        assert cell.startswith(f"**{cards.two_digits(plan.predicted.tokens_per_second):,}**/s<br>")
        assert cell.split("<br>")[1].split(" · ")[0] == f"{plan.knobs.micro_batch_tokens:,}"
    else:
        assert cell.startswith(f"{plan.missing_bytes / 2**30:.2f} GiB short")


def test_every_letter_of_the_table_is_explained() -> None:
    """A head in NF4 is never taken unasked, and so has no letter here."""
    page = PAGE.read_text()
    explained = re.findall(r"^\| (\w) \| ", page, re.MULTILINE)
    choices = [
        cell.split("<br>")[1].split(" · ")[1:] for size in MODELS for cell in column(page, size) if "/s<" in cell
    ]
    used = {letter for words in choices for word in words if "GiB" not in word for letter in re.findall(r"[a-z]", word)}
    assert used == set(explained)
    assert set(explained) == {"r", *(letter for letter, _ in LEVER_LETTERS.values())} - {"n"}


def test_what_a_cell_says() -> None:
    assert str(FITS) == "**1,200**/s<br>4,096 · r2/28 · s<br>to 8,192"
    assert str(SHORT) == "1.50 GiB short<br>to 512"
    assert str(replace(SHORT, longest=0)) == "1.50 GiB short"


def test_one_column_takes_the_place_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = table({size: [SHORT] * len(CATALOGUE) for size in MODELS})
    path = tmp_path / "cards.md"
    path.write_text(f"<!-- table: cards -->\n{whole}<!-- end: cards -->\n")
    monkeypatch.setattr(cards, "column", lambda _model: iter([FITS] * len(CATALOGUE)))
    assert main(["--page", str(tmp_path / "cards.md"), "--model", "8B", "--check"]) == 1
    options = ["--model", "8B", "--page", str(path)]

    assert main([*options, "--check"]) == 1
    assert main(options) == 0
    assert main([*options, "--check"]) == 0

    text = path.read_text()
    assert set(column(text, "8B")) == {str(FITS)}
    assert set(column(text, "1B")) == set(column(text, "70B")) == {str(SHORT)}
    assert merged(text, {"8B": [FITS] * len(CATALOGUE)}) == marked(text, cards.NAME)

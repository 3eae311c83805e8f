"""The letters of levers: one for each, in the cells of the table and of the plot that need them, and told once."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from qlora_trainer.config.levers import Levers
from qlora_trainer.planning.plan import Plan
from qlora_trainer.planning.rungs import pulled_levers
from qlora_trainer.report import frontier_plot
from qlora_trainer.report.frontier_table import LEVER_LETTERS, frontier_table, levers_key, levers_label
from tests.report.made_plan import fitting_plan
from tests.report.test_plan_tables import shown

STREAMED = ("base_residency", "offload")  # in whatever order they are pulled
EVERY = tuple(pulled_levers(
    Levers(tile_tokens=1, embedding_residency="host", nf4_head=True, optimizer_on_host=True, base_residency="streamed"),
    num_offloaded=1,
))  # fmt: skip


def plan_with(*levers: tuple[str, ...]) -> Plan:
    """The first cells of its frontier need these, the others nothing."""
    cells = list(fitting_plan().frontier)
    cells[: len(levers)] = [replace(cell, levers=own) for cell, own in zip(cells, levers, strict=False)]
    return replace(fitting_plan(), frontier=tuple(cells))


def test_each_lever_has_a_letter_of_its_own() -> None:
    """Mutation tried: a lever whose letter is another's, or that has none, and would not be told."""
    assert LEVER_LETTERS.keys() == {"offload", *(field.name for field in fields(Levers))} == set(EVERY)
    assert len({letter for letter, _ in LEVER_LETTERS.values()}) == len(LEVER_LETTERS)
    assert len({words for _, words in LEVER_LETTERS.values()}) == len(LEVER_LETTERS)
    assert levers_label(plan_with(EVERY).frontier[0]) == "otehns"


@pytest.mark.parametrize(
    "levers, letters, key",
    [
        (STREAMED, "os", "o inputs offloaded, s base streamed"),
        (("nf4_head",), "n", "n NF4 head"),
        ((), "", ""),
    ],
)
def test_a_cell_says_what_it_needs_and_the_key_what_that_is(levers: tuple[str, ...], letters: str, key: str) -> None:
    plan = plan_with(levers)
    assert (levers_label(plan.frontier[0]), levers_key(plan)) == (letters, key)
    lines = shown(frontier_table(plan))
    row = next(number for number, line in enumerate(lines) if line.split()[:1] == ["8"])
    below = lines[row + 1].split()
    assert below == [below[0], *letters.split(), *(speed for speed in below[1:] if speed != letters)]
    assert (letters in below) == bool(letters)
    assert [line.strip() for line in lines if "inputs offloaded" in line or "NF4 head" in line] == [key] * bool(key)


def test_the_plot_shows_the_same_letters_and_the_key() -> None:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    texts = []
    for plan in (plan_with(STREAMED, ("tile_tokens",)), plan_with()):
        figure = Figure()
        frontier_plot._draw(plan, figure)
        texts.append([found.get_text() for found in figure.findobj(Text)])
    pulled, plain = texts
    assert [text.rpartition("  ")[2] for text in pulled if "tok/s  " in text] == ["os", "t"]
    assert "o inputs offloaded, t tiles, s base streamed" in pulled
    assert not any("tok/s  " in text or "offloaded" in text for text in plain)

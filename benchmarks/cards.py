"""A plan for every card of the catalogue and six sizes of model: the table of docs/cards.md.

    python -m benchmarks.cards [--model 8B ...] [--check]

Each model is traced once for each compute dtype and asked for every card; unlike `plan`, nothing is traced again at
full depth, so that all of it takes a few minutes. All figures are predictions. Exit code 1 if `--check` finds
another table in the file, which is then left as it is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

from benchmarks.marked_tables import markdown, marked, update
from qlora_trainer.config.load import load_config
from qlora_trainer.hardware.device import num_cpu_threads
from qlora_trainer.hardware.device_memory import DeviceMemory
from qlora_trainer.hardware.gpu_catalogue import CATALOGUE, Gpu
from qlora_trainer.model.positions import max_positions
from qlora_trainer.planning.budget import gpu_budget
from qlora_trainer.planning.document_lengths import DocumentLengths
from qlora_trainer.planning.full_trace import without_collector
from qlora_trainer.planning.model_config import read_model_config
from qlora_trainer.planning.planner import Planner
from qlora_trainer.planning.price import Usage
from qlora_trainer.planning.rungs import fastest_that_fits, pulled_levers, with_levers
from qlora_trainer.planning.search import Candidate, Pricer, find, largest_that, smallest
from qlora_trainer.report.frontier_table import LEVER_LETTERS

PAGE, NAME = Path(__file__).resolve().parents[1] / "docs" / "cards.md", "cards"
MODELS = {
    "1B": "llama-3.2-1b",
    "3B": "llama-3.2-3b",
    "8B": "llama-3.1-8b",
    "14B": "qwen2.5-14b",
    "32B": "qwen2.5-32b",
    "70B": "llama-3.1-70b",
}
RANK, SEQ_LEN = 16, 2048
LENGTH_STEP = 256  # of the longest document
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What one card does with one model.

    Attributes:
        choice: what the planner chose, in short; empty where nothing fits.
        tokens_per_second: predicted; 0 where nothing fits.
        missing_bytes: by how much the smallest choice is too large; 0 where it fits.
        longest: tokens of the longest document that fits, whatever must be given up; 0 if not even the shortest does.
    """

    choice: str
    tokens_per_second: float
    missing_bytes: int
    longest: int

    def __str__(self) -> str:
        if self.missing_bytes:
            short = f"{self.missing_bytes / GIB:.2f} GiB short"
            return f"{short}<br>to {self.longest:,}" if self.longest else short
        return f"**{two_digits(self.tokens_per_second):,}**/s<br>{self.choice}<br>to {self.longest:,}"


NOTHING = Cell(choice="not made yet", tokens_per_second=0.0, missing_bytes=0, longest=0)


def column(model: str, gpus: Sequence[Gpu] = CATALOGUE) -> Iterator[Cell]:
    """A model's cells, card by card."""
    config = load_config(
        None, [f"model.base={model}", "data.train=none.jsonl", f"data.seq_len={SEQ_LEN}", f"lora.rank={RANK}"]
    )
    model_config, can_pack = read_model_config(model, None)
    documents = DocumentLengths.of_full_length(SEQ_LEN, global_batch_size=config.training.global_batch_size)
    most = max_positions(model_config) or SEQ_LEN
    prices: dict[tuple[str, DeviceMemory], Pricer] = {}  # of cards that count memory alike

    @cache
    def traced(compute_dtype: str) -> Planner:
        gpu = next(gpu for gpu in CATALOGUE if gpu_budget(gpu.key, None).compute_dtype == compute_dtype)
        return Planner.of(config, gpu_budget(gpu.key, None), model_config, documents, packing=can_pack)

    with without_collector():
        for gpu in gpus:
            budget = gpu_budget(gpu.key, None)
            planner = replace(traced(budget.compute_dtype), budget=budget)
            price = prices.setdefault((budget.compute_dtype, budget.memory), cache(planner.price))
            yield cell(planner, price, most)


def cell(planner: Planner, price: Pricer, max_tokens: int) -> Cell:
    """What the planner's card does.

    Args:
        planner: of the card.
        price: its `price`, which may remember what it was asked.
        max_tokens: the model's positions.
    """

    def least(seq_len: int) -> Usage:
        space = with_levers(planner.space(RANK, seq_len), planner.levers())
        return smallest(space, price, planner.estimate).usage

    search = partial(find, price=price, estimate=planner.estimate, fits=planner.is_within)
    space = planner.space(RANK, SEQ_LEN)
    # Documents are equal and are not cut: what is between two multiples of them takes more memory and no less time.
    space = replace(space, tokens=tuple(tokens for tokens in space.tokens if tokens % SEQ_LEN == 0))
    found, _ = fastest_that_fits(space, planner.levers(), search)
    longest = largest_that(
        lambda tokens: planner.is_well_within(least(tokens)), range(LENGTH_STEP, max_tokens + 1, LENGTH_STEP)
    )
    missing_bytes = 0
    if not found:
        missing_bytes = planner.needed_bytes(least(SEQ_LEN)) - planner.budget.budget_bytes
    return Cell(
        choice=told(found[0], planner) if found else "",
        tokens_per_second=found[0].tokens_per_second if found else 0.0,
        missing_bytes=missing_bytes,
        longest=longest or 0,
    )


def told(chosen: Candidate, planner: Planner) -> str:
    """A choice in short, as the page says how to read it.

    Tokens of a micro-batch, layers recomputed, the letters of what is pulled, and the host memory that it takes.
    """
    layout = chosen.layout
    pulled = pulled_levers(layout.levers, num_offloaded=layout.num_offloaded)
    words = [f"{layout.tokens:,}"]
    if layout.num_recomputed:
        words.append(f"r{layout.num_recomputed}/{planner.dry.num_layers}")
    if pulled:
        words.append("".join(letter for name, (letter, _) in LEVER_LETTERS.items() if name in pulled))
    if chosen.usage.host_bytes:
        words.append(f"{planner.needed_host_bytes(chosen.usage) / GIB:.0f} GiB")
    return " · ".join(words)


def two_digits(number: float) -> int:
    """Rounded as roughly as it is known."""
    return int(float(f"{number:.1e}"))


def label(gpu: Gpu) -> str:
    """A card, with its memory where its name does not tell."""
    return gpu.name if "GB" in gpu.name else f"{gpu.name}, {gpu.nominal_gib} GB"


def table(columns: Mapping[str, Sequence[Cell]]) -> str:
    """Cards in rows, models in columns."""
    header = ["card", *(f"{size}: {MODELS[size]}" for size in columns)]
    rows = [[label(gpu), *(str(cells[number]) for cells in columns.values())] for number, gpu in enumerate(CATALOGUE)]
    return markdown(header, rows)


def merged(page: str, columns: Mapping[str, Sequence[Cell]]) -> str:
    """The page's table with these columns in place of its own of the same models."""
    fresh = _cells(table(columns))
    kept = _cells(marked(page, NAME)) or _cells(table({size: [NOTHING] * len(CATALOGUE) for size in MODELS}))
    places = {heading: number for number, heading in enumerate(fresh[0]) if number}
    rows = [
        [new[places[heading]] if heading in places else old for heading, old in zip(kept[0], row, strict=True)]
        for row, new in zip(kept, fresh, strict=True)
    ]
    return markdown(rows[0], rows[2:])


def _cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in text.splitlines()]


def _columns(sizes: Sequence[str]) -> dict[str, list[Cell]]:
    """The columns of these models, several at the same time in processes of their own."""
    if len(sizes) == 1:
        return {sizes[0]: list(column(MODELS[sizes[0]]))}
    with ProcessPoolExecutor(num_cpu_threads(), mp_context=get_context("spawn")) as pool:
        return dict(zip(sizes, pool.map(_column, sizes), strict=True))


def _column(size: str) -> list[Cell]:
    return list(column(MODELS[size]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the table, or some columns of it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cards", description="Plans for every card.")
    parser.add_argument("--model", action="append", choices=MODELS, help="only this column; may be repeated")
    parser.add_argument("--check", action="store_true", help="compare with docs/cards.md instead of writing it")
    parser.add_argument("--page", type=Path, default=PAGE, help="another file with the marks of the table")
    chosen = parser.parse_args(arguments)
    columns = _columns(chosen.model or list(MODELS))
    made = merged(chosen.page.read_text(), columns) if chosen.model else table(columns)
    is_equal = update(chosen.page, NAME, made, is_check=chosen.check)
    if chosen.check and not is_equal:
        print(f"{chosen.page.name} is not what the command makes: run python -m benchmarks.cards", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

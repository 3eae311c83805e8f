"""How much of what goes through the model is real tokens, packed and padded, on data files.

    python -m benchmarks.packing FILE [FILE ...] [--base smollm2-135m] [--documents 64]

`room` is the tokens over `micro_batch_tokens` times the micro-batches; `row` over the rows as they are computed and
kept: a packed row is only filled up to a multiple of 64, a padded one to its longest document. First for sizes that a
user may set, then for those that the planner tries, by how many micro-batches a usual global batch is to take.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from qlora_trainer.data.chat import RowTokenizer
from qlora_trainer.data.micro_batches import cut, cut_padded
from qlora_trainer.data.order import Order
from qlora_trainer.data.rows import read_rows
from qlora_trainer.model.base import read_tokenizer, resolve_base
from qlora_trainer.planning.search import MAX_MULTIPLES
from qlora_trainer.planning.throughput import Demand
from qlora_trainer.step.batch import ROW_MULTIPLE

SIZES = (512, 1024, 2048, 4096, 8192)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--documents", type=int, default=64)
    arguments = parser.parse_args()
    tokenizer = RowTokenizer(read_tokenizer(resolve_base(arguments.base, with_weights=False).folder))
    print(
        "| file | micro-batch tokens | planned for | packed: room | packed: row | padded: row | micro-batches a step |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    for path in arguments.files:
        rows = read_rows(path)
        lengths = [
            row.document.num_tokens
            for first in range(0, len(rows), 256)
            for row in tokenizer(rows[first : first + 256])
        ]
        lengths = sorted(lengths)[: -(-99 * len(lengths) // 100)]  # `data.seq_len: auto` drops the longest 1 %
        demand = Demand(arguments.documents, float(np.mean(lengths)), min(lengths), float(np.std(lengths)))
        planned = {demand.level_tokens(number): f"{number}" for number in range(MAX_MULTIPLES, 0, -1)}
        sizes = [*((size, "") for size in SIZES), *planned.items()]
        for size, number in ((size, number) for size, number in sizes if size >= max(lengths)):
            packed = _measure(lengths, arguments.documents, size, cut, _packed_row)
            padded = _measure(lengths, arguments.documents, size, cut_padded, _padded_row)
            cells = (number, f"{packed[0]:.1%}", f"{packed[1]:.1%}", f"{padded[1]:.1%}", f"{packed[2]:.1f}")
            print(f"| {path.name} | {size:,} | {' | '.join(cells)} |")


def _measure(
    lengths: Sequence[int],
    documents: int,
    size: int,
    cut_batch: Callable[[Sequence[int], int], list[list[int]]],
    row_tokens: Callable[[Sequence[int]], int],
) -> tuple[float, float, float]:
    """Share of the room and of the rows that is real, and micro-batches a step, over one epoch of whole batches."""
    order = Order(num_documents=len(lengths), global_batch_size=documents, seed=0, epochs=1)
    num_steps = len(lengths) // documents
    real = num_micro_batches = computed = 0
    for step in range(num_steps):
        batch = [lengths[position] for position in order.batch(step)]
        micro_batches = [[batch[position] for position in positions] for positions in cut_batch(batch, size)]
        real += sum(batch)
        num_micro_batches += len(micro_batches)
        computed += sum(row_tokens(micro_batch) for micro_batch in micro_batches)
    return real / (num_micro_batches * size), real / computed, num_micro_batches / num_steps


def _packed_row(lengths: Sequence[int]) -> int:
    return -(-sum(lengths) // ROW_MULTIPLE) * ROW_MULTIPLE


def _padded_row(lengths: Sequence[int]) -> int:
    return max(lengths) * len(lengths)


if __name__ == "__main__":
    main()

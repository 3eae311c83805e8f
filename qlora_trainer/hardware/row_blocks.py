"""Elementwise work row by row, in blocks of rows.

What is neither a product nor attention moves memory: a chain of five operations over [T, I] reads and writes it five
times. In blocks of rows that fit the second-level cache the chain runs from there on a CPU; everywhere its temporaries
are as small as a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

# Of the widest tensor: 1 MiB in fp32 on a CPU; on a GPU enough to keep all of it busy.
CPU_BLOCK_ELEMENTS, GPU_BLOCK_ELEMENTS = 2**18, 2**22


def by_rows(body: Callable[..., None], rows: Sequence[Tensor], *fixed: object) -> None:
    """Call `body(*rows, *fixed)`, which writes into some of `rows`, block by block.

    Args:
        body: computes each row from that row alone; what it allocates is of the size of a block.
        rows: tensors of equally many rows, the first dimension.
        fixed: what is the same for all rows.
    """
    widest = max(tensor[:1].numel() for tensor in rows)
    block = rows_in_block(widest, rows[0].device.type)
    for first in range(0, rows[0].shape[0], block):
        body(*(tensor[first : first + block] for tensor in rows), *fixed)


def rows_in_block(widest: int, device_type: str) -> int:
    """How many rows are taken at once, if the widest tensor has that many elements a row."""
    return max(1, (CPU_BLOCK_ELEMENTS if device_type == "cpu" else GPU_BLOCK_ELEMENTS) // max(1, widest))

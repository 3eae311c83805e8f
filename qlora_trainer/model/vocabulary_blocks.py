"""Parts of a table of the vocabulary, one after the other, in the dtype and on the device of a product with them.

Whole, a table that is stored in 16 bits and multiplied in fp32 would be the largest tensor of a small model's step. And
a table that lives on the host need not be anywhere else: on a GPU a block is copied while the one before is multiplied;
on a CPU it is a part of a mapped file, whose pages are given back behind the product. A table in NF4 is unpacked a
block at a time, wherever its packed bytes live; its scales, a 32nd of them, are on the device.

Legend: V vocabulary, H hidden size.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from qlora_trainer.hardware.mapped_pages import Span, file_spans, give_back
from qlora_trainer.hardware.side_stream import SideStream
from qlora_trainer.model import nf4

BLOCK_ELEMENTS = 2**22  # of the table at once: 8 MiB in 16 bits, 16 MiB in fp32
# Rows that are looked up before their pages are given back; for each the kernel maps 64 KiB (fault_around_bytes).
ROWS_AT_ONCE = 128


def rows_in_block(weight_VH: Tensor) -> int:
    """Tokens of a block; of a table in NF4, which is uint8 [V, H / 2], such that no block of scales is cut."""
    num_tokens, num_columns = weight_VH.shape
    if weight_VH.dtype == torch.uint8:
        return min(num_tokens, nf4.rows_at_once((num_tokens, 2 * num_columns), BLOCK_ELEMENTS))
    return min(num_tokens, max(1, BLOCK_ELEMENTS // num_columns))


@dataclass(frozen=True, slots=True)
class VocabularyBlocks:
    """A table in blocks, and what they pass through.

    Attributes:
        weight_VH: the table; in NF4 uint8 [V, H / 2].
        upcast: a block in the dtype of the product; None where that is the table's own, or it is in NF4.
        arriving: on the device of the product, two blocks; none where the table is there.
        stream: on which they are copied; None where there are none.
        pages: of the mapped file that the table is in, where they are given back after use.
        is_on_host: whether the table lives on the host.
        scales: of a table in NF4; None for one that is dense.
        dtype: of the product; None where `scales` are.
    """

    weight_VH: Tensor
    upcast: Tensor | None
    arriving: Sequence[Tensor]
    pages: Span | None
    is_on_host: bool
    scales: nf4.BlockScales | None = None
    dtype: torch.dtype | None = None
    stream: SideStream | None = None

    @classmethod
    def of(
        cls, weight_VH: Tensor, like: Tensor, *, is_on_host: bool, scales: nf4.BlockScales | None = None
    ) -> VocabularyBlocks:
        """Blocks for products with `like`.

        Args:
            weight_VH: the table; in NF4 uint8 [V, H / 2].
            like: of the dtype and on the device of the products.
            is_on_host: whether the table lives on the host: else, and where it is used as it is stored, it is one
                block.
            scales: of a table in NF4, on the device of the products.
        """
        shape = (rows_in_block(weight_VH), weight_VH.shape[1])
        upcast = like.new_empty(shape) if scales is None and weight_VH.dtype != like.dtype else None
        arriving: list[Tensor] = []
        if weight_VH.device != like.device:
            arriving = [weight_VH.new_empty(shape, device=like.device) for _ in range(2)]
        stream = SideStream(like.device) if arriving else None
        pages = _pages(weight_VH) if is_on_host and like.device.type == "cpu" else None
        dtype = None if scales is None else like.dtype
        return cls(weight_VH, upcast, arriving, pages, is_on_host, scales, dtype, stream)

    @property
    def is_cut(self) -> bool:
        """Whether there is more than one block."""
        return self.is_on_host or self.upcast is not None or self.scales is not None

    def each(self) -> Iterator[tuple[slice, Tensor]]:
        """Which tokens, and their rows; a block is good until the next one is asked for."""
        num_tokens = self.weight_VH.shape[0]
        if not self.is_cut:
            yield slice(0, num_tokens), self.weight_VH
            return
        step = rows_in_block(self.weight_VH)
        blocks = [slice(first, min(first + step, num_tokens)) for first in range(0, num_tokens, step)]
        in_place = (self.weight_VH[block] for block in blocks)
        rows = in_place if self.stream is None else self._arrived(blocks, self.stream)
        for block, own_VH in zip(blocks, rows, strict=True):
            yield block, self._as_multiplied(block, own_VH)
            if self.pages is not None:
                _give_back(self.weight_VH, block, self.pages)

    def _as_multiplied(self, block: slice, own_VH: Tensor) -> Tensor:
        if self.scales is not None and self.dtype is not None:
            shape = (own_VH.shape[0], 2 * own_VH.shape[1])
            return nf4.dequantize_part(own_VH, self.scales, block.start, shape, self.dtype)
        return own_VH if self.upcast is None else self.upcast[: own_VH.shape[0]].copy_(own_VH)

    def _arrived(self, blocks: Sequence[slice], stream: SideStream) -> Iterator[Tensor]:
        """Blocks on the device: the next one is copied while this one is multiplied."""
        on_device = [self.arriving[number % 2][: block.stop - block.start] for number, block in enumerate(blocks)]
        stream.copy(on_device[0], self.weight_VH[blocks[0]])
        for number, own_VH in enumerate(on_device):
            stream.join()
            if number + 1 < len(blocks):
                stream.copy(on_device[number + 1], self.weight_VH[blocks[number + 1]])
            yield own_VH


def look_up_on_host(weight_VH: Tensor, ids: Tensor, device: torch.device) -> Tensor:
    """Rows of a table that lives on the host, on `device`: [..., H] in the table's dtype.

    Args:
        weight_VH: the table.
        ids: int64 [...]; where they are on another device than the host, the host waits for them.
        device: where the rows are wanted.
    """
    flat = ids.to(weight_VH.device).flatten()
    rows = (
        SideStream(device).host_memory(flat.numel() * weight_VH.shape[1], weight_VH.dtype).view(-1, weight_VH.shape[1])
    )
    if device.type != "cpu" or is_fake(weight_VH):
        torch.index_select(weight_VH, 0, flat, out=rows)
        return rows.to(device, non_blocking=True).view(*ids.shape, -1)
    # In the order of the table, so that the rows of a piece share pages.
    order, pages = flat.argsort(), _pages(weight_VH)
    for piece in order.split(ROWS_AT_ONCE):
        rows[piece] = weight_VH[flat[piece]]
        if pages is not None:
            give_back([pages])
    return rows.view(*ids.shape, -1)


def _pages(weight_VH: Tensor) -> Span | None:
    """Of the mapped file that a table is in; None in a dry run.

    Raises:
        ValueError: it is in none.
    """
    if is_fake(weight_VH):
        return None
    (pages,) = file_spans([weight_VH])
    return pages


def _give_back(weight_VH: Tensor, rows: slice, pages: Span) -> None:
    """The pages of some rows."""
    row_bytes = weight_VH.stride(0) * weight_VH.itemsize
    first = weight_VH.data_ptr() + rows.start * row_bytes
    last = first + (rows.stop - rows.start) * row_bytes
    page = mmap.PAGESIZE
    give_back([Span(max(pages.first, first // page * page), min(pages.last, -(-last // page) * page))])

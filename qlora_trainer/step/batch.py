"""Documents become the tensors of one micro-batch: packed into one row, or padded, one a row.

Legend: B rows, T tokens a row, N supervised positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qlora_trainer.model.random_draws import key32, token_keys
from qlora_trainer.step.document import IGNORE_INDEX, Document

# Packed rows are filled up to a multiple of this. Every new length of a row makes oneDNN compile and keep about 20
# matrix products (12 MB a length: 0.9 GB in 50 steps), and makes CUDA's allocator split its blocks anew.
ROW_MULTIPLE = 64


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What goes through the model at once.

    Attributes:
        input_ids_BT, position_ids_BT: int64; positions restart at 0 in each document.
        document_lengths: lengths that cut each row into documents.
        source_positions_N: int64 indices into the B x T positions, those whose next token is trained on.
        targets_N: int64, that next token.
        row_keys_T: int64 [B x T], one dropout key a token.
        num_tokens: real tokens, padding left out.
        row_lengths: those of each row, where rows are padded; None where there is one row.
    """

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    document_lengths: tuple[int, ...]
    source_positions_N: Tensor
    targets_N: Tensor
    row_keys_T: Tensor
    num_tokens: int
    row_lengths: tuple[int, ...] | None = None

    def to(self, device: torch.device, *, are_ids_looked_up_here: bool = False) -> MicroBatch:
        """The same micro-batch on `device`; its tokens' numbers stay where they are, where they are looked up there."""
        ids_BT = self.input_ids_BT
        return MicroBatch(
            input_ids_BT=ids_BT if are_ids_looked_up_here else ids_BT.to(device, non_blocking=True),
            position_ids_BT=self.position_ids_BT.to(device, non_blocking=True),
            document_lengths=self.document_lengths,
            source_positions_N=self.source_positions_N.to(device, non_blocking=True),
            targets_N=self.targets_N.to(device, non_blocking=True),
            row_keys_T=self.row_keys_T.to(device, non_blocking=True),
            num_tokens=self.num_tokens,
            row_lengths=self.row_lengths,
        )


def make_micro_batch(documents: Sequence[Document], *, seed: int, step: int, packing: bool) -> MicroBatch:
    """Whole documents, one after the other in one row, or (`packing=False`) one a row, padded at the end.

    Padding needs no mask. In a row of its own document it comes last, and attention is causal; a packed row is filled
    up to `ROW_MULTIPLE` by a document of padding alone. No padded position is trained on.

    Args:
        documents: at least one.
        seed, step: with each document's index they fix every dropout draw.
        packing: one row of documents, or one document a row.
    """
    row_length = None if packing else max(document.num_tokens for document in documents)
    keys, lengths, ids, positions, sources, targets = [], [], [], [], [], []
    first = 0
    for document in documents:
        num_tokens = document.num_tokens
        room = num_tokens if row_length is None else row_length
        padding = (0, room - num_tokens)
        ids.append(np.pad(document.input_ids_T, padding))
        positions.append(np.arange(room, dtype=np.int64))
        supervised = np.flatnonzero(document.labels_T[1:] != IGNORE_INDEX)
        sources.append(supervised + first)
        targets.append(document.labels_T[1:][supervised])
        keys.append(key32("document", seed, step, document.index))
        lengths.append(room)
        first += room
    if row_length is None and first % ROW_MULTIPLE:
        filling = ROW_MULTIPLE - first % ROW_MULTIPLE
        ids.append(np.zeros(filling, dtype=np.int32))
        positions.append(np.arange(filling, dtype=np.int64))
        keys.append(0)
        lengths.append(filling)
    num_rows = 1 if row_length is None else len(documents)
    return MicroBatch(
        input_ids_BT=_int64(ids).view(num_rows, -1),
        position_ids_BT=_int64(positions).view(num_rows, -1),
        document_lengths=tuple(lengths) if row_length is None else (row_length,),
        source_positions_N=_int64(sources),
        targets_N=_int64(targets),
        row_keys_T=token_keys(keys, lengths),
        num_tokens=sum(document.num_tokens for document in documents),
        row_lengths=None if packing else tuple(document.num_tokens for document in documents),
    )


def _int64(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False))

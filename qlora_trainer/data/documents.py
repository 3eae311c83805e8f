"""The documents of a store that are trained on or held out: whole rows, or pieces of those that were too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, overload

import numpy as np
from numpy.typing import NDArray

from qlora_trainer.data.document_store import DocumentStore
from qlora_trainer.step.document import IGNORE_INDEX, Document

PIECE = np.dtype([("row", "<i4"), ("first", "<i4"), ("num_tokens", "<i4"), ("num_supervised", "<i4")])


@dataclass(frozen=True, slots=True, eq=False)
class Documents(Sequence[Document]):
    """N documents, each read from disk when it is asked for.

    Attributes:
        store: where they lie.
        pieces_N: of dtype `PIECE`, in row order: the row of each, its first token in that row (0 for whole rows), its
            tokens, and those of them that are learned.
        bos_token_id: begins every piece of a row that began with it.
    """

    store: DocumentStore
    pieces_N: NDArray[np.void]
    bos_token_id: int | None = None

    @classmethod
    def of_rows(cls, store: DocumentStore, rows_N: NDArray[np.int32], *, bos_token_id: int | None) -> Self:
        """Those of `rows_N` that have a token to learn."""
        rows_N = rows_N[store.num_supervised_N[rows_N] > 0]
        pieces_N = np.zeros(rows_N.size, dtype=PIECE)
        pieces_N["row"] = rows_N
        pieces_N["num_tokens"] = store.lengths_N[rows_N]
        pieces_N["num_supervised"] = store.num_supervised_N[rows_N]
        return cls(store, pieces_N, bos_token_id)

    @property
    def lengths_N(self) -> NDArray[np.int32]:
        """Tokens of each."""
        return np.asarray(self.pieces_N["num_tokens"])

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest one; 0 if there is none."""
        return int(self.lengths_N.max(initial=0))

    def __len__(self) -> int:
        return int(self.pieces_N.size)

    @overload
    def __getitem__(self, position: int) -> Document: ...
    @overload
    def __getitem__(self, position: slice) -> list[Document]: ...
    def __getitem__(self, position: int | slice) -> Document | list[Document]:
        """The document at `position`; its `index` is its row.

        A piece that is not its row's first begins with BOS where the row does, else with the last token of the piece
        before it: so every token is learned once, from something before it.
        """
        if isinstance(position, slice):
            return [self[number] for number in range(*position.indices(len(self)))]
        row, first, num_tokens, _ = self.pieces_N[position].item()
        ids_T, is_learned_T = self.store.read(row, first, num_tokens)
        labels_T = np.where(is_learned_T, ids_T, np.int32(IGNORE_INDEX))
        if first:
            labels_T[0] = IGNORE_INDEX
            row_begins_with = int(self.store.read(row, 0, 1)[0][0])
            if row_begins_with == self.bos_token_id:
                ids_T = ids_T.copy()
                ids_T[0] = row_begins_with
        return Document(index=row, input_ids_T=ids_T, labels_T=labels_T)

    def cut_to(self, seq_len: int, *, pieces: bool) -> Self:
        """Documents of at most `seq_len` tokens: in place of a longer one its first tokens, or all its `pieces`.

        Pieces without a token to learn are left out.
        """
        is_long_N = self.lengths_N > seq_len
        cut = [piece for whole in self.pieces_N[is_long_N] for piece in self._cut(whole.item(), seq_len, pieces=pieces)]
        merged_N = np.concatenate([self.pieces_N[~is_long_N], np.array(cut, dtype=PIECE)])
        return type(self)(self.store, np.sort(merged_N, order=("row", "first")), self.bos_token_id)

    def kept(self, is_kept_N: NDArray[np.bool_]) -> Self:
        """Those that are marked."""
        return type(self)(self.store, self.pieces_N[is_kept_N], self.bos_token_id)

    def _cut(self, whole: tuple[int, int, int, int], seq_len: int, *, pieces: bool) -> list[tuple[int, int, int, int]]:
        """The pieces of a row; consecutive ones share a token."""
        row, _, num_tokens, _ = whole
        is_learned_T = self.store.read(row, 0, num_tokens)[1]
        firsts = range(0, num_tokens - 1, seq_len - 1) if pieces else (0,)
        ends = [(first, min(first + seq_len, num_tokens)) for first in firsts]
        counted = [(row, first, end - first, int(is_learned_T[first + 1 : end].sum())) for first, end in ends]
        return [piece for piece in counted if piece[3]]

"""The documents of a store that are trained on or held out: whole rows, or pieces of those that were too long."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from qlora_trainer.data.array_file import ArrayFile
from qlora_trainer.data.document_store import DocumentStore
from qlora_trainer.data.length_counts import LengthCounts
from qlora_trainer.step.document import IGNORE_INDEX, Document

PIECE = np.dtype([("row", "<i4"), ("first", "<i4"), ("num_tokens", "<i4"), ("num_supervised", "<i4")])


@dataclass(frozen=True, slots=True, eq=False)
class Documents(Sequence[Document]):
    """N documents, each read from disk when it is asked for.

    Attributes:
        store: where they lie.
        pieces: of dtype `PIECE`, in row order: the row of each, its first token in that row (0 for whole rows), its
            tokens, and those of them that are learned.
        lengths: tokens of all of them.
        bos_token_id: begins every piece of a row that began with it.
    """

    store: DocumentStore
    pieces: ArrayFile
    lengths: LengthCounts
    bos_token_id: int | None = None

    @classmethod
    def of_rows(cls, store: DocumentStore, rows: ArrayFile, *, bos_token_id: int | None) -> Self:
        """Those of `rows`, which ascend, that have a token to learn.

        Raises:
            StorageError: the cache folder cannot be written.
        """
        return cls._of(store, (_whole_rows(store, rows_N) for rows_N in rows.chunks()), bos_token_id)

    @classmethod
    def _of(cls, store: DocumentStore, parts: Iterable[NDArray[np.void]], bos_token_id: int | None) -> Self:
        pieces = ArrayFile(PIECE, parts)
        lengths = LengthCounts.of(pieces_N["num_tokens"] for pieces_N in pieces.chunks())
        return cls(store, pieces, lengths, bos_token_id)

    @property
    def num_supervised_tokens(self) -> int:
        """Tokens of all documents that are learned."""
        return sum(int(pieces_N["num_supervised"].sum(dtype=np.int64)) for pieces_N in self.pieces.chunks())

    @property
    def num_rows(self) -> int:
        """Rows of which at least a piece is here."""
        return num_rows_of(pieces_N["row"] for pieces_N in self.pieces.chunks())

    def num_tokens(self, position: int) -> int:
        """Tokens of one document."""
        return int(self.pieces[position][2])

    def __len__(self) -> int:
        return len(self.pieces)

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
        row, first, num_tokens, _ = self.pieces[position]
        ids_T, is_learned_T = self.store.read(row, first, num_tokens)
        labels_T = np.where(is_learned_T, ids_T, np.int32(IGNORE_INDEX))
        if first:
            labels_T[0] = IGNORE_INDEX
            row_begins_with = int(self.store.read(row, 0, 1)[0][0])
            if row_begins_with == self.bos_token_id:
                ids_T = ids_T.copy()
                ids_T[0] = row_begins_with
        return Document(index=row, input_ids_T=ids_T, labels_T=labels_T)

    def within(self, seq_len: int) -> Self:
        """Those of at most `seq_len` tokens."""
        if self.lengths.longest <= seq_len:
            return self
        short = (pieces_N[pieces_N["num_tokens"] <= seq_len] for pieces_N in self.pieces.chunks())
        return self._of(self.store, short, self.bos_token_id)

    def cut_to(self, seq_len: int, *, pieces: bool) -> Self:
        """Documents of at most `seq_len` tokens: in place of a longer one its first tokens, or all its `pieces`.

        Pieces without a token to learn are left out.
        """
        if self.lengths.longest <= seq_len:
            return self
        return self._of(self.store, self._cut_all(seq_len, pieces=pieces), self.bos_token_id)

    def _cut_all(self, seq_len: int, *, pieces: bool) -> Iterator[NDArray[np.void]]:
        for whole_N in self.pieces.chunks():
            begin = 0
            for position in np.flatnonzero(whole_N["num_tokens"] > seq_len).tolist():
                yield whole_N[begin:position]
                yield np.array(self._cut(whole_N[position].item(), seq_len, pieces=pieces), dtype=PIECE)
                begin = position + 1
            yield whole_N[begin:]

    def _cut(self, whole: tuple[int, int, int, int], seq_len: int, *, pieces: bool) -> list[tuple[int, int, int, int]]:
        """The pieces of a row; consecutive ones share a token."""
        row, _, num_tokens, _ = whole
        is_learned_T = self.store.read(row, 0, num_tokens)[1]
        firsts = range(0, num_tokens - 1, seq_len - 1) if pieces else (0,)
        ends = [(first, min(first + seq_len, num_tokens)) for first in firsts]
        counted = [(row, first, end - first, int(is_learned_T[first + 1 : end].sum())) for first, end in ends]
        return [piece for piece in counted if piece[3]]


def num_rows_of(parts: Iterable[NDArray[Any]]) -> int:
    """How many different rows there are among numbers that ascend, and come some at a time."""
    num_rows, last = 0, -1
    for rows_N in parts:
        num_rows += int(np.count_nonzero(np.diff(rows_N, prepend=last)))
        last = int(rows_N[-1]) if rows_N.size else last
    return num_rows


def _whole_rows(store: DocumentStore, rows_N: NDArray[np.integer[Any]]) -> NDArray[np.void]:
    records_N = store.records(rows_N)
    pieces_N = np.zeros(rows_N.size, dtype=PIECE)
    pieces_N["row"] = rows_N
    pieces_N["num_tokens"] = store.lengths(rows_N)
    pieces_N["num_supervised"] = records_N["num_supervised"]
    return pieces_N[records_N["num_supervised"] > 0]

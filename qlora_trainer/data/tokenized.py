"""What is left of data after tokenising, and what happens to documents that are too long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qlora_trainer.data.rows import Row
from qlora_trainer.errors import DataError
from qlora_trainer.step.document import IGNORE_INDEX, Document

Overlong = Literal["drop", "truncate", "split", "error"]
SEQ_LEN_MULTIPLE = 64


@dataclass(frozen=True, slots=True)
class TokenizedData:
    """Documents, and what became of the rows.

    Attributes:
        path: the files, as errors name them; empty if there were no rows.
        documents: in row order.
        num_rows: rows that went in.
        num_dropped_overlong: rows left out because they are longer than the sequence length.
        num_dropped_untrainable: rows left out because no token of them would be learned.
        num_truncated: rows of which the end was cut off.
        num_split: rows that became several documents.
        num_rewritten_turns: answers that are read but not learned, since the chat template rewrites them.
    """

    path: str
    documents: tuple[Document, ...]
    num_rows: int
    num_dropped_overlong: int = 0
    num_dropped_untrainable: int = 0
    num_truncated: int = 0
    num_split: int = 0
    num_rewritten_turns: int = 0

    @property
    def num_dropped(self) -> int:
        return self.num_dropped_overlong + self.num_dropped_untrainable

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        return [document.num_tokens for document in self.documents]

    @property
    def num_tokens(self) -> int:
        return sum(document.num_tokens for document in self.documents)

    @property
    def num_supervised_tokens(self) -> int:
        return sum(document.num_supervised_tokens for document in self.documents)


def fit_documents(
    data: TokenizedData,
    seq_len: int,
    *,
    overlong: Overlong,
    max_dropped_share: float,
    bos_token_id: int | None,
    rows: Sequence[Row],
) -> TokenizedData:
    """Makes every document at most `seq_len` long.

    Args:
        data: tokenised documents.
        seq_len: longest document that is kept.
        overlong: what becomes of longer ones.
        max_dropped_share: share of the rows that may be dropped.
        bos_token_id: begins every piece of a split document that began with it.
        rows: what was tokenised, for errors.

    Returns:
        The rest, with what was done counted.

    Raises:
        DataError: too many rows are dropped or none is left, or one is too long and `overlong` is "error".
    """
    documents: list[Document] = []
    num_overlong = num_dropped = num_untrainable = 0
    for document in data.documents:
        if document.num_tokens <= seq_len:
            documents.append(document)
            continue
        num_overlong += 1
        if overlong == "error":
            raise _overlong_row(document, seq_len, rows)
        if overlong == "drop":
            num_dropped += 1
            continue
        pieces = [_piece(document, 0, seq_len)] if overlong == "truncate" else _pieces(document, seq_len, bos_token_id)
        learned = [piece for piece in pieces if piece.num_supervised_tokens]
        num_untrainable += not learned
        documents += learned
    changed = num_overlong - num_dropped - num_untrainable
    fitted = replace(
        data,
        documents=tuple(documents),
        num_dropped_overlong=data.num_dropped_overlong + num_dropped,
        num_dropped_untrainable=data.num_dropped_untrainable + num_untrainable,
        num_truncated=changed if overlong == "truncate" else 0,
        num_split=changed if overlong == "split" else 0,
    )
    require_most_rows(fitted, max_dropped_share, seq_len)
    return fitted


def require_most_rows(data: TokenizedData, max_dropped_share: float, seq_len: int | None = None) -> None:
    """Refuses data of which more is dropped than outliers: the run would silently not learn a part of it.

    Raises:
        DataError: more than the share is dropped, or nothing is left.
    """
    if data.documents and data.num_dropped <= round(max_dropped_share * data.num_rows, 6):
        return
    if not data.num_rows:
        return
    reasons = []
    if data.num_dropped_overlong:
        reasons.append(f"{data.num_dropped_overlong} longer than {seq_len} tokens")
    if data.num_dropped_untrainable:
        reasons.append(f"{data.num_dropped_untrainable} without a token to learn")
    fix = (
        "Raise data.seq_len or data.max_dropped_share, or set data.overlong to truncate or split."
        if data.num_dropped_overlong
        else "See data.train_on, weights and the chat template; data.max_dropped_share allows it."
    )
    raise DataError(
        where=data.path,
        found=f"{data.num_dropped} of {data.num_rows} rows that cannot be trained on ({', '.join(reasons)})",
        expected=f"at most {100 * max_dropped_share:g} %",
        fix=fix,
    )


def choose_seq_len(lengths: Sequence[int], max_positions: int, *, overlong: Overlong, max_dropped_share: float) -> int:
    """The smallest multiple of 64 that holds 99 % of the documents uncut, or all positions the base has.

    Args:
        lengths: tokens of each document, at least one.
        max_positions: positions the base was built for (`max_position_embeddings`).
        overlong: what becomes of the others; "error" leaves no others.
        max_dropped_share: below 1 % it leaves no others.

    Returns:
        Tokens.

    Raises:
        ValueError: there are no documents.
    """
    if not lengths:
        raise ValueError("no documents to choose a sequence length for")
    uncut_percent = 100 if overlong == "error" or max_dropped_share < 0.01 else 99
    num_uncut = -(-len(lengths) * uncut_percent // 100)
    longest_uncut = sorted(lengths)[num_uncut - 1]
    return min(-(-longest_uncut // SEQ_LEN_MULTIPLE) * SEQ_LEN_MULTIPLE, max_positions)


def changes_told(data: TokenizedData) -> list[str]:
    """What was done to rows that are kept, a line each."""
    counts = {
        "rows were cut to data.seq_len": data.num_truncated,
        "rows were split into documents of at most data.seq_len": data.num_split,
        "earlier answers are read, not learned: the chat template rewrites them": data.num_rewritten_turns,
    }
    return [f"{count:,} {what}" for what, count in counts.items() if count]


def _overlong_row(document: Document, seq_len: int, rows: Sequence[Row]) -> DataError:
    row = next(row for row in rows if row.index == document.index)
    return DataError(
        where=row.where,
        found=f"a row of {document.num_tokens} tokens",
        expected=f"at most data.seq_len = {seq_len}, since data.overlong is error",
        fix="Raise data.seq_len, shorten the row, or set data.overlong to drop, truncate or split.",
    )


def _piece(document: Document, first: int, end: int) -> Document:
    """A copy: a view would keep the whole document in memory."""
    return replace(
        document, input_ids_T=document.input_ids_T[first:end].copy(), labels_T=document.labels_T[first:end].copy()
    )


def _pieces(document: Document, seq_len: int, bos_token_id: int | None) -> Iterator[Document]:
    """Consecutive pieces. They share the index, and with it their draws of one step: those of one row.

    A piece that follows begins with BOS where the document does, else with the last token of the one before it: so
    every token is learned once, from something before it.
    """
    has_bos = bos_token_id is not None and int(document.input_ids_T[0]) == bos_token_id
    yield _piece(document, 0, seq_len)
    for first in range(seq_len - 1, document.num_tokens - 1, seq_len - 1):
        piece = _piece(document, first, first + seq_len)
        piece.labels_T[0] = IGNORE_INDEX
        if has_bos:
            piece.input_ids_T[0] = document.input_ids_T[0]
        yield piece

"""What is left of data after tokenising, and what happens to documents that are too long."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qlora_trainer.data.array_file import ArrayFile
from qlora_trainer.data.document_store import DocumentStore
from qlora_trainer.data.documents import Documents, num_rows_of
from qlora_trainer.data.length_counts import LengthCounts
from qlora_trainer.errors import DataError

Overlong = Literal["drop", "truncate", "split", "error"]
SEQ_LEN_MULTIPLE = 64
PERCENTILES = (50, 90, 99, 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedData:
    """Documents, and what became of the rows.

    Attributes:
        path: the files, as errors name them; empty if there were no rows.
        documents: in row order.
        num_rows: good rows that went in.
        num_bad: rows of their files that are no conversation or text and were passed over.
        num_dropped_overlong: rows left out because they are longer than the sequence length.
        num_dropped_untrainable: rows left out because no token of them would be learned.
        num_truncated: rows of which the end was cut off.
        num_split: rows that became several documents.
        num_rewritten_turns: answers that are read but not learned, since the chat template rewrites them.
        num_lost_names: messages whose `name` the chat template does not render.
    """

    path: str
    documents: Documents
    num_rows: int
    num_bad: int = 0
    num_dropped_overlong: int = 0
    num_dropped_untrainable: int = 0
    num_truncated: int = 0
    num_split: int = 0
    num_rewritten_turns: int = 0
    num_lost_names: int = 0

    @property
    def num_dropped(self) -> int:
        return self.num_dropped_overlong + self.num_dropped_untrainable

    @property
    def num_tokens(self) -> int:
        return self.documents.lengths.num_tokens

    @property
    def num_supervised_tokens(self) -> int:
        return self.documents.num_supervised_tokens

    @property
    def num_kept_rows(self) -> int:
        """Rows of which at least a piece is a document."""
        return self.documents.num_rows

    @property
    def num_stopping_rows(self) -> int:
        """Those of them of which a stop token is learned: one that is cut may lose it."""

        def stopping() -> Iterator[NDArray[np.int32]]:
            for pieces_N in self.documents.pieces.chunks():
                first_stop_N = self.documents.store.records(pieces_N["row"])["first_stop"]
                ends_N = pieces_N["first"] + pieces_N["num_tokens"]
                yield pieces_N["row"][(first_stop_N >= pieces_N["first"]) & (first_stop_N < ends_N)]

        return num_rows_of(stopping())


def select(store: DocumentStore, rows: ArrayFile, *, bos_token_id: int | None, num_bad: int = 0) -> TokenizedData:
    """Some rows of a store, whatever their length.

    Args:
        store: all rows.
        rows: their numbers, ascending; a held-out part may be empty.
        bos_token_id: see `Documents`.
        num_bad: see `TokenizedData`; 0 for a part whose files are counted with another part.

    Raises:
        StorageError: the cache folder cannot be written.
    """
    paths = store.paths(rows)
    documents = Documents.of_rows(store, rows, bos_token_id=bos_token_id)
    num_rewritten = num_lost_names = 0
    for rows_N in rows.chunks():
        records_N = store.records(rows_N)
        num_rewritten += int(records_N["num_rewritten"].sum(dtype=np.int64))
        num_lost_names += int(records_N["num_lost_names"].sum(dtype=np.int64))
    return TokenizedData(
        path=f"{paths[0]} and {len(paths) - 1} more" if len(paths) > 1 else "".join(paths),
        documents=documents,
        num_rows=len(rows),
        num_bad=num_bad,
        num_dropped_untrainable=len(rows) - len(documents),
        num_rewritten_turns=num_rewritten,
        num_lost_names=num_lost_names,
    )


def fit_documents(
    data: TokenizedData, seq_len: int, *, overlong: Overlong, max_dropped_share: float | None
) -> TokenizedData:
    """Makes every document at most `seq_len` long.

    Args:
        data: tokenised documents, whole rows.
        seq_len: longest document that is kept.
        overlong: what becomes of longer ones.
        max_dropped_share: share of the rows that may be dropped; None lets all be.

    Returns:
        The rest, with what was done counted.

    Raises:
        DataError: too many rows are dropped or none is left, or one is too long and `overlong` is "error".
    """
    whole = data.documents
    num_overlong = whole.lengths.num_longer_than(seq_len)
    if num_overlong and overlong == "error":
        raise _overlong_row(whole, seq_len)
    if overlong == "drop":
        fitted = replace(data, documents=whole.within(seq_len), num_dropped_overlong=num_overlong)
    else:
        documents = whole.cut_to(seq_len, pieces=overlong == "split")
        num_untrainable = len(whole) - documents.num_rows
        num_changed = num_overlong - num_untrainable
        fitted = replace(
            data,
            documents=documents,
            num_dropped_untrainable=data.num_dropped_untrainable + num_untrainable,
            num_truncated=num_changed if overlong == "truncate" else 0,
            num_split=num_changed if overlong == "split" else 0,
        )
    if max_dropped_share is not None:
        require_most_rows(fitted, max_dropped_share, seq_len)
    return fitted


def require_most_rows(data: TokenizedData, max_dropped_share: float, seq_len: int | None = None) -> None:
    """Refuses data of which more is dropped or bad than outliers: the run would silently not learn a part of it.

    Raises:
        DataError: more than the share is left out, or nothing is left.
    """
    num_left_out, num_read = data.num_bad + data.num_dropped, data.num_bad + data.num_rows
    if len(data.documents) and num_left_out <= round(max_dropped_share * num_read, 6):
        return
    if not data.num_rows:
        return
    reasons = []
    if data.num_bad:
        reasons.append(f"{data.num_bad} bad ones, which data.on_bad_row skips")
    if data.num_dropped_overlong:
        reasons.append(f"{data.num_dropped_overlong} longer than {seq_len} tokens")
    if data.num_dropped_untrainable:
        reasons.append(f"{data.num_dropped_untrainable} without a token to learn")
    fixes = []
    if data.num_bad:
        fixes.append("Correct the bad rows.")
    if data.num_dropped_overlong:
        fixes.append("Raise data.seq_len, or set data.overlong to truncate or split.")
    if data.num_dropped_untrainable:
        fixes.append("See data.train_on, weights and the chat template.")
    raise DataError(
        where=data.path,
        found=f"{num_left_out} of {num_read} rows that cannot be trained on ({', '.join(reasons)})",
        expected=f"at most {100 * max_dropped_share:g} %",
        fix=" ".join([*fixes, "Or let data.max_dropped_share allow it."]),
    )


def choose_seq_len(lengths: LengthCounts, max_positions: int, *, overlong: Overlong, max_dropped_share: float) -> int:
    """The smallest multiple of 64 that holds 99 % of the documents uncut, or all positions the base has.

    Args:
        lengths: tokens of the documents, at least one.
        max_positions: positions the base was built for (see `model.positions`).
        overlong: what becomes of the others; "error" leaves no others.
        max_dropped_share: below 1 % it leaves no others.

    Returns:
        Tokens.

    Raises:
        ValueError: there are no documents.
    """
    uncut_percent = 100 if overlong == "error" or max_dropped_share < 0.01 else 99
    longest_uncut = lengths.of_share(uncut_percent)
    return min(-(-longest_uncut // SEQ_LEN_MULTIPLE) * SEQ_LEN_MULTIPLE, max_positions)


def length_percentiles(lengths: LengthCounts) -> tuple[int, ...]:
    """The length that half, 90 %, 99 % and all of the documents do not exceed, in tokens; zeros if there are none."""
    if not lengths.num_documents:
        return (0,) * len(PERCENTILES)
    return tuple(lengths.of_share(percent) for percent in PERCENTILES)


def changes_told(data: TokenizedData) -> list[str]:
    """What was done to rows that are kept, a line each."""
    counts = {
        "rows were cut to data.seq_len": data.num_truncated,
        "rows were split into documents of at most data.seq_len": data.num_split,
        "earlier answers are read, not learned: the chat template rewrites them": data.num_rewritten_turns,
        "messages have a name that the chat template does not render: who speaks is not learned": data.num_lost_names,
    }
    return [f"{count:,} {what}" for what, count in counts.items() if count]


def _overlong_row(documents: Documents, seq_len: int) -> DataError:
    """About the first one."""
    row, _, num_tokens, _ = next(piece for piece in documents.pieces if piece[2] > seq_len)
    return DataError(
        where=documents.store.where(row),
        found=f"a row of {num_tokens} tokens",
        expected=f"at most data.seq_len = {seq_len}, since data.overlong is error",
        fix="Raise data.seq_len, shorten the row, or set data.overlong to drop, truncate or split.",
    )

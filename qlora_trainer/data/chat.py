"""Tokenises conversations into documents whose labels are the assistant's words and stop tokens, and nothing else.

Each conversation is rendered by the tokenizer's own chat template and tokenised without the tokenizer's own special
tokens: the template writes them, BOS included, so none comes twice and none is missing that generation would see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from qlora_trainer.data.encode import Encoded, encode, encode_prompt
from qlora_trainer.data.rows import Message, Row
from qlora_trainer.data.template import Rendered, control_texts, render_prompt, render_row, require_chat_template
from qlora_trainer.errors import DataError
from qlora_trainer.step.document import IGNORE_INDEX, Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenizedData", "choose_seq_len", "drop_overlong", "prompt_ids", "require_chat_template", "tokenize"]

BATCH_ROWS = 256  # rows tokenised at once: enough for the tokenizer's threads, few enough to hold as Python lists
MAX_DROPPED_PERCENT = 5  # more are no outliers, but a part of the data that the run would silently not learn
UNCUT_PERCENT = 99  # documents that `choose_seq_len` holds
SEQ_LEN_MULTIPLE = 64


@dataclass(frozen=True, slots=True)
class TokenizedData:
    """What is left of a data file after tokenising.

    Attributes:
        path: the file, as errors name it; empty if there were no rows.
        documents: in row order.
        num_rows: rows that went in.
        num_dropped_overlong: rows left out because they are longer than the sequence length.
        num_dropped_untrainable: rows left out because the template renders none of their assistant's text.
    """

    path: str
    documents: tuple[Document, ...]
    num_rows: int
    num_dropped_overlong: int
    num_dropped_untrainable: int

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


def tokenize(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, seq_len: int | None) -> TokenizedData:
    """Tokenises the rows of one file into documents.

    Args:
        rows: conversations; a held-out part may be empty.
        tokenizer: a tokenizer that `require_chat_template` accepts.
        seq_len: longest document that is kept; longer ones are dropped whole, never cut. None keeps all of them.

    Returns:
        The documents, and how many rows were dropped.

    Raises:
        DataError: a row cannot be rendered or masked exactly, an answer does not end in a stop token, a document
            begins with two BOS tokens, or too many rows would be dropped (see `drop_overlong`).
    """
    controls = control_texts(tokenizer)
    stop_ids = _stop_ids(tokenizer)
    documents: list[Document] = []
    for first in range(0, len(rows), BATCH_ROWS):
        batch = rows[first : first + BATCH_ROWS]
        rendered = [render_row(row, tokenizer, controls=controls) for row in batch]
        encoded = encode(rendered, tokenizer, wheres=[row.where for row in batch])
        for row, conversation, tokens in zip(batch, rendered, encoded, strict=True):
            _require_one_bos(tokens, tokenizer.bos_token_id, row.where)
            document = _label(row, conversation, tokens, stop_ids)
            if document.num_supervised_tokens > 0:
                documents.append(document)
    data = TokenizedData(
        path=rows[0].path if rows else "",
        documents=tuple(documents),
        num_rows=len(rows),
        num_dropped_overlong=0,
        num_dropped_untrainable=len(rows) - len(documents),
    )
    _require_most_rows(data, seq_len)
    return data if seq_len is None else drop_overlong(data, seq_len)


def drop_overlong(data: TokenizedData, seq_len: int) -> TokenizedData:
    """Leaves out the documents that are longer than the sequence length.

    Args:
        data: tokenised documents.
        seq_len: longest document that is kept.

    Returns:
        The rest, with the dropped ones counted.

    Raises:
        DataError: more than `MAX_DROPPED_PERCENT` of the rows, or all, are dropped.
    """
    kept = tuple(document for document in data.documents if document.num_tokens <= seq_len)
    num_dropped = data.num_dropped_overlong + len(data.documents) - len(kept)
    shorter = replace(data, documents=kept, num_dropped_overlong=num_dropped)
    _require_most_rows(shorter, seq_len)
    return shorter


def choose_seq_len(lengths: Sequence[int], max_positions: int) -> int:
    """The smallest multiple of 64 that holds 99 % of the documents uncut, or all positions the base has.

    Args:
        lengths: tokens of each document, at least one.
        max_positions: positions the base was built for (`max_position_embeddings`).

    Returns:
        Tokens.

    Raises:
        ValueError: there are no documents.
    """
    if not lengths:
        raise ValueError("no documents to choose a sequence length for")
    num_uncut = -(-len(lengths) * UNCUT_PERCENT // 100)
    longest_uncut = sorted(lengths)[num_uncut - 1]
    return min(-(-longest_uncut // SEQ_LEN_MULTIPLE) * SEQ_LEN_MULTIPLE, max_positions)


def prompt_ids(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids after which the model answers: what stands before an answer in training.

    Args:
        messages: the conversation so far.
        tokenizer: a tokenizer that `require_chat_template` accepts.

    Returns:
        Token ids, the template's special tokens included.
    """
    return encode_prompt(render_prompt(messages, tokenizer), tokenizer)


def _stop_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that may end a turn: EOS, or another special token (Llama 3 ends turns with `<|eot_id|>`).

    Told by what they are, never by the padding token, which often is EOS too.
    """
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(special if tokenizer.eos_token_id is None else special | {int(tokenizer.eos_token_id)})


def _label(row: Row, conversation: Rendered, encoded: Encoded, stop_ids: frozenset[int]) -> Document:
    """Labels each turn of the assistant from its first token to its stop token."""
    input_ids_T, starts_T = encoded.input_ids_T, encoded.starts_T
    labels_T = np.full_like(input_ids_T, IGNORE_INDEX)
    for turn, first in zip(conversation.turns, encoded.first_tokens, strict=True):
        stop = int(np.searchsorted(starts_T, turn.end)) - 1  # the last token that begins inside the turn
        if stop < first or int(input_ids_T[stop]) not in stop_ids:
            raise DataError(
                where=row.where,
                found="an answer that the chat template does not end with a stop token",
                expected="a special token after each of the assistant's turns, else the model never learns to stop",
                fix="Use a chat template that writes the tokenizer's EOS or end-of-turn token after each answer.",
            )
        if conversation.text[turn.start : int(starts_T[stop])].strip():  # else the template left the text out
            labels_T[first : stop + 1] = input_ids_T[first : stop + 1]
    return Document(index=row.index, input_ids_T=input_ids_T, labels_T=labels_T)


def _require_one_bos(encoded: Encoded, bos_token_id: int | None, where: str) -> None:
    if bos_token_id is not None and encoded.input_ids_T[:2].tolist() == [bos_token_id, bos_token_id]:
        raise DataError(
            where=where,
            found="two BOS tokens at the start",
            expected="one",
            fix="Correct the chat template: it writes the BOS token twice.",
        )


def _require_most_rows(data: TokenizedData, seq_len: int | None) -> None:
    num_dropped = data.num_dropped_overlong + data.num_dropped_untrainable
    if num_dropped == 0 or (data.documents and 100 * num_dropped <= MAX_DROPPED_PERCENT * data.num_rows):
        return
    reasons = []
    if data.num_dropped_overlong:
        reasons.append(f"{data.num_dropped_overlong} longer than {seq_len} tokens")
    if data.num_dropped_untrainable:
        reasons.append(f"{data.num_dropped_untrainable} whose assistant's text the chat template leaves out")
    raise DataError(
        where=data.path,
        found=f"{num_dropped} of {data.num_rows} rows that cannot be trained on ({', '.join(reasons)})",
        expected=f"at most {MAX_DROPPED_PERCENT} %",
        fix="Raise data.seq_len, or shorten the rows." if data.num_dropped_overlong else "Use another chat template.",
    )

"""Tokenises rows into documents whose labels are the assistant's words and stop tokens, or all of a plain text.

Each conversation is rendered by the tokenizer's own chat template and tokenised without the tokenizer's own special
tokens: the template writes them, BOS included, so none comes twice and none is missing that generation would see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qlora_trainer.data.encode import Encoded, encode, encode_prompt
from qlora_trainer.data.rows import Message, Row
from qlora_trainer.data.template import control_texts, render_prompt
from qlora_trainer.data.tokenized import TokenizedData
from qlora_trainer.data.turns import Rendered, TrainOn, render_row, render_text
from qlora_trainer.errors import DataError
from qlora_trainer.step.document import IGNORE_INDEX, Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_ROWS = 256  # rows tokenised at once: enough for the tokenizer's threads, few enough to hold as Python lists


def tokenize(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, train_on: TrainOn = "assistant"
) -> TokenizedData:
    """Tokenises rows into documents of whatever length.

    Args:
        rows: conversations or plain texts; a held-out part may be empty.
        tokenizer: one that `require_chat_template` accepts, or `require_fast` where there are plain texts only.
        train_on: what is learned of a conversation.

    Returns:
        The documents that have a token to learn, and how many have none.

    Raises:
        DataError: a row cannot be rendered or masked exactly, an answer does not end in a stop token, or a document
            begins with two BOS tokens.
    """
    controls = control_texts(tokenizer) if any(row.messages for row in rows) else ()
    stop_ids = _stop_ids(tokenizer)
    documents: list[Document] = []
    num_rewritten = 0
    for first in range(0, len(rows), BATCH_ROWS):
        batch = rows[first : first + BATCH_ROWS]
        rendered = [
            render_row(row, tokenizer, controls=controls, train_on=train_on)
            if row.messages
            else render_text(row, tokenizer)
            for row in batch
        ]
        encoded = encode(rendered, tokenizer, wheres=[row.where for row in batch])
        for row, text, tokens in zip(batch, rendered, encoded, strict=True):
            _require_one_bos(tokens, tokenizer.bos_token_id, row.where)
            document = _label(row, text, tokens, stop_ids)
            num_rewritten += text.num_rewritten
            if document.num_supervised_tokens > 0:
                documents.append(document)
    paths = list(dict.fromkeys(row.path for row in rows))
    return TokenizedData(
        path=f"{paths[0]} and {len(paths) - 1} more" if len(paths) > 1 else "".join(paths),
        documents=tuple(documents),
        num_rows=len(rows),
        num_dropped_untrainable=len(rows) - len(documents),
        num_rewritten_turns=num_rewritten,
    )


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


def _label(row: Row, text: Rendered, encoded: Encoded, stop_ids: frozenset[int]) -> Document:
    """Labels each turn that is learned from its first token to its stop token; or all but the turns that are not."""
    input_ids_T, starts_T = encoded.input_ids_T, encoded.starts_T
    labels_T = input_ids_T.copy() if text.learns_all else np.full_like(input_ids_T, IGNORE_INDEX)
    for turn, first in zip(text.turns, encoded.first_tokens, strict=True):
        stop = int(np.searchsorted(starts_T, turn.end)) - 1  # the last token that begins inside the turn
        if not turn.is_learned:
            labels_T[first : stop + 1] = IGNORE_INDEX
            continue
        if stop < first or int(input_ids_T[stop]) not in stop_ids:
            raise DataError(
                where=row.where,
                found="an answer that the chat template does not end with a stop token",
                expected="a special token after each of the assistant's turns, else the model never learns to stop",
                fix="Use a chat template that writes the tokenizer's EOS or end-of-turn token after each answer.",
            )
        if text.text[turn.start : int(starts_T[stop])].strip():  # else the template left the text out
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

"""Tokenises rows into documents whose labels are the assistant's words and stop tokens, or all of a plain text.

Each conversation is rendered by the tokenizer's own chat template and tokenised without the tokenizer's own special
tokens: the template writes them, BOS included, so none comes twice and none is missing that generation would see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qlora_trainer.data.encode import Encoded, encode, encode_prompt
from qlora_trainer.data.left_out import require_answer
from qlora_trainer.data.rows import Message, Row
from qlora_trainer.data.template import control_texts, render_prompt, require_chat_template
from qlora_trainer.data.turns import Rendered, TrainOn, render_row, render_text
from qlora_trainer.errors import DataError
from qlora_trainer.step.document import IGNORE_INDEX, Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A tokenizer takes some 250 bytes for each (20 million of them took 5.4 GB): the longest books have half as many.
MOST_CHARACTERS = 2**23


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """A row and its document, of whatever length.

    Attributes:
        row: as it was read.
        text: what was tokenised, special tokens included.
        document: its tokens; there may be none to learn.
        num_rewritten: answers that are read but not learned, since the chat template rewrites them.
        first_stop: where the first stop token is that is learned; -1 if there is none.
        num_lost_names: messages whose `name` the chat template does not render.
    """

    row: Row
    text: str
    document: Document
    num_rewritten: int
    first_stop: int = -1
    num_lost_names: int = 0


class RowTokenizer:
    """A tokenizer with what must be known of it and its template once."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, train_on: TrainOn = "assistant", where: str = "the tokenizer"
    ) -> None:
        """Takes a fast tokenizer; `where` names it, or its template, in errors."""
        self._tokenizer = tokenizer
        self._train_on: TrainOn = train_on
        self._where = where
        self._stop_ids = _stop_ids(tokenizer)
        self._stop_ids_seen: set[int] = set()
        self._controls: tuple[str, ...] | None = None  # unknown until there is a conversation: texts need no template

    def __call__(self, rows: Sequence[Row]) -> list[TokenizedRow]:
        """Tokenises rows, a few hundred at once for the tokenizer's threads.

        Raises:
            ConfigError: a row is a conversation and the tokenizer has no chat template, or one that fails.
            DataError: a row cannot be rendered or masked exactly, an answer does not end in a stop token, or a document
                begins with two BOS tokens.
        """
        if self._controls is None and any(row.messages for row in rows):
            require_chat_template(self._tokenizer, self._where)
            self._controls = control_texts(self._tokenizer)
        rendered = [
            render_row(row, self._tokenizer, controls=self._controls or (), train_on=self._train_on)
            if row.messages
            else render_text(row, self._tokenizer)
            for row in rows
        ]
        for row, text in zip(rows, rendered, strict=True):
            _require_not_too_long(row, text)
        encoded = encode(rendered, self._tokenizer, wheres=[row.where for row in rows])
        tokenized = []
        for row, text, tokens in zip(rows, rendered, encoded, strict=True):
            document, stops = self._document(row, text, tokens)
            first_stop = _first_stop(document, stops)
            numbers = (text.num_rewritten, first_stop, text.num_lost_names)
            tokenized.append(TokenizedRow(row, text.text, document, *numbers))
        return tokenized

    @property
    def stop_ids_seen(self) -> frozenset[int]:
        """The tokens that learned answers and texts ended with so far."""
        return frozenset(self._stop_ids_seen)

    def _document(self, row: Row, text: Rendered, tokens: Encoded) -> tuple[Document, list[int]]:
        _require_one_bos(tokens, self._tokenizer.bos_token_id, row.where)
        document, stops = _label(row, text, tokens, self._stop_ids)
        self._stop_ids_seen.update(stops)
        return document, stops


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


def _label(row: Row, text: Rendered, encoded: Encoded, stop_ids: frozenset[int]) -> tuple[Document, list[int]]:
    """Labels each turn that is learned from its first token to its stop token; or all but the turns that are not.

    Returns:
        The document, and the stop tokens: one a learned turn; of a plain text its last token.
    """
    stops = [] if row.messages else [int(encoded.input_ids_T[-1])]
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
                kind="answer without a stop token",
            )
        answer = text.text[turn.start : int(starts_T[stop])]
        if answer.strip():  # else the template left the text out, and there is nothing to learn
            require_answer(row, turn.message, answer, forgets_thoughts=turn.forgets_thoughts)
            labels_T[first : stop + 1] = input_ids_T[first : stop + 1]
            stops.append(int(input_ids_T[stop]))
    return Document(index=row.index, input_ids_T=input_ids_T, labels_T=labels_T), stops


def _require_not_too_long(row: Row, text: Rendered) -> None:
    if len(text.text) > MOST_CHARACTERS:
        raise DataError(
            where=row.where,
            found=f"a row of {len(text.text):,} characters",
            expected=f"at most {MOST_CHARACTERS:,}, for which a tokenizer takes two gigabytes",
            fix="Split the row into several.",
            kind="row too long to tokenise",
        )


def _first_stop(document: Document, stops: Sequence[int]) -> int:
    found = [int((document.labels_T == stop).argmax()) for stop in set(stops) if stop in document.labels_T]
    return min(found, default=-1)


def _require_one_bos(encoded: Encoded, bos_token_id: int | None, where: str) -> None:
    if bos_token_id is not None and encoded.input_ids_T[:2].tolist() == [bos_token_id, bos_token_id]:
        raise DataError(
            where=where,
            found="two BOS tokens at the start",
            expected="one",
            fix="Correct the chat template: it writes the BOS token twice.",
            kind="double BOS",
        )

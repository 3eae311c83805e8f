"""Documents token by token, as text that can be shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_trainer.step.document import IGNORE_INDEX, Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BROKEN = "\ufffd"  # what is decoded from a part of a character
_MAX_TOKENS_A_CHARACTER = 8  # UTF-8 has four bytes at most; more tokens are no character that is still to come


@dataclass(frozen=True, slots=True)
class Piece:
    """A token; or the tokens that make up one character.

    Attributes:
        token_ids: one or more.
        text: what they read, special tokens included.
        is_learned: whether they are labels.
    """

    token_ids: tuple[int, ...]
    text: str
    is_learned: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """One document: the place of its row, and its pieces in order."""

    where: str
    pieces: tuple[Piece, ...]


def make_sample(document: Document, tokenizer: PreTrainedTokenizerBase, *, where: str) -> Sample:
    """The document in pieces; those of the assistant's words and of what surrounds them are never one."""
    pieces: list[Piece] = []
    open_ids: list[int] = []
    learned = [int(label) != IGNORE_INDEX for label in document.labels_T]
    learned[:1] = [False]  # there is nothing to predict the first token from
    for position, token_id in enumerate(document.input_ids_T.tolist()):
        open_ids.append(token_id)
        text = _decode(open_ids, tokenizer)
        is_border = position + 1 == len(learned) or learned[position + 1] != learned[position]
        if is_border or not text.endswith(_BROKEN) or len(open_ids) == _MAX_TOKENS_A_CHARACTER:
            pieces.append(Piece(tuple(open_ids), text, learned[position]))
            open_ids = []
    return Sample(where, tuple(pieces))


def _decode(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text

"""Tokenises rendered conversations and finds the first token of each of the assistant's turns.

A tokenizer may merge the end of a prompt with the start of an answer, or split a prompt's last newlines otherwise when
text follows. Generation never sees such tokens, so every prompt is tokenised alone as well and compared; where they
differ, the conversation is tokenised in pieces that are cut where the answers begin.

Of a prompt only the end is tokenised alone: a tokenizer takes special tokens out of a text first and tokenises what is
between them piece by piece, so that up to the last one the tokens are those of the whole.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qlora_trainer.data.turns import Rendered
from qlora_trainer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Encoded:
    """One conversation, T tokens long.

    Attributes:
        input_ids_T: token ids.
        starts_T: where each token begins in the rendered text, in characters; ascending.
        first_tokens: position of the first token of each of the assistant's turns.
    """

    input_ids_T: NDArray[np.int32]
    starts_T: NDArray[np.int32]
    first_tokens: tuple[int, ...]


def encode(
    conversations: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase, *, wheres: Sequence[str]
) -> list[Encoded]:
    """Tokenises conversations so that the tokens before each answer are those of its prompt alone.

    Args:
        conversations: rendered conversations.
        tokenizer: a fast tokenizer.
        wheres: `file:line` of each conversation, for errors.

    Returns:
        One result for each conversation.

    Raises:
        DataError: an answer cannot be told apart from its prompt in tokens.
    """
    whole = _tokenize([conversation.text for conversation in conversations], tokenizer)
    separators = _separators(tokenizer)
    is_separator_V = np.zeros(max(separators, default=0) + 2, dtype=np.bool_)  # its last stands for all higher ids
    is_separator_V[list(separators)] = True
    ends = [
        _prompt_ends(conversation, ids_T, starts_T, separators, is_separator_V)
        for conversation, (ids_T, starts_T) in zip(conversations, whole, strict=True)
    ]
    texts = list(dict.fromkeys(end.text for ends_of_one in ends for end in ends_of_one))  # often the same in every row
    ids_of = dict(zip(texts, _token_ids(texts, tokenizer), strict=True))
    results: list[Encoded] = []
    for conversation, (input_ids_T, starts_T), its_ends, where in zip(conversations, whole, ends, wheres, strict=True):
        alone = [(end.first, ids_of[end.text]) for end in its_ends]
        if all(np.array_equal(input_ids_T[first : first + ids_P.size], ids_P) for first, ids_P in alone):
            first_tokens = tuple(first + ids_P.size for first, ids_P in alone)
            results.append(Encoded(input_ids_T, starts_T, first_tokens))
        else:
            results.append(_encode_in_pieces(conversation, input_ids_T, tokenizer, where=where))
    return results


def encode_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a rendered prompt, exactly as they stand before an answer in training."""
    [input_ids_T] = _token_ids([text], tokenizer)
    return [int(token_id) for token_id in input_ids_T]


@dataclass(frozen=True, slots=True)
class _PromptEnd:
    """The end of a prompt, from the last token on before which nothing can depend on what follows it.

    Attributes:
        first: position of that token in the conversation; 0 for a whole prompt.
        text: from its first character on.
    """

    first: int
    text: str


def _prompt_ends(
    conversation: Rendered,
    ids_T: NDArray[np.int32],
    starts_T: NDArray[np.int32],
    separators: Mapping[int, str],
    is_separator_V: NDArray[np.bool_],
) -> list[_PromptEnd]:
    """The end of each turn's prompt."""
    text = conversation.text
    found: list[tuple[int, int]] = []  # where the text has a separator, and at which token
    if conversation.turns:
        for at in np.flatnonzero(is_separator_V[np.minimum(ids_T, is_separator_V.size - 1)]).tolist():
            separator, start = separators[int(ids_T[at])], int(starts_T[at])
            # As it is: what only a normalizer made look like it was not taken out first.
            if text.startswith(separator, start):
                found.append((start + len(separator), at))
    ends = []
    for turn in conversation.turns:
        num_before = bisect_right(found, turn.start, key=itemgetter(0))
        at = found[num_before - 1][1] if num_before else 0
        ends.append(_PromptEnd(at, text[int(starts_T[at]) if num_before else 0 : turn.start]))
    return ends


def _separators(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The special tokens that are taken out of a text before anything else is done to it."""
    tokens = tokenizer.added_tokens_decoder.items()
    return {token_id: token.content for token_id, token in tokens if token.special and not token.normalized}


def _encode_in_pieces(
    conversation: Rendered, whole_ids_T: NDArray[np.int32], tokenizer: PreTrainedTokenizerBase, *, where: str
) -> Encoded:
    """Cuts the text where answers begin; refused if the tokenizer marks the cut (SentencePiece's leading space)."""
    cuts = [0, *(turn.start for turn in conversation.turns), len(conversation.text)]
    bounds = list(pairwise(cuts))
    pieces = _tokenize([conversation.text[start:end] for start, end in bounds], tokenizer)
    input_ids_T = np.concatenate([ids for ids, _ in pieces])
    starts_T = np.concatenate([starts + bound for (_, starts), (bound, _) in zip(pieces, bounds, strict=True)])
    if _decode(input_ids_T, tokenizer) != _decode(whole_ids_T, tokenizer):
        raise DataError(
            where=where,
            found="an answer whose first characters the tokenizer merges with the end of the prompt",
            expected="an answer that begins with a token of its own",
            fix="Strip the whitespace around the assistant's text.",
        )
    first_tokens = np.cumsum([ids.size for ids, _ in pieces])[:-1]
    return Encoded(input_ids_T, starts_T, tuple(int(token) for token in first_tokens))


def _token_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[NDArray[np.int32]]:
    """Token ids of each text."""
    encoding = _encoding(texts, tokenizer, with_offsets=False)
    return [np.array(ids, dtype=np.int32) for ids in encoding["input_ids"]]


def _tokenize(
    texts: list[str], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """Token ids and the characters at which they begin, for each text."""
    encoding = _encoding(texts, tokenizer, with_offsets=True)
    return [
        (np.array(ids, dtype=np.int32), np.array([start for start, _ in offsets], dtype=np.int32))
        for ids, offsets in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
    ]


def _encoding(texts: list[str], tokenizer: PreTrainedTokenizerBase, *, with_offsets: bool) -> Mapping[str, Any]:
    if not texts:  # transformers fails on an empty list
        return {"input_ids": [], "offset_mapping": []}
    encoding: Mapping[str, Any] = tokenizer(
        texts,
        add_special_tokens=False,  # the template wrote them: a BOS added here would be the second
        return_offsets_mapping=with_offsets,
        return_attention_mask=False,
        padding=False,
        truncation=False,
        verbose=False,  # no warning about lengths: they are handled, and said, by the caller
    )
    return encoding


def _decode(input_ids_T: NDArray[np.int32], tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(input_ids_T.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text

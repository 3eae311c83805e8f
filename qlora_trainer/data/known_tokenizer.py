"""A tokenizer by what decides which tokens a text becomes: hashed, written down, and made again elsewhere.

That is its pipeline as `tokenizers` writes it (vocabulary, added tokens, normaliser and the rest), the names of its
special tokens, and its chat template. What class it has, and in which files it was stored, changes no token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_trainer.config.strict_json import json_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class KnownTokenizer:
    """A tokenizer, and what is known of it.

    Attributes:
        tokenizer: fast.
        content_hash: over all that decides what a text becomes, its template included.
        where: the file or base that the chat template is from, for errors.
    """

    tokenizer: PreTrainedTokenizerBase
    content_hash: str
    where: str


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all that decides what a text becomes, as it was loaded: bases write it to many different files."""
    return json_sha256(tokenizer_content(tokenizer))


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """All that decides what a text becomes, for JSON; megabytes."""
    return {
        "backend": tokenizer.backend_tokenizer.to_str(),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
    }


def tokenizer_of(content: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The inverse of `tokenizer_content`. Imports no torch, which `AutoTokenizer` does.

    Raises:
        ValueError: what was made is not what was written down.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(content["backend"]),
        chat_template=content["chat_template"],
        **content["special_tokens"],
    )
    if tokenizer_content(tokenizer) != content:
        raise ValueError("the tokenizer is another one when it is made from its own content")
    return tokenizer

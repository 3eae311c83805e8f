"""A tokenizer by what decides which tokens a text becomes: hashed, written down, and made again elsewhere.

That is its pipeline as `tokenizers` writes it (vocabulary, added tokens, normaliser and the rest), whether it takes
special tokens of a text for plain text, which `tokenizers` does not write, the names of its special tokens, and its
chat template. What class it has, and in which files it was stored, changes no token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_trainer.config.strict_json import json_sha256
from qlora_trainer.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPLITS = "split_special_tokens"


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
    content = {
        "backend": tokenizer.backend_tokenizer.to_str(),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
    }
    # Named where it is set only: hashes that runs keep are older than this line.
    return content | ({_SPLITS: True} if tokenizer.backend_tokenizer.encode_special_tokens else {})


def tokenizer_of(content: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The inverse of `tokenizer_content`. Imports no torch, which `AutoTokenizer` does.

    Raises:
        ConfigError: what was made is not what was written down.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(content["backend"]),
        chat_template=content["chat_template"],
        split_special_tokens=content.get(_SPLITS, False),
        **content["special_tokens"],
    )
    if tokenizer_content(tokenizer) != content:
        raise ConfigError(
            where="the base's tokenizer",
            found="one that is another when it is made from its pipeline, special tokens and template",
            expected="one that these decide",
            fix="Use another base, and report this with the base's name.",
        )
    return tokenizer

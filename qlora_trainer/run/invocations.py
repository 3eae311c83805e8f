"""Whether the data has what an adapter of Activated LoRA works from: in a document without it nothing is learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from qlora_trainer.config.schema import LoraSection
from qlora_trainer.errors import ConfigError
from qlora_trainer.run.records import Preparing
from qlora_trainer.step.document import Document

_KEY = "lora.alora_invocation_tokens"
MAX_DOCUMENTS = 20_000  # looked at: a second


def invocations_told(lora: LoraSection, documents: Sequence[Document]) -> Iterator[Preparing]:
    """In how many documents the adapter will work, where it does not in all.

    Raises:
        ConfigError: in none.
    """
    invocation = lora.alora_invocation_tokens
    if not invocation:
        return
    looked_at = min(len(documents), MAX_DOCUMENTS)
    num_with = sum(has_invocation(own.input_ids_T, invocation) for own in islice(documents, looked_at))
    of_all = f"{looked_at:,}" if looked_at == len(documents) else f"the first {looked_at:,}"
    if not num_with:
        raise ConfigError(
            where=_KEY,
            found=f"{list(invocation)!r}, which stand in a row in none of {of_all} documents",
            expected="tokens of the data, as the base's tokenizer makes them there",
            fix="Correct it, or leave the key out for plain LoRA.",
        )
    if num_with < looked_at:
        missing = looked_at - num_with
        yield Preparing(what=f"{missing:,} of {of_all} documents have no invocation tokens: nothing is learned in them")


def has_invocation(ids_T: NDArray[np.int32], invocation: Sequence[int]) -> bool:
    """Whether all of the tokens stand there in a row."""
    num_places = len(ids_T) - len(invocation) + 1
    if num_places < 1:
        return False
    found = np.ones(num_places, dtype=bool)
    for offset, token in enumerate(invocation):
        found &= ids_T[offset : offset + num_places] == token
    return bool(found.any())

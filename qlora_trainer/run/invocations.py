"""Where an adapter of Activated LoRA works in the data, and where it does not: what it learns, and what it says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import ConfigError
from qlora_trainer.run.inputs import Inputs
from qlora_trainer.run.records import Preparing
from qlora_trainer.step.document import IGNORE_INDEX, Document

_KEY = "lora.alora_invocation_tokens"
MAX_DOCUMENTS = 20_000  # counted: a second; more are looked at until something is learned


def invocations_told(config: RunConfig, inputs: Inputs) -> Iterator[Preparing]:
    """How much of the data is learned, and judged, where it is not all.

    Args:
        config: filled in.
        inputs: of a stream, what is there at first is looked at.

    Raises:
        ConfigError: nothing is learned, of all that there is.
    """
    invocation, data = config.lora.alora_invocation_tokens, inputs.data
    if not invocation:
        return
    learned = counted(data.train.documents, invocation)
    if not learned.num_active and data.stream is None:
        raise ConfigError(
            where=_KEY,
            found=f"{list(invocation)!r} ({inputs.tokenizer.decode(list(invocation))!r}), behind which nothing is to "
            f"be learned in all {learned.num_documents:,} documents",
            expected="tokens that stand in a row before what is learned, as the base's tokenizer makes them there",
            fix="Correct the key, or bring data that has them; plain LoRA is without the key.",
        )
    if (told := learned.told("trained on")) is not None:
        yield Preparing(what=told)
    if (told := counted(data.evaluation.documents, invocation).told("judged on")) is not None:
        yield Preparing(what=told)


@dataclass(frozen=True, slots=True)
class Counted:
    """Supervised tokens of some documents, and those of them that an active token predicts."""

    num_documents: int
    num_supervised: int
    num_active: int

    def told(self, done: str) -> str | None:
        """In words, of tokens that are "trained on", say; None where the adapter works at all of them."""
        if self.num_active == self.num_supervised:
            return None
        share = self.num_active / self.num_supervised
        return (
            f"it works at {share:.1%} of the tokens that are {done} in {self.num_documents:,} documents; the others "
            "stand before the last invocation tokens, or where there are none"
        )


def counted(documents: Sequence[Document], invocation: Sequence[int]) -> Counted:
    """Of as many as are counted, or, where none of them has any, up to the first that has."""
    num_documents = num_supervised = num_active = 0
    for document in documents:
        if num_documents >= MAX_DOCUMENTS and num_active:
            break
        num_documents += 1
        num_supervised += document.num_supervised_tokens
        num_active += num_active_targets(document, invocation)
    return Counted(num_documents, num_supervised, num_active)


def has_invocation(ids_T: NDArray[np.int32], invocation: Sequence[int]) -> bool:
    """Whether all of the tokens stand there in a row."""
    return last_invocation(ids_T, invocation) is not None


def last_invocation(ids_T: NDArray[np.int32], invocation: Sequence[int]) -> int | None:
    """Where they begin for the last time."""
    num_places = len(ids_T) - len(invocation) + 1
    if num_places < 1:
        return None
    found = np.ones(num_places, dtype=bool)
    for offset, token in enumerate(invocation):
        found &= ids_T[offset : offset + num_places] == token
    places = np.flatnonzero(found)
    return int(places[-1]) if places.size else None


def num_active_targets(document: Document, invocation: Sequence[int]) -> int:
    """Of the supervised tokens those that an active token predicts, the one before each."""
    first = last_invocation(document.input_ids_T, invocation)
    return 0 if first is None else int((document.labels_T[first + 1 :] != IGNORE_INDEX).sum())


def not_at_work_told(ids: Sequence[int], invocation: Sequence[int]) -> str | None:
    """What to say of a prompt at whose end the adapter does not work; None where it does, or always does."""
    if not invocation or has_invocation(np.asarray(ids, dtype=np.int32), invocation):
        return None
    return f"the base answers: the adapter's invocation tokens {list(invocation)!r} are not in the prompt"

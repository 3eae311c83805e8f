"""The seeded order in which documents are trained on, found in O(1) time and memory for any step.

Position p of the run is the document that permutation number p // N puts at p % N (`data.shuffle`); step s takes
positions s*B .. s*B + B - 1. Nothing is remembered from step to step, so a resumed run needs no stored position but its
step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from qlora_trainer.config.schema import TrainingSection
from qlora_trainer.data.shuffle import shuffled

# A checkpoint holds it: a run must not go on in another order. The first one sorted a random word for each document.
ORDER_VERSION = 2


def began_with_order(state: Mapping[str, object]) -> object:
    """The order that a checkpoint's state was saved in; the first one was not written down."""
    return state.get("order", 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Which documents each optimizer step sees.

    A global batch may span two epochs; it then holds a document twice only if there are fewer documents than
    `global_batch_size` or the new permutation begins with it.

    Attributes:
        num_documents: N, documents in the training set.
        global_batch_size: B, documents an optimizer step.
        seed: key of the permutations, 0 <= seed < 2**64.
        epochs: passes over the documents; may be fractional.
        max_steps: optimizer steps, in place of `epochs` when given.
    """

    num_documents: int
    global_batch_size: int
    seed: int
    epochs: float
    max_steps: int | None = None

    def __post_init__(self) -> None:
        if self.num_documents < 1 or self.global_batch_size < 1:
            raise ValueError(f"{self}: an order needs at least one document and one document a step")
        if self.epochs <= 0 or (self.max_steps is not None and self.max_steps < 1):
            raise ValueError(f"{self}: an order needs at least one step")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"{self}: the seed is one 64-bit word of the permutation's key")

    @classmethod
    def of(cls, training: TrainingSection, num_documents: int) -> Order:
        """The order that a config asks for."""
        return cls(
            num_documents=num_documents,
            global_batch_size=training.global_batch_size,
            seed=training.seed,
            epochs=training.epochs,
            max_steps=training.max_steps,
        )

    @property
    def num_samples(self) -> int:
        """Documents seen in the whole run, repeats counted."""
        if self.max_steps is not None:
            return self.max_steps * self.global_batch_size
        # Through the decimal text: 0.1 epochs of 30 documents are 3, where float arithmetic gives 3.0000000000000004.
        return ceil(Fraction(str(self.epochs)) * self.num_documents)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run; the last one may see fewer than `global_batch_size` documents."""
        return ceil(self.num_samples / self.global_batch_size)

    def batch(self, step: int) -> list[int]:
        """Document positions of one global batch, in order.

        Args:
            step: 0-based optimizer step.

        Returns:
            Positions in the training set, 0 <= position < num_documents; `global_batch_size` of them, fewer at the
            last step.

        Raises:
            IndexError: the run has no such step.
        """
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of a run with {self.num_steps} steps")
        first, end = step * self.global_batch_size, self.samples_seen(step + 1)
        found: list[int] = []
        while first < end:
            epoch, offset = divmod(first, self.num_documents)
            offsets = range(offset, min(offset + end - first, self.num_documents))
            found += shuffled(offsets, seed=self.seed, number=epoch, size=self.num_documents)
            first += len(offsets)
        return found

    def samples_seen(self, num_steps_done: int) -> int:
        """Documents seen after that many optimizer steps, repeats counted."""
        return min(num_steps_done * self.global_batch_size, self.num_samples)

    def epoch(self, num_steps_done: int) -> float:
        """Passes over the documents after that many optimizer steps."""
        return self.samples_seen(num_steps_done) / self.num_documents

"""How long documents are: what a plan needs to know of the data, and what it takes where there is none yet."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from transformers import PreTrainedConfig

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import ConfigError
from qlora_trainer.model.positions import max_positions

DEFAULT_SEQ_LEN = 2048


@dataclass(frozen=True, slots=True)
class DocumentLengths:
    """What is known of the data: a length as a value, since `planning` knows no data.

    Attributes:
        seq_len: tokens of the longest document that is kept.
        mean_tokens, shortest_tokens, std_tokens: of a document; the last is their standard deviation.
        largest_batch_tokens: of the longest documents that can meet in one global batch.
    """

    seq_len: int
    mean_tokens: float
    shortest_tokens: int
    largest_batch_tokens: int
    std_tokens: float = 0.0

    @property
    def are_equal(self) -> bool:
        """Whether all are of one length."""
        return self.shortest_tokens == self.seq_len

    @classmethod
    def of_full_length(cls, seq_len: int, *, global_batch_size: int) -> DocumentLengths:
        """Of documents that are not there yet."""
        return cls(seq_len, float(seq_len), seq_len, seq_len * global_batch_size)

    @classmethod
    def of(cls, lengths: ArrayLike, counts: ArrayLike = 1, *, seq_len: int, global_batch_size: int) -> DocumentLengths:
        """Of the documents that are trained on: of each length as many as `counts` says."""
        lengths_L = np.asarray(lengths, dtype=np.int64)
        order_L = np.argsort(-lengths_L, kind="stable")
        counts_L = np.broadcast_to(np.asarray(counts, dtype=np.int64), lengths_L.shape)[order_L]
        lengths_L = lengths_L[order_L]  # the longest first
        largest_L = np.clip(global_batch_size - np.cumsum(counts_L) + counts_L, 0, counts_L)
        num_documents, num_tokens = int(counts_L.sum()), int((counts_L * lengths_L).sum())
        # In whole numbers, which are exact: n times the squares' sum less the square of the sum is n^2 variances.
        squares = sum(count * length**2 for count, length in zip(counts_L.tolist(), lengths_L.tolist(), strict=True))
        num_repeated = max(global_batch_size - num_documents, 0)  # an epoch may end within a batch
        return cls(
            seq_len,
            num_tokens / num_documents,
            int(lengths_L[-1]),
            int((largest_L * lengths_L).sum()) + num_repeated * int(lengths_L[0]),
            math.sqrt((num_documents * squares - num_tokens**2) / num_documents**2),
        )


def full_length(config: RunConfig, model_config: PreTrainedConfig) -> int:
    """Tokens of a document that is not there yet: what was asked for, or as many as usual where all limits allow it.

    A limit that the user did not break must not be held against them: `auto` stays below it.
    """
    if config.data.seq_len != "auto":
        return config.data.seq_len
    pinned = config.memory.micro_batch_tokens
    limits = [max_positions(model_config), pinned if pinned != "auto" else None]
    return min([DEFAULT_SEQ_LEN, *(limit for limit in limits if limit is not None)])


def require_micro_batch(seq_len: int, config: RunConfig) -> None:
    """The config itself compares two pinned values; here `data.seq_len` is what the documents made of `auto`.

    Raises:
        ConfigError: a pinned micro-batch that cannot hold the longest document.
    """
    pinned = config.memory.micro_batch_tokens
    if pinned != "auto" and pinned < seq_len:
        raise ConfigError(
            where="memory.micro_batch_tokens",
            found=f"{pinned} tokens",
            expected=f"at least {seq_len}, the data.seq_len of these documents: none is cut between micro-batches",
            fix=f"Raise memory.micro_batch_tokens to {seq_len}, or lower data.seq_len to {pinned}.",
        )

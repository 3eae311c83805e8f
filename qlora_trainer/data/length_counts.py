"""How many documents have which length: all that is asked of the lengths of data of any size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class LengthCounts:
    """Documents by their length; L is the number of different lengths.

    Attributes:
        lengths_L: tokens, ascending, each once; int64.
        counts_L: documents of that length; int64.
    """

    lengths_L: NDArray[np.int64]
    counts_L: NDArray[np.int64]

    @classmethod
    def of(cls, parts: Iterable[NDArray[Any]]) -> Self:
        """Of documents whose lengths come some at a time."""
        counts: Counter[int] = Counter()
        for lengths_N in parts:
            lengths_L, counts_L = np.unique(lengths_N, return_counts=True)
            counts.update(dict(zip(lengths_L.tolist(), counts_L.tolist(), strict=True)))
        pairs = np.array(sorted(counts.items()), dtype=np.int64).reshape(-1, 2)
        return cls(pairs[:, 0], pairs[:, 1])

    @property
    def num_documents(self) -> int:
        return int(self.counts_L.sum())

    @property
    def num_tokens(self) -> int:
        """Of all documents."""
        return int((self.lengths_L * self.counts_L).sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest document; 0 if there is none."""
        return int(self.lengths_L.max(initial=0))

    def num_longer_than(self, num_tokens: int) -> int:
        """Documents with more tokens."""
        return int(self.counts_L[self.lengths_L > num_tokens].sum())

    def of_share(self, percent: int) -> int:
        """The least length that so many per cent of the documents do not exceed; 0 < percent <= 100.

        Raises:
            ValueError: there are no documents.
        """
        if not self.counts_L.size:
            raise ValueError("no documents, so none is the longest of a share")
        num_within = -(-self.num_documents * percent // 100)
        return int(self.lengths_L[np.searchsorted(np.cumsum(self.counts_L), num_within)])

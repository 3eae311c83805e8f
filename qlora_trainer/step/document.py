"""One tokenised document, the unit in which data is counted, ordered and never cut across micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORE_INDEX = -100  # the label of a token that is not trained on (PyTorch's cross_entropy default)


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids and labels of one document, T tokens long.

    Attributes:
        index: row number in its data set; random draws are keyed by it.
        input_ids_T: int32 token ids.
        labels_T: int32; `labels_T[t] == input_ids_T[t]` where token t is trained on, else `IGNORE_INDEX`.
            Not shifted: token t is predicted from the tokens before it.
    """

    index: int
    input_ids_T: NDArray[np.int32]
    labels_T: NDArray[np.int32]

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids_T.size)

    @property
    def num_supervised_tokens(self) -> int:
        """Tokens that contribute to the loss; the first token of a document has nothing to be predicted from."""
        return int((self.labels_T[1:] != IGNORE_INDEX).sum())

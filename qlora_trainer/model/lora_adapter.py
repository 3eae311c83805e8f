"""The two trained matrices of one linear layer, and what its dropout is drawn by.

Legend: T tokens, I in_features, O out_features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlora_trainer.model.random_draws import dropout_factors


@dataclass(slots=True)
class DropoutKeys:
    """What dropout draws are keyed by, beside the layer: set by the step for each micro-batch, read by every adapter.

    Attributes:
        row_keys_T: int64 [T], one key a token, made from (seed, step, document, position); None switches dropout off.
    """

    row_keys_T: Tensor | None = None


class LoraAdapter(nn.Module):
    """The two trained matrices of one linear layer.

    Args:
        lora_A_RI: down projection.
        lora_B_OR: up projection.
        scale: factor on the update, alpha / rank for plain LoRA (Hu et al., 2021).
        dropout: probability that an input element of the low-rank path is zeroed in training.
        layer_key: which layer this is, for the dropout draws.
        keys: shared by all adapters of the model.
    """

    def __init__(
        self,
        lora_A_RI: Tensor,
        lora_B_OR: Tensor,
        *,
        scale: float,
        dropout: float = 0.0,
        layer_key: int = 0,
        keys: DropoutKeys | None = None,
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(lora_A_RI)
        self.lora_B = nn.Parameter(lora_B_OR)
        self.scale = scale
        self.dropout = dropout
        self.layer_key = layer_key
        self.keys = keys or DropoutKeys()

    def draw_dropout(self, num_tokens: int, dtype: torch.dtype) -> Tensor | None:
        """Factors [T, I] that are 0 or 1 / (1 - p), the same at every call for one micro-batch; None for no dropout."""
        if not self.training or self.dropout == 0.0 or self.keys.row_keys_T is None:
            return None
        row_keys_T = self.keys.row_keys_T
        if row_keys_T.numel() != num_tokens:
            raise ValueError(f"{row_keys_T.numel()} dropout keys for {num_tokens} tokens")
        return dropout_factors(row_keys_T, self.layer_key, self.lora_A.shape[1], self.dropout, dtype)

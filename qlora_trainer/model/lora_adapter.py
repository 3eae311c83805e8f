"""What is trained of one linear layer, and what its dropout is drawn by.

Legend: T tokens, I in_features, O out_features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlora_trainer.model.random_draws import dropout_factors


@dataclass(slots=True)
class OfTokens:
    """What adapters know of the tokens that go through: set for each micro-batch, read by every adapter of a model.

    Attributes:
        row_keys_T: int64 [T], one key a token, by which dropout is drawn, made from (seed, step, document, position);
            None switches dropout off.
        tokens: those of them that go through the linears at present; None for all.
        invocation: of Activated LoRA, the tokens that the adapters work from (see `model.activated`); empty for LoRA.
        active_T1: bool [T, 1], at which tokens they do; None for all.
    """

    row_keys_T: Tensor | None = None
    tokens: slice | None = None
    invocation: tuple[int, ...] = ()
    active_T1: Tensor | None = None

    def work_from(self, invocation: tuple[int, ...]) -> None:
        """Take the invocation tokens of another adapter."""
        self.invocation, self.active_T1 = invocation, None

    def only_active_(self, low_TR: Tensor) -> Tensor:
        """Zeroes the rows [T, R] of tokens that the adapters do not work at, in place."""
        if self.active_T1 is None:
            return low_TR
        return low_TR.mul_(self.active_T1 if self.tokens is None else self.active_T1[self.tokens])


class LoraAdapter(nn.Module):
    """The two trained matrices of one linear layer, with DoRA the length of each row of the sum, or else a bias.

    Args:
        lora_A_RI: down projection.
        lora_B_OR: up projection.
        scale: factor on the update, alpha / rank for plain LoRA (Hu et al., 2021).
        dropout: probability that an input element of the low-rank path is zeroed in training.
        layer_key: which layer this is, for the dropout draws.
        of_tokens: shared by all adapters of the model.
        magnitude_O: fp32, of DoRA; None for none.
        lora_B_bias_O: fp32, PEFT's `lora_bias`: a bias of the up projection, scaled as that is; None for none.

    Attributes:
        norm_O: with DoRA, the norms of the rows of W + scale B A, fp32 (see `model.dora`), which are no parameter.
    """

    norm_O: Tensor | None

    def __init__(
        self,
        lora_A_RI: Tensor,
        lora_B_OR: Tensor,
        *,
        scale: float,
        dropout: float = 0.0,
        layer_key: int = 0,
        of_tokens: OfTokens | None = None,
        magnitude_O: Tensor | None = None,
        lora_B_bias_O: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(lora_A_RI)
        self.lora_B = nn.Parameter(lora_B_OR)
        self.lora_magnitude_vector = None if magnitude_O is None else nn.Parameter(magnitude_O)
        self.lora_B_bias = None if lora_B_bias_O is None else nn.Parameter(lora_B_bias_O)
        self.register_buffer("norm_O", None if magnitude_O is None else magnitude_O.clone(), persistent=False)
        self.scale = scale
        self.dropout = dropout
        self.layer_key = layer_key
        self.of_tokens = of_tokens or OfTokens()

    @property
    def drops(self) -> bool:
        """Whether `draw_dropout` draws."""
        return self.training and self.dropout > 0.0 and self.of_tokens.row_keys_T is not None

    def row_scale(self) -> Tensor | None:
        """With DoRA, the factor [O] on each row of W + scale B A, fp32; else None."""
        magnitude_O = self.lora_magnitude_vector
        return None if magnitude_O is None or self.norm_O is None else magnitude_O.detach() / self.norm_O

    def scaled_B(self, dtype: torch.dtype) -> Tensor:
        """B [O, R], each row times its `row_scale`."""
        row_scale_O = self.row_scale()
        if row_scale_O is None:
            return self.lora_B.to(dtype)
        return (self.lora_B * row_scale_O.unsqueeze(1)).to(dtype)

    def draw_dropout(self, num_tokens: int, dtype: torch.dtype) -> Tensor | None:
        """Factors [T, I] that are 0 or 1 / (1 - p), the same at every call for one micro-batch; None for no dropout."""
        if not self.drops or self.of_tokens.row_keys_T is None:
            return None
        row_keys_T, tokens = self.of_tokens.row_keys_T, self.of_tokens.tokens
        if tokens is not None:
            row_keys_T = row_keys_T[tokens]
        if row_keys_T.numel() != num_tokens:
            raise ValueError(f"{row_keys_T.numel()} dropout keys for {num_tokens} tokens")
        return dropout_factors(row_keys_T, self.layer_key, self.lora_A.shape[1], self.dropout, dtype)

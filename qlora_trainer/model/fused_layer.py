"""Decoder layers of the form x + attention(norm(x)), then x + mlp(norm(x)), computed by `fused_halves`.

Only layers whose whole computation is known are replaced, by the class they have in transformers; what their modules
are called and hold stays. That the replacement computes what transformers does is seen by `acceptance` for every config
before anything is loaded. Other architectures keep transformers' own layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_trainer.model.fused_halves import AttentionHalf, MlpHalf, Norm, attention_half, mlp_half
from qlora_trainer.model.row_ops import GELU, GELU_TANH, SILU
from qlora_trainer.model.tiled import TiledMlp, is_token_wise, tiled_mlp_half
from qlora_trainer.model.tiled_attention import tiled_attention_half

# Class of a layer -> what its norms add to their weights.
NORM_OFFSETS = {
    "LlamaDecoderLayer": 0.0,
    "MistralDecoderLayer": 0.0,
    "Qwen2DecoderLayer": 0.0,
    "Qwen3DecoderLayer": 0.0,
    "GemmaDecoderLayer": 1.0,
}
_ACTIVATIONS = {"silu": SILU, "swish": SILU, "gelu": GELU, "gelu_pytorch_tanh": GELU_TANH}


class FusedLayer(GradientCheckpointingLayer):
    """Drop-in for a decoder layer of `NORM_OFFSETS`.

    Args:
        layer: whose modules it takes over.
        norm_offset: what its norms add to their weights.
        activation: of the gate.

    Attributes:
        tile_tokens: taken at a time where the layer is recomputed, or keeps nothing; 0 for all at once.
        is_to_be_computed_again: whether it runs for what it returns: what it keeps is computed again before backward.
        is_computed_again: whether it runs for what it keeps: nobody reads what it returns.
    """

    def __init__(self, layer: nn.Module, *, norm_offset: float, activation: str) -> None:
        super().__init__()
        for name, part in layer.named_children():
            self.add_module(name, part)
        self._norm_offset = norm_offset
        self._activation = activation
        self.tile_tokens = 0
        self.is_to_be_computed_again = False
        self.is_computed_again = False

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any = None,
        document_lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`hidden_states` [B, T, H] -> [B, T, H]; the rest is what transformers' model gives each of its layers."""
        if past_key_values is not None:  # generation, with transformers' own attention
            kwargs |= {"position_embeddings": position_embeddings, "past_key_values": past_key_values}
            return self._by_its_modules(hidden_states, **kwargs)
        cos_TD, sin_TD = (_row_for_each(table, hidden_states) for table in position_embeddings)
        lengths = [hidden_states.shape[1]] if document_lengths is None else document_lengths
        tile_tokens = self.tile_tokens if self.gradient_checkpointing or not torch.is_grad_enabled() else 0
        dtype = hidden_states.dtype
        half = self._attention(dtype)
        if not tile_tokens:
            return mlp_half(attention_half(hidden_states, half, cos_TD, sin_TD, lengths), self._mlp(dtype))
        keeps_queries = torch.is_grad_enabled() and not self.is_to_be_computed_again
        hidden_states = tiled_attention_half(
            hidden_states, half, cos_TD, sin_TD, lengths, tile_tokens, keeps_queries=keeps_queries
        )
        return tiled_mlp_half(hidden_states, self._mlp(dtype), tile_tokens, is_output_read=not self.is_computed_again)

    def _by_its_modules(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        own: Any = self
        attended, _ = own.self_attn(own.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        out: Tensor = hidden_states + own.mlp(own.post_attention_layernorm(hidden_states))
        return out

    def _attention(self, dtype: torch.dtype) -> AttentionHalf:
        own: Any = self.self_attn
        return AttentionHalf(
            norm=self._norm(self.input_layernorm, dtype),
            q=own.q_proj,
            k=own.k_proj,
            v=own.v_proj,
            o=own.o_proj,
            q_norm=self._norm(own.q_norm, dtype) if hasattr(own, "q_norm") else None,
            k_norm=self._norm(own.k_norm, dtype) if hasattr(own, "k_norm") else None,
            head_dim=own.head_dim,
            scale=own.scaling,
            window=_window(own),
            softcap=0.0,
        )

    def _mlp(self, dtype: torch.dtype) -> MlpHalf:
        own: Any = self.mlp
        norm = self._norm(self.post_attention_layernorm, dtype)
        return MlpHalf(norm, own.gate_proj, own.up_proj, own.down_proj, self._activation)

    def _norm(self, norm: Any, dtype: torch.dtype) -> Norm:
        plain = norm.norm  # of a `TrainableNorm`
        eps = plain.variance_epsilon if hasattr(plain, "variance_epsilon") else plain.eps
        trained_H = norm.trained_weight
        weight_H = norm.weight if trained_H is None else trained_H.detach().to(dtype)
        return Norm(weight_H, eps, self._norm_offset, trained_H)


def fuse_layers(module: PreTrainedModel) -> None:
    """Put a `FusedLayer` in the place of every decoder layer that one can stand for; their weights are in place."""
    activation = _ACTIVATIONS.get(str(getattr(module.config, "hidden_act", None)))
    if activation is None:
        return
    for name, layer in list(module.named_modules()):
        offset = NORM_OFFSETS.get(type(layer).__name__)
        if offset is not None and isinstance(layer, GradientCheckpointingLayer):
            module.set_submodule(name, FusedLayer(layer, norm_offset=offset, activation=activation))


def make_tileable(module: PreTrainedModel) -> None:
    """Put a `TiledMlp` in the place of the MLP of every other layer that one can stand for; linears are packed."""
    for layer in module.modules():
        if isinstance(layer, GradientCheckpointingLayer) and not isinstance(layer, FusedLayer):
            mlp = getattr(layer, "mlp", None)
            if isinstance(mlp, nn.Module) and is_token_wise(mlp):
                layer.mlp = TiledMlp(layer, mlp)


def _window(attention: Any) -> int:
    """Qwen 2 and 3 say it of each layer, Mistral of all."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window or 0
    config: PreTrainedConfig = attention.config
    is_windowed = type(attention).__name__ == "MistralAttention"
    return (getattr(config, "sliding_window", None) or 0) if is_windowed else 0


def _row_for_each(table_BTD: Tensor, hidden_BTH: Tensor) -> Tensor:
    """A rotary table with a row for each token of each row."""
    return table_BTD.expand(hidden_BTH.shape[0], -1, -1).flatten(0, 1)

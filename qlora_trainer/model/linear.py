"""A frozen NF4 linear layer with an optional LoRA adapter: out = x W^T + bias + scale * drop(x) A^T B^T.

Forward and backward each unpack the weight and drop it again: nothing dense is saved, and autograd's context holds the
layer, not its packed tensors, so a buffer that is refilled between forward and backward is read anew.

The low-rank path stays separate from the dense product. Adding scale * B A to the unpacked weight would be one product
fewer, but in 16 bits it rounds most of a young adapter away.

Legend: T tokens (all leading dimensions flattened), I in_features, O out_features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_trainer.hardware.heap import ResidentLimit
from qlora_trainer.model import nf4
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


class NF4Linear(nn.Module):
    """Drop-in for `nn.Linear` with a packed, frozen weight.

    Args:
        weight: the packed weight, [O, I].
        bias_O: frozen bias or None.
        resident_limit: asked for room before each product; one for all linears of a model.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    code: Tensor | None
    bias: Tensor | None

    def __init__(
        self, weight: nf4.NF4Weight, bias_O: Tensor | None, resident_limit: ResidentLimit | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.adapter: LoraAdapter | None = None
        self.resident_limit = resident_limit or ResidentLimit()
        self.register_buffer("bias", bias_O, persistent=False)
        for name in ("packed", "absmax", "nested_absmax", "offset", "code"):
            self.register_buffer(name, getattr(weight, name), persistent=False)

    @property
    def weight(self) -> nf4.NF4Weight:
        shape = (self.out_features, self.in_features)
        return nf4.NF4Weight(self.packed, self.absmax, self.nested_absmax, self.offset, self.code, shape)

    def make_room(self, num_tokens: int, itemsize: int) -> None:
        """Before a product and what the model does with it until the next one."""
        activation_elements = num_tokens * max(self.in_features, self.out_features)
        weight_elements = self.in_features * self.out_features
        self.resident_limit.make_room(itemsize * (weight_elements + 3 * activation_elements))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., I] in the compute dtype; returns [..., O] in the same dtype."""
        x_TI = x.reshape(-1, self.in_features)
        adapter = self.adapter
        a_RI, b_OR = (None, None) if adapter is None else (adapter.lora_A, adapter.lora_B)
        out_TO: Tensor = _NF4LoraFunction.apply(x_TI, a_RI, b_OR, self)  # type: ignore[no-untyped-call]
        return out_TO.view(*x.shape[:-1], self.out_features)


class _NF4LoraFunction(torch.autograd.Function):
    """Saves x and, with an adapter, the low-rank activation [T, R]; dropout factors are drawn again, not saved."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, a_RI: Tensor | None, b_OR: Tensor | None, layer: NF4Linear) -> Tensor:
        layer.make_room(x_TI.shape[0], x_TI.itemsize)
        weight_OI = nf4.dequantize(layer.weight, x_TI.dtype)
        # On a CPU `linear` takes a transposed bf16 weight up to 1.8 times faster than `mm` (torch 2.13, AMX).
        bias_O = None if layer.bias is None else layer.bias.to(x_TI.dtype)
        out_TO = nn.functional.linear(x_TI, weight_OI, bias_O)
        del weight_OI
        ctx.layer, ctx.adapter = layer, layer.adapter
        if a_RI is None or b_OR is None or layer.adapter is None:
            return out_TO
        dropped_TI = _dropped(x_TI, layer.adapter)
        low_rank_TR = torch.mm(dropped_TI, a_RI.to(x_TI.dtype).t())
        out_TO.addmm_(low_rank_TR, b_OR.to(x_TI.dtype).t(), alpha=layer.adapter.scale)
        ctx.save_for_backward(x_TI, low_rank_TR, a_RI, b_OR)
        return out_TO

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_TO = grad_outputs[0]
        ctx.layer.make_room(grad_TO.shape[0], grad_TO.itemsize)
        grad_x_TI = None
        if ctx.needs_input_grad[0]:
            grad_x_TI = torch.mm(grad_TO, nf4.dequantize(ctx.layer.weight, grad_TO.dtype))
        if ctx.adapter is None:
            return grad_x_TI, None, None, None
        x_TI, low_rank_TR, a_RI, b_OR = ctx.saved_tensors
        grad_low_rank_TR = torch.mm(grad_TO, b_OR.to(grad_TO.dtype)).mul_(ctx.adapter.scale)
        grad_b_OR = torch.mm(grad_TO.t(), low_rank_TR).mul_(ctx.adapter.scale)
        factors_TI = ctx.adapter.draw_dropout(x_TI.shape[0], x_TI.dtype)
        grad_a_RI = torch.mm(grad_low_rank_TR.t(), x_TI if factors_TI is None else x_TI * factors_TI)
        if grad_x_TI is not None:
            if factors_TI is None:
                grad_x_TI.addmm_(grad_low_rank_TR, a_RI.to(grad_TO.dtype))
            else:
                grad_x_TI.addcmul_(torch.mm(grad_low_rank_TR, a_RI.to(grad_TO.dtype)), factors_TI)
        return grad_x_TI, grad_a_RI, grad_b_OR, None


def _dropped(x_TI: Tensor, adapter: LoraAdapter) -> Tensor:
    factors_TI = adapter.draw_dropout(x_TI.shape[0], x_TI.dtype)
    return x_TI if factors_TI is None else x_TI * factors_TI

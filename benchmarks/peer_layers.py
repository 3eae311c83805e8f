"""The peer's layers and losses, written by hand: bitsandbytes' 4-bit product, PEFT's LoRA, the plugin's fused kernels.

Each allocates and saves what the peer's does, in the same order, and names its source: PEFT 0.13.2, bitsandbytes
0.43.3, fms-acceleration-foak 0.6.0 ("foak"), whose LoRA, norm, rotary and loss kernels come from Unsloth and Liger.

Legend: N tokens, I input features, O output features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peer_fakes import note_work

BLOCK_SIZE, NESTED_BLOCK_SIZE = 64, 256  # bitsandbytes' defaults
_forward: Callable[..., Any] = torch.amp.custom_fwd(device_type="cpu")
_backward: Callable[..., Any] = torch.amp.custom_bwd(device_type="cpu")


class Base4bit(nn.Module):
    """bitsandbytes.nn.Linear4bit: what `quantize_4bit` leaves on the device."""

    def __init__(self, linear: nn.Linear, *, double_quant: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        num_elements = linear.in_features * linear.out_features
        num_blocks = num_elements // BLOCK_SIZE
        self.double_quant = double_quant
        self.packed = torch.empty(num_elements // 2, 1, dtype=torch.uint8)
        self.code = torch.empty(16, dtype=torch.float32)
        self.absmax = torch.empty(num_blocks, dtype=torch.uint8 if double_quant else torch.float32)
        if double_quant:
            self.nested_absmax = torch.empty(-(-num_blocks // NESTED_BLOCK_SIZE), dtype=torch.float32)
            self.offset = torch.empty((), dtype=torch.float32)
        self.bias = None
        if linear.bias is not None:
            self.bias = nn.Parameter(torch.empty(linear.out_features, dtype=torch.bfloat16), requires_grad=False)

    def dequantize(self) -> Tensor:
        """`dequantize_4bit`: an fp32 absmax, then the weight."""
        absmax = self.absmax
        if self.double_quant:
            absmax = torch.empty(self.absmax.shape, dtype=torch.float32)
            note_work((self.absmax, self.nested_absmax, absmax))
            absmax += self.offset
        weight_OI = torch.empty(self.out_features, self.in_features, dtype=torch.bfloat16)
        note_work((self.packed, absmax, weight_OI))
        return weight_OI

    def forward(self, x: Tensor) -> Tensor:
        return MatMul4Bit.apply(x.to(torch.bfloat16), self).to(x.dtype)  # type: ignore[no-any-return, no-untyped-call]


class MatMul4Bit(torch.autograd.Function):
    """bitsandbytes.autograd._functions.MatMul4Bit: saves nothing but the packed weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Base4bit) -> Tensor:
        ctx.base = base
        return nn.functional.linear(x, base.dequantize().to(x.dtype), base.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return torch.matmul(grads[0], ctx.base.dequantize().to(grads[0].dtype)), None


class PeftLora(nn.Module):
    """peft.tuners.lora.bnb.Linear4bit under autocast."""

    def __init__(self, base: Base4bit, *, rank: int, alpha: float, dropout: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, dtype=dtype)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, dtype=dtype)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.scaling = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        result = result.clone()
        output = self.lora_B(self.lora_A(self.dropout(x))) * self.scaling
        return result + output  # type: ignore[no-any-return]


def _fused_product(lora: PeftLora, x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """foak, unsloth_lora/utils.py, matmul_lora: the product and the dropped input, which is saved."""
    out_NO = torch.matmul(x_NI, lora.base.dequantize().t())
    dropped_NI = lora.dropout(x_NI)
    a_IR, b_RO = lora.lora_A.weight.t(), lora.lora_B.weight.t()
    out_NO += (dropped_NI @ a_IR.to(x_NI.dtype)) @ (lora.scaling * b_RO.to(x_NI.dtype))
    if lora.base.bias is not None:
        out_NO += lora.base.bias
    return out_NO, dropped_NI


def _adapter_gradients(lora: PeftLora, dropped_NI: Tensor, dout_NO: Tensor) -> tuple[Tensor, Tensor]:
    da_IR = dropped_NI.t() @ (dout_NO @ lora.lora_B.weight)
    db_RO = (lora.lora_A.weight @ dropped_NI.t()) @ dout_NO
    da_IR *= lora.scaling
    db_RO *= lora.scaling
    return da_IR.t(), db_RO.t()


def _low_rank_input_gradient(lora: PeftLora, dropped_NI: Tensor, dout_NO: Tensor) -> Tensor:
    b_OR, a_RI = lora.lora_B.weight.to(dout_NO.dtype), lora.lora_A.weight.to(dout_NO.dtype)
    return (dropped_NI != 0) * (dout_NO @ b_OR @ (lora.scaling * a_RI))


class FusedLora(torch.autograd.Function):
    """foak, unsloth_lora/bnb/fast_lora.py: LoRA_QKV for several layers with one input, LoRA_W for one."""

    @staticmethod
    @_forward
    def forward(ctx: Any, x: Tensor, layers: tuple[PeftLora, ...], *weights: Tensor) -> tuple[Tensor, ...]:
        x_NI = x.view(-1, x.shape[-1])
        products = [_fused_product(layer, x_NI) for layer in layers]
        ctx.layers = layers
        ctx.save_for_backward(x, *(dropped for _, dropped in products))
        return tuple(out.view(*x.shape[:-1], -1) for out, _ in products)

    @staticmethod
    @_backward
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        x, *dropped = ctx.saved_tensors
        x_NI = x.view(-1, x.shape[-1])
        douts = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        work = list(zip(ctx.layers, dropped, douts, strict=True))
        adapters = [_adapter_gradients(*parts) for parts in work]
        dx_NI: Tensor | None = None
        for layer, dropped_NI, dout_NO in work:
            weight_OI = layer.base.dequantize()
            if dx_NI is None:  # LoRA_QKV writes over its input
                dx_NI = torch.matmul(dout_NO, weight_OI, out=x_NI) if len(work) > 1 else dout_NO @ weight_OI
            else:
                dx_NI += dout_NO @ weight_OI
            del weight_OI
            dx_NI += _low_rank_input_gradient(layer, dropped_NI, dout_NO)
        assert dx_NI is not None
        return dx_NI.view(x.shape), None, *(gradient for pair in adapters for gradient in pair)


def fuse(layers: dict[str, PeftLora]) -> None:
    """foak, models/utils.py, _build_fused_forwards: the first of the layers that is called computes all of them."""
    outs: dict[str, Tensor] = {}

    def forward_of(name: str) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if not outs:
                weights = [w for layer in layers.values() for w in (layer.lora_A.weight, layer.lora_B.weight)]
                fused = FusedLora.apply(x, tuple(layers.values()), *weights)  # type: ignore[no-untyped-call]
                outs.update(zip(layers, fused, strict=True))
            return outs.pop(name)

        return forward

    for name, layer in layers.items():
        layer.forward = forward_of(name)  # type: ignore[method-assign, assignment]


class FusedNorm(torch.autograd.Function):
    """foak, kernels/unsloth/rms_layernorm.py: saves the input and an inverse deviation; the gradient replaces dY."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype)
        inverse_N = torch.empty(x.numel() // x.shape[-1], dtype=torch.float32)
        note_work((x, out, inverse_N))
        ctx.save_for_backward(x, weight, inverse_N)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        note_work((grads[0], ctx.saved_tensors[0], grads[0]))
        return grads[0].view(grads[0].shape), None


class FusedRotary(torch.autograd.Function):
    """foak, kernels/unsloth/rope_embedding.py: in place, both ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.cos, ctx.sin = cos, sin
        note_work((x, x))
        return x.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        batch, time, heads, size = grads[0].shape
        gradient = grads[0].reshape(batch * time, heads * size)
        note_work((gradient, gradient))
        return gradient.view(batch, time, heads, size), None, None


def fused_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """In place of transformers' `apply_rotary_pos_emb`; heads come before time."""
    q, k = (FusedRotary.apply(x.transpose(1, 2), cos, sin).transpose(1, 2) for x in (q, k))  # type: ignore[no-untyped-call]
    return q, k


class FusedCrossEntropy(torch.autograd.Function):
    """foak, kernels/unsloth/cross_entropy_loss.py: the gradient is written over the logits, which are fp32."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor) -> Tensor:
        losses_N = torch.empty(logits_NV.shape[0], dtype=torch.float32)
        num_chunks = -(-logits_NV.shape[1] // 65536)
        sums = torch.empty((logits_NV.shape[0], num_chunks), dtype=torch.float32)
        note_work((logits_NV, losses_N, sums))
        if num_chunks > 1:
            sums = torch.logsumexp(sums, dim=1)
            losses_N += sums
            losses_N.masked_fill_(labels_N == -100, 0)
        ctx.save_for_backward(logits_NV, sums, labels_N)
        return losses_N

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        logits_NV = ctx.saved_tensors[0]
        note_work((logits_NV, logits_NV))
        return logits_NV, None


class ChunkedLoss(torch.autograd.Function):
    """foak, fused_ops/liger_ce: head and loss in chunks, the gradient of the input made in forward."""

    @staticmethod
    def forward(ctx: Any, hidden_NI: Tensor, head: Tensor, labels_N: Tensor) -> Tensor:
        num_tokens, num_features = hidden_NI.shape
        parts = -(-head.shape[0] // num_features)
        chunk = 1 << (-(-num_tokens // parts) - 1).bit_length()
        gradient_NI, losses_N = torch.zeros_like(hidden_NI), torch.zeros(num_tokens, dtype=torch.float32)
        total = (labels_N != -100).sum()
        logits = scaled = None
        for start in range(0, num_tokens, chunk):
            hidden = hidden_NI[start : start + chunk]
            logits = hidden @ head.t()
            logits = logits.float()
            note_work((logits, logits))
            logits = logits.to(hidden_NI.dtype)
            scaled = logits * (1 / total)
            gradient_NI[start : start + chunk] = scaled @ head
        ctx.save_for_backward(gradient_NI)
        return torch.sum(losses_N)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0], None, None

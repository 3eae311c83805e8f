"""Frozen NF4 linear layers with an optional LoRA adapter: out = x W^T + bias + scale * (drop(x) A^T B^T + bias of B).

A bias is frozen, too, unless it is a parameter (`model.trained_vectors`). Few adapters have a bias of B (PEFT's
`lora_bias`); it is added where the linear's own is, or would be.

Forward and backward each unpack a weight and drop it again: nothing dense is saved, and autograd's context holds the
layer, not its packed tensors, so a buffer that is refilled between forward and backward is read anew.

The functions take several linears that read the same input (q, k and v; gate and up): the first matrices of their
adapters are one product, and the gradients of the input are added up inside the products.

With DoRA every row of W + scale B A has a factor, its magnitude over its norm. It goes into the scales of the packed
blocks and into the rows of B, so the products are the same; nothing of [T, O] is made, or rounded, for it.

The low-rank path stays separate from the dense product. Adding scale * B A to the unpacked weight would be one product
fewer, but in 16 bits it rounds most of a young adapter away, and in fp32 it does not pay: two passes over each weight
instead of one over the output (docs/log.md, 2026-11-28).

Legend: T tokens (all leading dimensions flattened), I in_features, O out_features, R rank, S sum of the ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qlora_trainer.hardware.heap import ResidentLimit
from qlora_trainer.model import nf4
from qlora_trainer.model.lora_adapter import LoraAdapter
from qlora_trainer.model.row_ops import column_sums


class Turn(Protocol):
    """What a linear asks before its packed weight is read, if that is not always there (see `base_stream`)."""

    def take(self) -> None:
        """Returns when the weight is there, or what will be queued on the device comes after it."""


class NF4Linear(nn.Module):
    """Drop-in for `nn.Linear` with a packed, frozen weight.

    Args:
        weight: the packed weight, [O, I].
        bias_O: frozen bias or None; `model.trained_vectors` may put a parameter in its place.
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
        self.unpacked: dict[tuple[str, torch.dtype], Tensor] | None = None  # see `unpacked_once`
        self.turn: Turn | None = None
        self.resident_limit = resident_limit or ResidentLimit()
        self.register_buffer("bias", bias_O, persistent=False)
        for name in ("packed", "absmax", "nested_absmax", "offset", "code"):
            self.register_buffer(name, getattr(weight, name), persistent=False)

    @property
    def trained_bias(self) -> nn.Parameter | None:
        """The bias [O] where it is trained."""
        bias_O = self.bias
        return bias_O if isinstance(bias_O, nn.Parameter) else None

    def whole_bias(self, dtype: torch.dtype) -> Tensor | None:
        """All that is added to each row of the product [O], summed in fp32; None for nothing."""
        own_O, adapter = self.bias, self.adapter
        if adapter is None or adapter.lora_B_bias is None:
            return None if own_O is None else own_O.to(dtype)
        of_B_O = adapter.lora_B_bias.detach() * adapter.scale
        return (of_B_O if own_O is None else of_B_O.add_(own_O)).to(dtype)

    @property
    def weight(self) -> nf4.NF4Weight:
        """To be used at once and not kept: where layers are streamed, another one's weight takes its place."""
        if self.turn is not None:
            self.turn.take()
        shape = (self.out_features, self.in_features)
        return nf4.NF4Weight(self.packed, self.absmax, self.nested_absmax, self.offset, self.code, shape)

    def make_room(self, num_tokens: int, itemsize: int) -> None:
        """Before a product and what the model does with it until the next one."""
        activation_elements = num_tokens * max(self.in_features, self.out_features)
        weight_elements = 0 if self.unpacked else self.in_features * self.out_features
        self.resident_limit.make_room(itemsize * (weight_elements + 3 * activation_elements))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., I] in the compute dtype; returns [..., O] in the same dtype."""
        out_TO: Tensor = _LinearFunction.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, self.in_features), self, *adapter_parameters([self])
        )
        return out_TO.view(*x.shape[:-1], self.out_features)


class _LinearFunction(torch.autograd.Function):
    """Saves x and, with an adapter, the low-rank activation [T, R]; dropout factors are drawn again, not saved."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, layer: NF4Linear, *parameters: Tensor | None) -> Tensor:
        (out_TO,), low_ranks = multiply([layer], x_TI)
        ctx.layer = layer
        if layer.adapter is not None:
            ctx.save_for_backward(x_TI, *low_ranks)
        return out_TO

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        linears, grads = [ctx.layer], [grad_outputs[0]]
        low_grads = low_rank_gradients(linears, grads)
        if low_grads is None:
            parameter_grads = bias_gradients(linears, grads)
        else:
            x_TI, *low_ranks = ctx.saved_tensors  # asked for once only: a recomputed layer gives them out once
            parameter_grads = parameter_gradients(linears, x_TI, grads, low_ranks, low_grads)
        grad_x_TI = input_gradient(linears, grads, low_grads) if ctx.needs_input_grad[0] else None
        return grad_x_TI, None, *parameter_grads


@contextmanager
def unpacked_once(linears: Sequence[NF4Linear]) -> Iterator[None]:
    """Until the end, each weight is unpacked at its first use only: for a pass over tiles of tokens."""
    for linear in linears:
        linear.unpacked = {}
    try:
        yield
    finally:
        for linear in linears:
            linear.unpacked = None


def adapter_parameters(linears: Iterable[NF4Linear]) -> list[Tensor | None]:
    """A, B, magnitude, bias of B and trained bias of each, None for what is not there: so autograd functions take and
    answer them."""
    found: list[Tensor | None] = []
    for linear in linears:
        own = linear.adapter
        found += [None] * 4 if own is None else [own.lora_A, own.lora_B, own.lora_magnitude_vector, own.lora_B_bias]
        found.append(linear.trained_bias)
    return found


def no_parameter_gradients(linears: Sequence[NF4Linear]) -> list[Tensor | None]:
    """In the order of `adapter_parameters`."""
    return [None] * (5 * len(linears))


def bias_gradients(linears: Sequence[NF4Linear], grads: Sequence[Tensor]) -> list[Tensor | None]:
    """Those of linears of which none has an adapter, in the order of `adapter_parameters`."""
    found = no_parameter_gradients(linears)
    found[4::5] = [_gradients_of_biases(linear, grad_TO)[1] for linear, grad_TO in zip(linears, grads, strict=True)]
    return found


def multiply(
    linears: Sequence[NF4Linear], x_TI: Tensor, *, added_TO: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """The output [T, O] of each, and the low-rank activations [T, R] of those that have an adapter, for backward.

    Args:
        linears: reading the same input.
        x_TI: in the compute dtype.
        added_TO: what is added to the output, where there is one linear.
    """
    low_ranks = first_products(linears, x_TI)
    outs = [_multiply_one(linear, x_TI, added_TO) for linear in linears]
    adapted = _adapted(linears, outs)
    for (adapter, out_TO), low_TR in zip(adapted, low_ranks, strict=True):
        out_TO.addmm_(low_TR, adapter.scaled_B(x_TI.dtype).t(), alpha=adapter.scale)
    return outs, low_ranks


def _multiply_one(linear: NF4Linear, x_TI: Tensor, added_TO: Tensor | None) -> Tensor:
    linear.make_room(x_TI.shape[0], x_TI.itemsize)
    weight_OI = _scaled_weight(linear, x_TI.dtype)
    bias_O = linear.whole_bias(x_TI.dtype)
    if added_TO is None:
        # On a CPU `linear` takes a transposed bf16 weight up to 1.8 times faster than `mm` (torch 2.13, AMX).
        out_TO = nn.functional.linear(x_TI, weight_OI, bias_O)
    else:
        out_TO = torch.addmm(added_TO, x_TI, weight_OI.t())
        out_TO = out_TO if bias_O is None else out_TO.add_(bias_O)
    del weight_OI
    dropped = _dropped_part(linear, x_TI)
    if dropped is not None:
        own_TI, weight_OI = dropped
        out_TO.addmm_(own_TI, weight_OI.t())
    return out_TO


def _scaled_weight(linear: NF4Linear, dtype: torch.dtype) -> Tensor:
    """The weight that multiplies the whole input: with DoRA and no dropout, each row in the length it is given."""
    adapter = linear.adapter
    if adapter is None or adapter.drops or adapter.lora_magnitude_vector is None:
        return _unpacked(linear, dtype)
    return _unpacked(linear, dtype, "scaled")


def dense_weights(linear: NF4Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The weight that multiplies the whole input, and with DoRA and dropout the one for what is left of it."""
    adapter = linear.adapter
    is_changed = adapter is not None and adapter.drops and adapter.lora_magnitude_vector is not None
    return _scaled_weight(linear, dtype), _unpacked(linear, dtype, "change") if is_changed else None


def _unpacked(linear: NF4Linear, dtype: torch.dtype, form: str = "plain") -> Tensor:
    """The dense weight: "plain", "scaled" by DoRA's factors of its rows, or the "change" that they make."""
    held = linear.unpacked
    if held is not None and (form, dtype) in held:
        return held[form, dtype]
    row_scale_O = None if form == "plain" or linear.adapter is None else linear.adapter.row_scale()
    if row_scale_O is not None and form == "change":
        row_scale_O = row_scale_O - 1.0
    weight_OI = nf4.dequantize(linear.weight, dtype, row_scale_O)
    if held is not None:
        held[form, dtype] = weight_OI
    return weight_OI


def _dropped_part(linear: NF4Linear, x_TI: Tensor) -> tuple[Tensor, Tensor] | None:
    """With DoRA and dropout, what is left of the input and the weight that multiplies only that: PEFT's definition,
    W x + (scale - 1) W drop(x) + scale B A drop(x), lets dropout reach the change of length, not W itself."""
    adapter = linear.adapter
    if adapter is None or adapter.lora_magnitude_vector is None or not adapter.drops:
        return None
    factors_TI = adapter.draw_dropout(x_TI.shape[0], x_TI.dtype)
    assert factors_TI is not None
    return factors_TI.mul_(x_TI), _unpacked(linear, x_TI.dtype, "change")


def low_rank_gradients(linears: Sequence[NF4Linear], grads: Sequence[Tensor]) -> Tensor | None:
    """Gradients of the scaled low-rank activations, side by side [T, S]; None where no linear has an adapter."""
    adapted = _adapted(linears, grads)
    if not adapted:
        return None
    grad_TO = adapted[0][1]
    ranks = [adapter.lora_A.shape[0] for adapter, _ in adapted]
    out_TS = grad_TO.new_empty((grad_TO.shape[0], sum(ranks)))
    for (adapter, grad_TO), low_TR in zip(adapted, _parts(out_TS, ranks), strict=True):
        # With beta = 0 a product that is scaled for nothing: what `low_TR` held is not read.
        low_TR.addmm_(grad_TO, adapter.scaled_B(grad_TO.dtype), beta=0.0, alpha=adapter.scale)
    return adapted[0][0].of_tokens.only_active_(out_TS)


def parameter_gradients(
    linears: Sequence[NF4Linear],
    x_TI: Tensor,
    grads: Sequence[Tensor],
    low_ranks: Sequence[Tensor],
    low_grads_TS: Tensor | None,
) -> list[Tensor | None]:
    """Gradients of A, B, magnitude and biases of each, in the order of `adapter_parameters`."""
    adapted = _adapted(linears, grads)
    if low_grads_TS is None:
        return bias_gradients(linears, grads)
    ranks = [adapter.lora_A.shape[0] for adapter, _ in adapted]
    factors = [adapter.draw_dropout(x_TI.shape[0], x_TI.dtype) for adapter, _ in adapted]
    grads_A: Sequence[Tensor]
    if all(own is None for own in factors):
        grads_A = _parts(torch.mm(low_grads_TS.t(), x_TI), ranks, dim=0)
    else:
        grads_A = [
            torch.mm(low_TR.t(), x_TI if own is None else x_TI * own)
            for low_TR, own in zip(_parts(low_grads_TS, ranks), factors, strict=True)
        ]
    rest = iter(zip(grads_A, factors, low_ranks, strict=True))
    found: list[Tensor | None] = []
    for linear, grad_TO in zip(linears, grads, strict=True):
        if linear.adapter is None:
            found += [None] * 3
        else:
            grad_A, own, low_TR = next(rest)
            grad_B = _gradient_of_B(linear.adapter, grad_TO, low_TR)
            found += [grad_A, grad_B, _gradient_of_magnitude(linear, x_TI, own, grad_TO, low_TR)]
        found += _gradients_of_biases(linear, grad_TO)
    return found


def _gradients_of_biases(linear: NF4Linear, grad_TO: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Those of the bias of B and of the linear's own, where they are trained."""
    adapter = linear.adapter
    scale = None if adapter is None or adapter.lora_B_bias is None else adapter.scale
    if scale is None and linear.trained_bias is None:
        return None, None
    grad_O = column_sums(grad_TO)
    return None if scale is None else grad_O * scale, None if linear.trained_bias is None else grad_O


def _gradient_of_B(adapter: LoraAdapter, grad_TO: Tensor, low_TR: Tensor) -> Tensor:
    # [R, T] x [T, O], then transposed: on a CPU twice as fast as [O, T] x [T, R].
    grad_RO = grad_TO.new_empty((low_TR.shape[1], grad_TO.shape[1]))
    grad_RO.addmm_(low_TR.t(), grad_TO, beta=0.0, alpha=adapter.scale)
    row_scale_O = adapter.row_scale()
    return (grad_RO if row_scale_O is None else grad_RO * row_scale_O).t()


def _gradient_of_magnitude(
    linear: NF4Linear, x_TI: Tensor, factors_TI: Tensor | None, grad_TO: Tensor, low_TR: Tensor
) -> Tensor | None:
    """Along the rows as they would be at length 1. Their product is made again: keeping it would take [T, O]."""
    adapter = linear.adapter
    if adapter is None or adapter.norm_O is None:
        return None
    linear.make_room(x_TI.shape[0], x_TI.itemsize)
    weight_OI = _unpacked(linear, x_TI.dtype)
    out_TO = nn.functional.linear(x_TI if factors_TI is None else x_TI * factors_TI, weight_OI)
    del weight_OI
    out_TO.addmm_(low_TR, adapter.lora_B.to(x_TI.dtype).t(), alpha=adapter.scale)
    return column_sums(out_TO.mul_(grad_TO)).div_(adapter.norm_O)


def input_gradient(linears: Sequence[NF4Linear], grads: Sequence[Tensor], low_grads_TS: Tensor | None) -> Tensor:
    """The gradient [T, I] of what all of them read."""
    grad_x_TI = grads[0].new_empty((grads[0].shape[0], linears[0].in_features))
    for index, (linear, grad_TO) in enumerate(zip(linears, grads, strict=True)):
        linear.make_room(grad_TO.shape[0], grad_TO.itemsize)
        weight_OI = _scaled_weight(linear, grad_TO.dtype)
        grad_x_TI.addmm_(grad_TO, weight_OI, beta=float(index > 0))  # with beta = 0 what is there is not read
        del weight_OI
    if low_grads_TS is None:
        return grad_x_TI
    adapted = [(linear, grad_TO) for linear, grad_TO in zip(linears, grads, strict=True) if linear.adapter is not None]
    adapters = [linear.adapter for linear, _ in adapted if linear.adapter is not None]
    factors = [adapter.draw_dropout(grad_x_TI.shape[0], grad_x_TI.dtype) for adapter in adapters]
    if all(own is None for own in factors):
        return grad_x_TI.addmm_(low_grads_TS, _joined_A(adapters, grad_x_TI.dtype))
    ranks = [adapter.lora_A.shape[0] for adapter in adapters]
    for adapter, (linear, grad_TO), low_TR, own in zip(
        adapters, adapted, _parts(low_grads_TS, ranks), factors, strict=True
    ):
        added_TI = torch.mm(low_TR, adapter.lora_A.to(low_TR.dtype))
        if own is not None and adapter.lora_magnitude_vector is not None:
            added_TI.addmm_(grad_TO, _unpacked(linear, grad_TO.dtype, "change"))
        grad_x_TI += added_TI if own is None else added_TI.mul_(own)
    return grad_x_TI


def first_products(linears: Sequence[NF4Linear], x_TI: Tensor) -> list[Tensor]:
    """The low-rank activations [T, R] of those that have an adapter."""
    adapters = [linear.adapter for linear in linears if linear.adapter is not None]
    if not adapters:
        return []
    factors = [adapter.draw_dropout(x_TI.shape[0], x_TI.dtype) for adapter in adapters]
    if all(own is None for own in factors):
        low_TS = adapters[0].of_tokens.only_active_(torch.mm(x_TI, _joined_A(adapters, x_TI.dtype).t()))
        return _parts(low_TS, [adapter.lora_A.shape[0] for adapter in adapters])
    return [
        adapter.of_tokens.only_active_(torch.mm(x_TI if own is None else x_TI * own, adapter.lora_A.to(x_TI.dtype).t()))
        for adapter, own in zip(adapters, factors, strict=True)
    ]


def _parts(joined: Tensor, ranks: Sequence[int], dim: int = 1) -> list[Tensor]:
    """Views of what belongs to each adapter. A split costs the host as much as a product: one alone is not split."""
    return [joined] if len(ranks) == 1 else list(joined.split(ranks, dim=dim))


def _joined_A(adapters: Sequence[LoraAdapter], dtype: torch.dtype) -> Tensor:
    matrices = [adapter.lora_A.to(dtype) for adapter in adapters]
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


def _adapted(linears: Sequence[NF4Linear], grads: Sequence[Tensor]) -> list[tuple[LoraAdapter, Tensor]]:
    return [
        (linear.adapter, grad_TO) for linear, grad_TO in zip(linears, grads, strict=True) if linear.adapter is not None
    ]

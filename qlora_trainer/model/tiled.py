"""The MLP of a layer over tiles of tokens: the tensors of its intermediate size are never there whole.

Each token's output depends on that token alone, so forward goes tile by tile and keeps nothing but its input; backward
makes the tensors of a tile again, takes its gradients and lets go of it. Each weight is unpacked once a pass, and
the gradients of adapters add up over the tiles in fp32. Source of the idea: Bekman et al., Arctic Long Sequence
Training (2025).

Of the fused form (`fused_halves`) norm and residual are inside the tiles, too. The MLP of another layer is taken as it
is, where it consists of linears and activations only.

Legend: B rows, T tokens (of all rows, where B is not named), H hidden size, I intermediate size, R rank.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_trainer.model.fused_halves import MlpHalf, norm_gradient, norm_parameters
from qlora_trainer.model.linear import (
    NF4Linear,
    adapter_parameters,
    first_products,
    input_gradient,
    low_rank_gradients,
    multiply,
    no_parameter_gradients,
    parameter_gradients,
    unpacked_once,
)
from qlora_trainer.model.row_ops import gated, gated_backward_, rms_norm, rms_norm_backward_
from qlora_trainer.model.token_tiles import add_, drawn_for, tiles


def tiled_mlp_half(x_BTH: Tensor, half: MlpHalf, tile_tokens: int, *, is_output_read: bool = True) -> Tensor:
    """x + mlp(norm(x)) [B, T, H], as `fused_halves.mlp_half` computes it.

    Args:
        x_BTH: the input, which is all that is kept for backward; what made it has no other reader. There its gradient
            takes its place.
        half: the modules.
        tile_tokens: tokens at a time.
        is_output_read: False where a layer is computed again, for what it keeps: then nothing is computed, and what is
            returned is `x_BTH`.
    """
    parameters = [*adapter_parameters([*half.inputs, half.down]), *norm_parameters(half)]
    out_BTH: Tensor = _TiledHalf.apply(  # type: ignore[no-untyped-call]
        x_BTH, half, tile_tokens, is_output_read, *parameters
    )
    return out_BTH


class TiledMlp(nn.Module):
    """Drop-in for a layer's MLP that consists of linears and activations; what its modules are called stays.

    Args:
        layer: whose MLP it is.
        mlp: whose modules it takes over.

    Attributes:
        tile_tokens: tokens at a time where the layer is recomputed, or keeps nothing; 0 for all at once.
    """

    def __init__(self, layer: GradientCheckpointingLayer, mlp: nn.Module) -> None:
        super().__init__()
        for name, part in mlp.named_children():
            self.add_module(name, part)
        # Not as modules: their own would have two names. Weak: layer and MLP in a circle would be let go of late.
        self.__dict__ |= {"_layer": weakref.ref(layer), "_whole": mlp}
        self.tile_tokens = 0

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        layer, whole = self.__dict__["_layer"](), self.__dict__["_whole"]
        if not self.tile_tokens or (torch.is_grad_enabled() and not layer.gradient_checkpointing):
            untiled: Tensor = whole(hidden)
            return untiled
        linears = [part for part in self.modules() if isinstance(part, NF4Linear)]
        parameters = [own for own in adapter_parameters(linears) if own is not None]
        out: Tensor = _TiledModule.apply(  # type: ignore[no-untyped-call]
            hidden, whole, linears, self.tile_tokens, *parameters
        )
        return out


def is_token_wise(mlp: nn.Module) -> bool:
    """Whether `TiledMlp` can stand for it: packed linears and activations, which take one tensor, and nothing else."""
    children = list(mlp.children())
    linears = [part for part in children if isinstance(part, NF4Linear)]
    others = [part for part in children if not isinstance(part, NF4Linear)]
    has_own_weights = any(True for part in others for _ in part.parameters())
    own = [*mlp.parameters(recurse=False), *mlp.buffers(recurse=False)]
    takes = len(inspect.signature(mlp.forward).parameters)
    return bool(linears) and not has_own_weights and not own and takes == 1


class _TiledHalf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BTH: Tensor, half: MlpHalf, tile_tokens: int, is_output_read: bool, *parameters: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x_BTH)
        ctx.half, ctx.tile_tokens = half, tile_tokens
        if not is_output_read:
            return x_BTH
        x_TH = x_BTH.flatten(0, 1)
        out_TH = torch.empty_like(x_TH)
        linears = [*half.inputs, half.down]
        with unpacked_once(linears):
            for tile in tiles(x_TH.shape[0], tile_tokens):
                with drawn_for(linears, tile):
                    out_TH[tile] = _half_forward(half, x_TH[tile])
        return out_TH.view(x_BTH.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (x_BTH,) = ctx.saved_tensors
        half: MlpHalf = ctx.half
        x_TH, grad_TH = x_BTH.detach().flatten(0, 1), grad_outputs[0].flatten(0, 1)
        grad_x_TH = x_TH if ctx.needs_input_grad[0] else None  # nobody else reads it any more
        linears = [*half.inputs, half.down]
        sums = [*no_parameter_gradients(linears), None]
        with unpacked_once(linears):
            for tile in tiles(x_TH.shape[0], ctx.tile_tokens):
                with drawn_for(linears, tile):
                    own = None if grad_x_TH is None else grad_x_TH[tile]
                    add_(sums, _half_backward(half, x_TH[tile], grad_TH[tile], own))
        grad_x_BTH = None if grad_x_TH is None else grad_x_TH.view(x_BTH.shape)
        return grad_x_BTH, None, None, None, *sums


def _half_forward(half: MlpHalf, x_TH: Tensor) -> Tensor:
    normed_TH, _ = rms_norm(x_TH, half.norm.weight_H, half.norm.eps, half.norm.offset)
    (gate_TI, up_TI), _ = multiply(half.inputs, normed_TH)
    del normed_TH
    gated_TI = gated(gate_TI, up_TI, half.activation)
    del gate_TI, up_TI
    (out_TH,), _ = multiply([half.down], gated_TI, added_TO=x_TH)
    return out_TH


def _half_backward(half: MlpHalf, x_TH: Tensor, grad_TH: Tensor, grad_x_TH: Tensor | None) -> list[Tensor | None]:
    """One tile: its gradient goes into `grad_x_TH`, if any, those of its adapters and of its norm are returned."""
    norm = half.norm
    normed_TH, inverse_T1 = rms_norm(x_TH, norm.weight_H, norm.eps, norm.offset)
    grads, low_ranks = multiply(half.inputs, normed_TH)  # gate and up, until their gradients take their place
    down_low_grads = low_rank_gradients([half.down], [grad_TH])
    gated_TI = input_gradient([half.down], [grad_TH], down_low_grads)  # its gradient, until it is made again
    gated_backward_(gated_TI, grads[0], grads[1], half.activation)
    down_low_ranks = first_products([half.down], gated_TI)
    down_grads = parameter_gradients([half.down], gated_TI, [grad_TH], down_low_ranks, down_low_grads)
    del gated_TI
    low_grads = low_rank_gradients(half.inputs, grads)
    in_grads = parameter_gradients(half.inputs, normed_TH, grads, low_ranks, low_grads)
    del normed_TH
    norm_grad = None
    if grad_x_TH is not None or norm.trained_H is not None:
        own_TH = input_gradient(half.inputs, grads, low_grads)
        norm_grad = norm_gradient(norm, own_TH, x_TH, inverse_T1)
        if grad_x_TH is not None:
            rms_norm_backward_(own_TH, x_TH, inverse_T1, norm.weight_H, norm.offset, grad_TH)
            grad_x_TH.copy_(own_TH)
    return [*in_grads, *down_grads, norm_grad]


class _TiledModule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, mlp: nn.Module, linears: Sequence[NF4Linear], tile_tokens: int, *parameters: Tensor
    ) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.mlp, ctx.linears, ctx.tile_tokens = mlp, linears, tile_tokens
        x_TH = hidden.flatten(0, -2)
        out_TH = torch.empty_like(x_TH)
        with unpacked_once(linears):
            for tile in tiles(x_TH.shape[0], tile_tokens):
                with drawn_for(linears, tile):
                    out_TH[tile] = mlp(x_TH[tile])
        return out_TH.view(hidden.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        linears, trained = ctx.linears, ctx.needs_input_grad[4:]
        # Not saved: a recomputed layer would give out copies, in which nothing ends.
        parameters = [own for own in adapter_parameters(linears) if own is not None]
        leaves = [own for own, needed in zip(parameters, trained, strict=True) if needed]
        x_TH, grad_TH = hidden.flatten(0, -2), grad_outputs[0].flatten(0, -2)
        grad_x_TH = torch.empty_like(x_TH) if ctx.needs_input_grad[0] else None
        sums: list[Tensor | None] = [None] * len(leaves)
        with unpacked_once(linears):
            for tile in tiles(x_TH.shape[0], ctx.tile_tokens):
                with drawn_for(linears, tile):
                    own = None if grad_x_TH is None else grad_x_TH[tile]
                    add_(sums, _module_backward(ctx.mlp, leaves, x_TH[tile], grad_TH[tile], own))
        found = iter(sums)
        grad_hidden = None if grad_x_TH is None else grad_x_TH.view(hidden.shape)
        return grad_hidden, None, None, None, *(next(found) if needed else None for needed in trained)


def _module_backward(
    mlp: nn.Module, leaves: Sequence[Tensor], x_TH: Tensor, grad_TH: Tensor, grad_x_TH: Tensor | None
) -> Sequence[Tensor]:
    with torch.enable_grad():
        own_TH = x_TH.detach().requires_grad_(grad_x_TH is not None)
        out_TH = mlp(own_TH)
    if grad_x_TH is None:
        return torch.autograd.grad(out_TH, leaves, grad_TH)
    *grads, grad_own_TH = torch.autograd.grad(out_TH, [*leaves, own_TH], grad_TH)
    grad_x_TH.copy_(grad_own_TH)
    return grads

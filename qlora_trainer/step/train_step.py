"""The tensor side of training and evaluation: forward, loss, backward, over the micro-batches of one global batch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from qlora_trainer.model.dora import refresh_norms
from qlora_trainer.model.final_norm import FinalNorm, deferred
from qlora_trainer.model.quantized import QuantizedModel, hidden_states
from qlora_trainer.step.batch import MicroBatch
from qlora_trainer.step.loss import chunked_cross_entropy, largest_bytes
from qlora_trainer.step.tiled_loss import tiled_cross_entropy


def accumulate_gradients(
    model: QuantizedModel,
    micro_batches: Iterable[MicroBatch],
    *,
    num_supervised_tokens: int,
    loss_chunk_tokens: int,
    loss_scale: Tensor | None = None,
) -> Tensor:
    """Forward and backward over a global batch; gradients add up in the parameters' `.grad`.

    Args:
        model: in train mode.
        micro_batches: the global batch, cut any way.
        num_supervised_tokens: of the whole global batch, what the summed loss is divided by, so that the cut does not
            change the gradient.
        loss_chunk_tokens: see `chunked_cross_entropy`.
        loss_scale: of fp16 (`step.loss_scaler`), 0-dim fp32: gradients are those of the loss times that.

    Returns:
        Mean cross-entropy of the global batch's supervised tokens in nats, 0-dim fp32, detached.
    """
    refresh_norms(model)  # once for all micro-batches: no weight changes between them
    total = torch.zeros((), dtype=torch.float32, device=model.device)
    gradient_scale = None if loss_scale is None else loss_scale / num_supervised_tokens
    if gradient_scale is None and model.head.is_trained:  # the gradient of a head does not wait for backward
        gradient_scale = torch.full_like(total, 1.0 / num_supervised_tokens)
    for micro_batch in micro_batches:
        loss_sum = summed_loss(
            model,
            on_device(model, micro_batch),
            loss_chunk_tokens=loss_chunk_tokens,
            gradient_scale=gradient_scale,
        )
        loss = loss_sum / num_supervised_tokens
        # With a scale both factors are in the gradient already, before it was rounded.
        if loss_sum.requires_grad:  # else nothing but the head is trained, which has its gradient
            (loss if gradient_scale is None else loss_sum).backward()
        total += loss.detach()
    return total


@torch.no_grad()
def evaluate(model: QuantizedModel, micro_batches: Iterable[MicroBatch], *, loss_chunk_tokens: int) -> Tensor:
    """Summed cross-entropy of all supervised tokens in nats, 0-dim fp64; the model is put in eval mode and back."""
    refresh_norms(model)
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    was_training = model.module.training
    model.module.eval()
    try:
        for micro_batch in micro_batches:
            total += summed_loss(model, on_device(model, micro_batch), loss_chunk_tokens=loss_chunk_tokens)
    finally:
        model.module.train(was_training)
    return total


def on_device(model: QuantizedModel, micro_batch: MicroBatch) -> MicroBatch:
    """A micro-batch where the model wants it; tables on the host are looked up there."""
    return micro_batch.to(model.device, are_ids_looked_up_here=model.head.is_on_host)


def summed_loss(
    model: QuantizedModel, micro_batch: MicroBatch, *, loss_chunk_tokens: int, gradient_scale: Tensor | None = None
) -> Tensor:
    """Sum of the cross-entropies of a micro-batch's supervised tokens, 0-dim fp32, differentiable.

    `gradient_scale` is that of `chunked_cross_entropy`.
    """
    if model.final_norm is not None and model.final_norm.tile_tokens:
        return _tiled_loss(model, micro_batch, model.final_norm, loss_chunk_tokens, gradient_scale)
    hidden_NH = supervised_states(model, micro_batch, loss_chunk_tokens=loss_chunk_tokens)
    return chunked_cross_entropy(
        hidden_NH,
        micro_batch.targets_N,
        model.head,
        model.logit_shape,
        chunk_tokens=loss_chunk_tokens,
        gradient_scale=gradient_scale,
    )


def _tiled_loss(
    model: QuantizedModel, micro_batch: MicroBatch, norm: FinalNorm, chunk_tokens: int, gradient_scale: Tensor | None
) -> Tensor:
    with deferred(norm):
        hidden_TH = _all_states(model, micro_batch).flatten(0, 1)
    tile_TH = hidden_TH[: norm.tile_tokens]
    model.resident_limit.make_room(largest_bytes(tile_TH, model.head, model.logit_shape, chunk_tokens=chunk_tokens))
    return tiled_cross_entropy(
        hidden_TH,
        micro_batch.source_positions_N,
        micro_batch.targets_N,
        norm,
        model.head,
        model.logit_shape,
        tile_tokens=norm.tile_tokens,
        chunk_tokens=chunk_tokens,
        gradient_scale=gradient_scale,
    )


def supervised_states(model: QuantizedModel, micro_batch: MicroBatch, *, loss_chunk_tokens: int) -> Tensor:
    """What the head sees at the supervised positions, [N, H] in the compute dtype; there is room for their loss."""
    hidden_BTH = _all_states(model, micro_batch)
    hidden_NH = hidden_BTH.flatten(0, 1).index_select(0, micro_batch.source_positions_N)
    model.resident_limit.make_room(
        largest_bytes(hidden_NH, model.head, model.logit_shape, chunk_tokens=loss_chunk_tokens)
    )
    return hidden_NH


def _all_states(model: QuantizedModel, micro_batch: MicroBatch) -> Tensor:
    model.of_tokens.row_keys_T = micro_batch.row_keys_T
    return hidden_states(
        model,
        micro_batch.input_ids_BT,
        micro_batch.position_ids_BT,
        micro_batch.document_lengths,
        micro_batch.row_lengths,
    )

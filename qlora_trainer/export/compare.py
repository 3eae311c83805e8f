"""How far one model's predictions are from another's, on the same tokens, a few positions at a time.

Full logits of all positions never exist: 8,192 positions over Llama 3's vocabulary would be 4 GB, twice.

Legend: B rows, T tokens, H hidden size, N positions with a next token that is learned, C of them at once, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_trainer.model.quantized import CausalModel, hidden_states
from qlora_trainer.step.batch import MicroBatch
from qlora_trainer.step.loss import chunk_logits

# fp32 [C, V] tensors that are alive at once are six: two of logits, their log-probabilities, and what is made of them.
_CHUNK_BYTES, _LARGEST_TENSORS = 2**28, 6


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of a model with a reference, means over the same tokens.

    Attributes:
        num_tokens: that were predicted.
        reference_loss, loss: cross-entropies in nats.
        kl: Kullback-Leibler divergence of the model from the reference, KL(reference || model), in nats.
        agreement: share of the positions at which both find the same token the likeliest.
    """

    num_tokens: int
    reference_loss: float
    loss: float
    kl: float
    agreement: float


@torch.no_grad()
def compare(reference: CausalModel, model: CausalModel, batches: Iterable[MicroBatch]) -> Comparison:
    """Run both over the same tokens; they are put in eval mode.

    Args:
        reference: what the other is measured against.
        model: of the same vocabulary.
        batches: with one supervised token at least.
    """
    reference.module.eval()
    model.module.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    num_tokens = 0
    chunk = max(1, _CHUNK_BYTES // (_LARGEST_TENSORS * 4 * reference.head.out_features))
    for batch in batches:
        own_NH, other_NH = _seen_by_head(reference, batch), _seen_by_head(model, batch)
        for first in range(0, own_NH.shape[0], chunk):
            part = slice(first, first + chunk)
            sums += _summed(
                chunk_logits(own_NH[part], reference.head, reference.logit_shape),
                chunk_logits(other_NH[part], model.head, model.logit_shape),
                batch.targets_N[part].to(reference.device),
            )
        num_tokens += own_NH.shape[0]
    reference_loss, loss, kl, agreement = (sums / num_tokens).tolist()
    return Comparison(num_tokens, reference_loss, loss, kl, agreement)


def is_worse(comparison: Comparison, *, by: float) -> bool:
    """Whether the loss is more than `by` nats above the reference's, or no number."""
    return not math.isfinite(comparison.loss) or comparison.loss - comparison.reference_loss > by


def _seen_by_head(model: CausalModel, batch: MicroBatch) -> Tensor:
    """[N, H] of the positions whose next token is learned."""
    on_device = batch.to(model.device)
    hidden_BTH = hidden_states(model, on_device.input_ids_BT, on_device.position_ids_BT, on_device.document_lengths)
    return hidden_BTH.flatten(0, 1).index_select(0, on_device.source_positions_N)


def _summed(reference_CV: Tensor, logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Both losses, the divergence and the agreements, summed: fp64 [4]."""
    agreed = (reference_CV.argmax(-1) == logits_CV.argmax(-1)).sum()
    own_CV, other_CV = reference_CV.log_softmax(-1), logits_CV.log_softmax(-1)
    losses = [-log_CV.gather(1, targets_C.unsqueeze(1)).double().sum() for log_CV in (own_CV, other_CV)]
    kl = (own_CV.exp() * (own_CV - other_CV)).sum(-1).double().sum()
    return torch.stack([*losses, kl, agreed.double()]).cpu()

"""How well a model predicts documents: loss, and how often its likeliest token is the right one; without full logits.

Legend: N supervised positions, C positions in a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from qlora_trainer.model.dora import refresh_norms
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.step.batch import MicroBatch
from qlora_trainer.step.loss import add_cross_entropy_, chunk_logits
from qlora_trainer.step.train_step import on_device, supervised_states


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Over all supervised tokens of some documents.

    Attributes:
        loss: mean cross-entropy in nats.
        accuracy: share of the tokens that the model finds likeliest of all.
        num_supervised_tokens: how many there are.
    """

    loss: float
    accuracy: float
    num_supervised_tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where a double cannot hold it."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


@torch.no_grad()
def score(model: QuantizedModel, micro_batches: Iterable[MicroBatch], *, loss_chunk_tokens: int) -> Scores:
    """Loss, to the bit that of `evaluate`, and accuracy; the model is put in eval mode and back.

    Args:
        model: the model to judge.
        micro_batches: with at least one supervised token.
        loss_chunk_tokens: see `chunked_cross_entropy`.
    """
    refresh_norms(model)
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    num_right = torch.zeros((), dtype=torch.int64, device=model.device)
    num_tokens = 0
    was_training = model.module.training
    model.module.eval()
    try:
        for here in micro_batches:
            micro_batch = on_device(model, here)
            hidden_NH = supervised_states(model, micro_batch, loss_chunk_tokens=loss_chunk_tokens)
            loss = torch.zeros((), dtype=torch.float32, device=model.device)
            for first in range(0, hidden_NH.shape[0], loss_chunk_tokens):
                chunk = slice(first, first + loss_chunk_tokens)
                logits_CV = chunk_logits(hidden_NH[chunk], model.head, model.logit_shape)
                targets_C = micro_batch.targets_N[chunk]
                num_right += (logits_CV.argmax(-1) == targets_C).sum()  # before the logits are written over
                add_cross_entropy_(loss, logits_CV, targets_C.unsqueeze(1))
                del logits_CV  # before the next chunk's are made
            total += loss
            num_tokens += hidden_NH.shape[0]
    finally:
        model.module.train(was_training)
    return Scores(
        loss=float(total) / num_tokens, accuracy=int(num_right) / num_tokens, num_supervised_tokens=num_tokens
    )

"""The worst that a run can meet, once, before its first step: a run that will not fit fails in its first minute.

A micro-batch of full size, every token supervised, goes through forward, backward, the optimizer's update and an
evaluation, and the state is rendered as a checkpoint would be. Then adapters and optimizer are as they were: what they
start from is drawn again from the seed. The update has a learning rate of 0, so that tables that are trained whole,
which cannot be drawn, stay what they are; it computes all the same.
"""

from __future__ import annotations

import numpy as np

from qlora_trainer.model.adapters import initial_weights, trainable_parameters
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.planning.plan import PlanKnobs
from qlora_trainer.run.checkpoint.tensors import lay_out, render
from qlora_trainer.step.batch import MicroBatch, make_micro_batch
from qlora_trainer.step.document import Document
from qlora_trainer.step.loss_scaler import LossScaler
from qlora_trainer.step.optimizer import AdapterOptimizer
from qlora_trainer.step.state import first_non_finite
from qlora_trainer.step.train_step import accumulate_gradients, evaluate


def rehearse(
    model: QuantizedModel,
    optimizer: AdapterOptimizer,
    scaler: LossScaler | None,
    lora: LoraSettings,
    knobs: PlanKnobs,
    *,
    packing: bool,
    max_grad_norm: float | None,
    seed: int,
) -> None:
    """Go through everything a step, an evaluation and a save do, at full size; nothing of it stays.

    Args:
        model, optimizer, scaler, lora: new, or about to be given a checkpoint's state; the scaler is left as it is.
        knobs: of the plan.
        packing, max_grad_norm: as in training.
        seed: that the adapters are drawn from.

    Raises:
        Exception: whatever the device raises when memory runs out (see `hardware.memory`).
    """
    try:
        micro_batch = worst_micro_batch(knobs, packing=packing)
        optimizer.zero_gradients()
        accumulate_gradients(
            model,
            [micro_batch],
            num_supervised_tokens=micro_batch.num_tokens,
            loss_chunk_tokens=knobs.loss_chunk,
            loss_scale=None if scaler is None else scaler.scale,
        )
        if scaler is not None:
            scaler.unscale_(optimizer.gradient)
        norm = optimizer.clip_gradients(max_grad_norm)
        optimizer.update(0.0, norm)
        evaluate(model, [micro_batch], loss_chunk_tokens=knobs.loss_chunk)
        weights = {name: parameter.data for name, parameter in trainable_parameters(model).items()}
        for tensors in (weights, optimizer.state_dict()):
            first_non_finite(tensors)
            for _ in render(tensors, lay_out(tensors)):
                pass
    finally:
        optimizer.reset(initial_weights(model, lora, seed=seed))


def worst_micro_batch(knobs: PlanKnobs, *, packing: bool) -> MicroBatch:
    """Documents of full length, as many as go into a micro-batch and one that fills it up; every token is learned."""
    num_full, rest = divmod(knobs.micro_batch_tokens, knobs.seq_len)
    lengths = [knobs.seq_len] * num_full + [rest] * (packing and rest > 1)
    documents = []
    for index, length in enumerate(lengths):
        ids_T = np.zeros(length, dtype=np.int32)
        documents.append(Document(index, ids_T, ids_T))
    return make_micro_batch(documents, seed=0, step=0, packing=packing)

"""A base's NF4 cache becomes a model in memory."""

from __future__ import annotations

from dataclasses import replace

import torch

from qlora_trainer.config.levers import NO_LEVERS, Levers
from qlora_trainer.model.base import Base
from qlora_trainer.model.nf4_cache import CachedWeights, NF4Cache
from qlora_trainer.model.pull_levers import pull_levers
from qlora_trainer.model.quantized import QuantizedModel, assemble
from qlora_trainer.model.skeleton import build_skeleton


def load_quantized(
    base: Base, cache: NF4Cache, *, compute_dtype: torch.dtype, device: torch.device, levers: Levers = NO_LEVERS
) -> QuantizedModel:
    """The frozen model of `base`: on a CPU its weights stay in the memory-mapped files, on CUDA they are copied over.

    Args:
        base: whose architecture it is.
        cache: its NF4 form, as `prepare_nf4_cache` returned it; it says whether the head is in NF4.
        compute_dtype: dtype of activations and matrix products.
        device: where the weights go, tensor by tensor.
        levers: what is pulled from the beginning: what they keep off the device never is there.
    """
    skeleton = build_skeleton(base.config, with_buffers=True)
    weights = CachedWeights(cache.folder)
    levers = replace(levers, nf4_head=cache.nf4_head)
    model = assemble(skeleton, weights, compute_dtype=compute_dtype, device=device, levers=levers)
    pull_levers(model, levers)
    return model

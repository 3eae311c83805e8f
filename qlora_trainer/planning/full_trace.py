"""A training step at full depth for one set of knobs: what a plan is confirmed with."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from qlora_trainer.model.adapters import trainable_parameters
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.offload import keep_least
from qlora_trainer.planning.dry_model import DryModel, attach_dry_adapters, dry_store
from qlora_trainer.planning.inside import bytes_of, inside_bytes
from qlora_trainer.planning.replay import Storages, read_storages
from qlora_trainer.planning.shallow_trace import full_micro_batch, in_one_thread, marking
from qlora_trainer.planning.timeline import Level, read_levels
from qlora_trainer.planning.tracker import StorageTracker
from qlora_trainer.step.train_step import accumulate_gradients


@dataclass(frozen=True, slots=True)
class TrainingTrace:
    """A micro-batch forward and backward.

    Attributes:
        levels: part by part, what is alive beyond base, adapters, gradients and optimizer.
        storages: every allocation and release, in order.
    """

    levels: list[Level]
    storages: Storages


def trace_training(
    dry: DryModel,
    settings: LoraSettings,
    *,
    adapter_dtype: torch.dtype,
    num_tokens: int,
    document_lengths: Sequence[int],
    rows: int,
    num_recomputed: int,
    num_offloaded: int = 0,
    loss_chunk_tokens: int,
    alignment_bytes: int,
) -> TrainingTrace:
    """Forward and backward of one micro-batch through the whole model.

    Args:
        dry: the model.
        settings, adapter_dtype: the adapters.
        num_tokens: of the micro-batch, every one supervised.
        document_lengths: that occur in it; how many documents have each does not matter (see `inside`).
        rows: rows of one document each that the micro-batch consists of; 1 when packed.
        num_recomputed: layers that keep only their input at most.
        num_offloaded: of these, layers whose input waits on the host.
        loss_chunk_tokens: as in training.
        alignment_bytes: of the device's allocator.

    Returns:
        Part by part, what is alive beyond base, adapters, gradients and optimizer.
    """
    device = dry.model.device
    tracker = StorageTracker(
        device_type=device.type, alignment_bytes=alignment_bytes, inside=inside_bytes, results=dry.results
    )
    with dry.fake_mode, without_collector():
        with dry.results:
            attach_dry_adapters(dry, settings, dtype=adapter_dtype)
            for parameter in trainable_parameters(dry.model).values():
                parameter.grad = torch.empty(parameter.shape, dtype=torch.float32, device=device)
            keep_least(dry.model, num_recomputed, num_offloaded, dry_store(dry))
            dry.model.module.train()
            micro_batch = full_micro_batch(num_tokens, document_lengths, device, rows=rows)
        with tracker, marking(tracker, dry.layers, dry.final_norm), in_one_thread():
            accumulate_gradients(
                dry.model, [micro_batch], num_supervised_tokens=num_tokens, loss_chunk_tokens=loss_chunk_tokens
            )
    return TrainingTrace(read_levels(tracker, alignment_bytes, bytes_of), read_storages(tracker, bytes_of))


@contextmanager
def without_collector() -> Iterator[None]:
    """Python's cycle collector walks through all of transformers every few thousand operations: not during a trace."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

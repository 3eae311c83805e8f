"""Our step, traced: what `run/attempts.py` does for a global batch, on fake tensors of the Python-only accelerator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.step_ledger import Entry, Ledger
from benchmarks.step_totals import Case
from qlora_trainer.config.levers import NO_LEVERS, Levers
from qlora_trainer.hardware.python_accelerator import python_accelerator
from qlora_trainer.model.adapters import trainable_parameters
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.offload import keep_least
from qlora_trainer.model.pull_levers import pull_levers
from qlora_trainer.planning.dry_model import attach_dry_adapters, build_dry_model, dry_store
from qlora_trainer.planning.full_trace import without_collector
from qlora_trainer.planning.model_config import read_model_config
from qlora_trainer.run import attempts
from qlora_trainer.run.session import Session
from qlora_trainer.step.document import Document
from qlora_trainer.step.optimizer import AdapterOptimizer, OptimizerSettings
from qlora_trainer.step.train_step import accumulate_gradients

MODELLED = (
    "attention: torch's FlashAttention kernel, by its FLOPs",
    "bitsandbytes' CUDA kernels (dequantization, AdamW), by what they read and write",
)
OFFLOADED = "layer inputs offloaded, tiles"
LEVERS = {
    "": NO_LEVERS,
    OFFLOADED: Levers(tile_tokens=2048),
    "base streamed": Levers(base_residency="streamed"),
    "tables on the host": Levers(embedding_residency="host"),
    "optimizer on the host": Levers(optimizer_on_host=True),
}


def require_accelerator() -> torch.device:
    """The device without kernels."""
    device = python_accelerator()
    if device is None:
        raise RuntimeError(f"torch {torch.__version__} makes no Python-only accelerator")
    return device


def trace(case: Case) -> Iterator[Entry]:
    """One step: the batch's copies, forward, backward, clipping, the update.

    The two numbers of the log are read when all of this is under way (`attempts.step_or_revise`): a wait between steps.
    """
    device = require_accelerator()
    levers = LEVERS[case.lever]
    config, _ = read_model_config(case.model)
    config.num_hidden_layers = case.num_layers
    dry = build_dry_model(config, double_quant=True, compute_dtype=torch.bfloat16, device=device, alignment_bytes=1)
    ids_L = np.zeros(case.num_tokens // case.num_documents, dtype=np.int32)
    documents = [Document(index, ids_L, ids_L) for index in range(case.num_documents)]
    ledger = Ledger(device.type)
    with dry.fake_mode, without_collector():
        lora = LoraSettings(case.rank, 2.0 * case.rank, 0.0, tuple(dry.model.linears))
        attach_dry_adapters(dry, lora, dtype=torch.bfloat16)
        optimizer = AdapterOptimizer(
            trainable_parameters(dry.model),
            OptimizerSettings(
                bits=32,
                residency="host" if levers.optimizer_on_host else "device",
                weight_decay=0.0,
                paging_folder=Path(),
            ),
        )
        num_recomputed = dry.num_layers if case.is_recomputed else 0
        keep_least(dry.model, num_recomputed, num_recomputed if case.lever == OFFLOADED else 0, dry_store(dry))
        pull_levers(dry.model, levers)
        dry.model.module.train()
        session = _session(case, dry.model, optimizer)
        with ledger, _telling_phases(ledger):
            loss_and_norm = attempts._accumulate(session, documents, step=1)
            optimizer.update(1e-4, loss_and_norm)
    return ledger.entries()


def _session(case: Case, model: Any, optimizer: AdapterOptimizer) -> Session:
    """What a step asks of a run."""
    plan = SimpleNamespace(loss_chunk=case.loss_chunk_tokens, micro_batch_tokens=case.num_tokens)
    session = SimpleNamespace(
        model=model,
        optimizer=optimizer,
        scaler=None,
        packs=True,
        knobs=SimpleNamespace(plan=plan),
        config=SimpleNamespace(training=SimpleNamespace(seed=0, max_grad_norm=1.0)),
    )
    return cast("Session", session)


@contextmanager
def _telling_phases(ledger: Ledger) -> Iterator[None]:
    def inside(*args: Any, **kwargs: Any) -> Tensor:
        with ledger.inside():
            return accumulate_gradients(*args, **kwargs)

    with mock.patch.object(attempts, "accumulate_gradients", inside):
        yield

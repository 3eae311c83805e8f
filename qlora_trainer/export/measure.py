"""How far a merged model is from base and adapter as they were trained, beside how far NF4 is from the original base.

The merged and the original model are read layer by layer. So is the base in NF4 on a CPU, whose mapped pages are given
back behind a layer; on a GPU it is on the device, as in training.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from qlora_trainer.config.levers import Levers
from qlora_trainer.export.compare import Comparison, compare
from qlora_trainer.export.held_out import HeldOut
from qlora_trainer.export.source import Source
from qlora_trainer.hardware.device import DTYPES, ComputeDtype, choose_compute_dtype, choose_device
from qlora_trainer.model.adapter_folder import AdapterFolder
from qlora_trainer.model.adapter_set import AdapterSet
from qlora_trainer.model.base import Base
from qlora_trainer.model.base_config import read_config
from qlora_trainer.model.load import load_quantized
from qlora_trainer.model.nf4_cache import NF4Cache
from qlora_trainer.model.streamed import stream_model
from qlora_trainer.model.trained_tables import with_updated_tables
from qlora_trainer.run.evaluation import MICRO_BATCH_TOKENS, micro_batches
from qlora_trainer.run.records import Preparing

MergeBase = Literal["original", "dequantized"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """How far models are from each other on the same held-out tokens.

    Attributes:
        base: which weights the adapter was merged into.
        dtype: of the merged weights, as torch calls it.
        compute_dtype: in which all of them were run.
        num_documents, num_held_out: how many were run, of how many.
        where: the files they are of.
        merged: the merged model, against base and adapter as they were trained.
        quantized: the base in NF4, against the original one; no adapter.
    """

    base: MergeBase
    dtype: str
    compute_dtype: str
    num_documents: int
    num_held_out: int
    where: str
    merged: Comparison
    quantized: Comparison


def measure(
    folder: Path,
    source: Source,
    base: Base,
    cache: NF4Cache,
    held_out: HeldOut,
    *,
    base_kind: MergeBase,
    dtype: torch.dtype,
) -> Generator[Preparing, None, Measured]:
    """Run four models over held-out rows, two at a time, while telling which.

    Args:
        folder: the merged model.
        source: the adapter.
        base: with its weights on disk.
        cache: its NF4 form.
        held_out: the rows.
        base_kind: which weights the adapter was merged into.
        dtype: of the merged weights.

    Raises:
        ConfigError: weights that cannot be read.
    """
    device = choose_device()
    name = _compute_dtype(source, device)
    compute_dtype = DTYPES[name]
    longest = max(document.num_tokens for document in held_out.documents)
    tokens = max(MICRO_BATCH_TOKENS, longest)
    batches = list(micro_batches(held_out.documents, tokens, packing=held_out.packing))
    yield Preparing(what="running base and adapter, and the merged model, over held-out rows")
    levers = Levers(base_residency="streamed" if device.type == "cpu" else "device")
    quantized = load_quantized(base, cache, compute_dtype=compute_dtype, device=device, levers=levers)
    adapters = AdapterSet(quantized)
    adapter = AdapterFolder(
        source.base_name,
        source.revision,
        source.settings,
        dict(source.weights),
        source.updates,
    )
    adapters.add("trained", with_updated_tables(quantized, adapter))
    adapters.activate("trained")
    streamed = stream_model(folder, read_config(folder), compute_dtype=compute_dtype, device=device)
    merged = compare(quantized, streamed, batches)
    del streamed  # its tables go before those of the original one come
    adapters.activate(None)
    yield Preparing(what="running the base in NF4, and the original one, over held-out rows")
    original = stream_model(
        base.folder, base.config, compute_dtype=compute_dtype, device=device, layers=base.layer_replication
    )
    return Measured(
        base=base_kind,
        dtype=str(dtype).removeprefix("torch."),
        compute_dtype=name,
        num_documents=len(held_out.documents),
        num_held_out=held_out.num_held_out,
        where=held_out.where,
        merged=merged,
        quantized=compare(original, quantized, batches),
    )


def _compute_dtype(source: Source, device: torch.device) -> ComputeDtype:
    """That of the run, whose held-out loss the reference then has; fp16 is for old GPUs only."""
    asked = "auto" if source.config is None else source.config.quantization.compute_dtype
    if asked == "auto" or (asked == "float16" and device.type == "cpu"):
        return choose_compute_dtype(device)
    return asked

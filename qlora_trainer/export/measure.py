"""How far a merged model is from base and adapter as they were trained, beside how far NF4 is from the original base.

The base in NF4 is in memory, as in training; the merged and the original model are read layer by layer.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qlora_trainer.export.compare import Comparison, compare, micro_batches
from qlora_trainer.export.held_out import HeldOut
from qlora_trainer.export.source import Source
from qlora_trainer.hardware.device import DTYPES, ComputeDtype, choose_compute_dtype, choose_device
from qlora_trainer.model.adapters import attach_adapters, detach_adapters
from qlora_trainer.model.base import Base, read_config
from qlora_trainer.model.load import load_quantized
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.nf4_cache import NF4Cache
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.model.streamed import stream_model
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
    batches = micro_batches(held_out.documents, packing=held_out.packing)
    yield Preparing(what="running base and adapter, and the merged model, over held-out rows")
    quantized = load_quantized(base, cache, compute_dtype=compute_dtype, device=device)
    with _adapted(quantized, source.settings, source.weights):
        streamed = stream_model(folder, read_config(folder), compute_dtype=compute_dtype, device=device)
        merged = compare(quantized, streamed, batches)
    yield Preparing(what="running the base in NF4, and the original one, over held-out rows")
    original = stream_model(base.folder, base.config, compute_dtype=compute_dtype, device=device)
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


@contextmanager
def _adapted(model: QuantizedModel, settings: LoraSettings, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with its adapter, and with the modules that were trained whole in place of the base's."""
    whole = {name: weights[name] for name in weights if name.rpartition(".")[0] in settings.modules_to_save}
    low_rank = {name: own for name, own in weights.items() if name not in whole}
    is_bf16 = all(own.dtype == torch.bfloat16 for own in low_rank.values())
    plain = replace(settings, modules_to_save=())
    attach_adapters(model, plain, low_rank, dtype=torch.bfloat16 if is_bf16 else torch.float32)
    before = {}
    for name, own in whole.items():
        table, leaf = model.module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        before[name] = table.get_buffer(leaf)
        setattr(table, leaf, own.to(model.device))
    try:
        yield
    finally:
        for name, own in before.items():
            setattr(model.module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], own)
        detach_adapters(model)


def _compute_dtype(source: Source, device: torch.device) -> ComputeDtype:
    """That of the run, whose held-out loss the reference then has; fp16 is for old GPUs only."""
    asked = "auto" if source.config is None else source.config.quantization.compute_dtype
    if asked == "auto" or (asked == "float16" and device.type == "cpu"):
        return choose_compute_dtype(device)
    return asked

"""`merge`: an adapter becomes part of its base, and how far that is from what was trained is measured before it stays.

An adapter is trained on a base in NF4. Merged into the original weights it meets another base; merged into the unpacked
NF4 weights it meets its own, which is further from what was published. Neither is right for all, so both are offered,
and neither is done unseen.

What is written takes the memory of one tensor. Measuring takes that of two models' tables and one layer; on a GPU, the
base in NF4 on the device, as training did.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from qlora_trainer.data.rows import Reading
from qlora_trainer.errors import ConfigError
from qlora_trainer.export.added_biases import added_bias_fields, with_fields
from qlora_trainer.export.compare import is_worse
from qlora_trainer.export.held_out import HeldOut, measured_on, read_documents
from qlora_trainer.export.measure import Measured, MergeBase, measure
from qlora_trainer.export.merged_folder import plan_shards, write_beside, write_weights
from qlora_trainer.export.merged_weights import (
    BaseWeights,
    MergedWeights,
    dequantized_weights,
    merged_shapes,
    original_weights,
    unties_head,
)
from qlora_trainer.export.new_folder import new_folder
from qlora_trainer.export.portable import require_mergeable
from qlora_trainer.export.source import Source, read_source, with_plain_lora
from qlora_trainer.model.base import Base, fetch_weights, read_tokenizer
from qlora_trainer.model.nf4_cache import NF4Cache, prepare_nf4_cache
from qlora_trainer.model.skeleton import build_skeleton, find_parts
from qlora_trainer.run.checkpoint.storage import LOCAL, Storage, check_free_space
from qlora_trainer.run.fingerprints import require_same_base
from qlora_trainer.run.records import Preparing

MergedDtype = Literal["bf16", "fp16", "fp32"]
MAX_LOSS_ABOVE = 0.02  # nats by which a merged model may be worse than base and adapter
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Merged:
    """What was written.

    Attributes:
        path: the transformers folder.
        num_bytes: of its weights.
        num_shards: of its weights.
        is_worse: it was kept by force, though it is worse than base and adapter.
    """

    path: Path
    num_bytes: int
    num_shards: int
    is_worse: bool


def merge(
    target: Path,
    *,
    to: Path,
    base: MergeBase,
    dtype: MergedDtype,
    data: str | None,
    force: bool,
    max_tokens: int,
    model: str | None,
    storage: Storage = LOCAL,
) -> Generator[Preparing | Reading | Measured, None, Merged]:
    """Yield what is being done and what was measured; the folder is there when the generator returns.

    Args:
        target: a run folder, or a PEFT adapter folder.
        to: where the transformers folder goes, absolute, new or empty.
        base: which weights of the base are merged into.
        dtype: of the result.
        data: a file to measure on, or None for the rows that the run held out.
        force: keep the merged model also where it is worse than base and adapter, or cannot be measured.
        max_tokens: about so many tokens of the held-out rows are run.
        model: base to use in place of the one that the adapter names.
        storage: where to write.

    Raises:
        ConfigError: no adapter in `target`, one that does not fit its base or that its architecture has no place for, a
            base that has changed since, nothing to measure on, or a merged model that is worse than base and adapter;
            nothing is left then.
        StorageError: the disk refused, or what is read back is not what was written; nothing is left.
    """
    merged_dtype = _DTYPES[dtype]
    source = read_source(target, model=model, may_change_base=True)
    require_mergeable(source.settings, source.folder)
    added_fields = added_bias_fields(source.base.config, source.parts, source.settings, where=source.folder)
    skeleton = source.skeleton
    if added_fields:
        skeleton = build_skeleton(with_fields(source.base.config, added_fields), with_buffers=False)
    read_tokenizer(source.base.folder)  # it goes along: a base without one is told now
    held_out = yield from _held_out(target, source, data, max_tokens=max_tokens, force=force)
    yield Preparing(what=f"finding the base {source.base_name}")
    fetched = fetch_weights(source.base)
    source = with_plain_lora(source, fetched)
    double_quant = source.config is None or source.config.quantization.double_quant
    nf4_head = source.config is not None and source.config.quantization.head == "nf4"
    cache = None
    if held_out is not None or base == "dequantized":
        yield Preparing(what="finding the base in NF4, or quantizing it")
        cache = prepare_nf4_cache(fetched, double_quant=double_quant, nf4_head=nf4_head)
        if model is None and source.run is not None:
            require_same_base(source.run, cache.key, base_name=source.base_name)
    shapes = merged_shapes(skeleton, find_parts(skeleton), source.settings, merged_dtype)
    shards = plan_shards(shapes)
    num_bytes = sum(tensor.nbytes for tensor in shapes.values())
    is_bad = False
    with new_folder(to, storage, key="--to", doing="writing the merged model") as temporary:
        fix = "Free some space or choose another --to."
        check_free_space(to.parent, num_bytes, storage, what="a merged model", fix=fix)
        weights = MergedWeights(
            _weights(fetched, cache, base, double_quant=double_quant),
            source.weights,
            source.settings,
            shapes,
            source.parts,
            source.updates,
        )
        yield from write_weights(temporary, weights, shards, storage)
        unties = unties_head(source.parts, source.settings)
        write_beside(temporary, source, dtype=merged_dtype, unties=unties, added_fields=added_fields, storage=storage)
        if held_out is not None and cache is not None:
            measured = yield from measure(
                temporary, source, fetched, cache, held_out, base_kind=base, dtype=merged_dtype
            )
            yield measured
            is_bad = is_worse(measured.merged, by=MAX_LOSS_ABOVE)
            if is_bad and not force:
                raise _worse(to, measured)
    return Merged(to, num_bytes, len(shards), is_bad)


def _held_out(
    target: Path, source: Source, data: str | None, *, max_tokens: int, force: bool
) -> Generator[Preparing | Reading, None, HeldOut | None]:
    """What to measure on; None where there is nothing and it is forced."""
    yield Preparing(what="reading the held-out rows")
    try:
        judged_on = measured_on(target, source, data)
    except ConfigError:
        if force and data is None:
            return None
        raise
    return (yield from read_documents(judged_on, source, max_tokens=max_tokens))


def _weights(base: Base, cache: NF4Cache | None, kind: MergeBase, *, double_quant: bool) -> BaseWeights:
    if kind == "original":
        return original_weights(base.folder, base.layer_replication)
    assert cache is not None
    return dequantized_weights(cache.folder, double_quant=double_quant)


def _worse(to: Path, measured: Measured) -> ConfigError:
    merged = measured.merged
    others = "--base dequantized, which it was trained on" if measured.base == "original" else "--dtype fp32"
    return ConfigError(
        where=f"merge {to}",
        found=f"a held-out loss of {merged.loss:.4f}, {merged.loss - merged.reference_loss:.4f} nats above the "
        f"{merged.reference_loss:.4f} of base and adapter",
        expected=f"at most {MAX_LOSS_ABOVE:g} nats above",
        fix=f"Nothing was kept. Merge into {others}, or keep it with --force.",
    )

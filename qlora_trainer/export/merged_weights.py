"""The weights of base and adapter in one, computed tensor by tensor when they are asked for.

A linear becomes W + s B A, and with DoRA m (W + s B A) / |W + s B A|, its rows scaled to the trained magnitudes m (PEFT
computes the norm from the base that it merges into, and so is it here). All of it is done in fp32, some rows at a
time, and rounded once to the dtype of the result. A module that was trained whole takes the place of the base's.

Legend: O out_features, I in_features, R rank, Q rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_trainer.config.values import LayerRanges
from qlora_trainer.errors import ConfigError
from qlora_trainer.model import nf4
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.skeleton import Parts
from qlora_trainer.model.streamed import DiskWeights
from qlora_trainer.model.table_updates import TableUpdate, update_table_, updated_bias

_BLOCK_ELEMENTS = 2**24  # of a weight in fp32 at once: 64 MiB


class BaseWeights(Protocol):
    """Where the weights of the base come from."""

    def linear(self, name: str) -> Tensor:
        """The weight [O, I] of a linear, in 16 bits or more."""

    def dense(self, name: str) -> Tensor:
        """Any other parameter."""


@dataclass(frozen=True, slots=True)
class OriginalWeights:
    """Those that the base was published with."""

    disk: DiskWeights

    def linear(self, name: str) -> Tensor:
        """As it is stored."""
        return self.disk.mapped(name)

    def dense(self, name: str) -> Tensor:
        """As it is stored."""
        return self.disk.mapped(name)


@dataclass(frozen=True, slots=True)
class DequantizedWeights:
    """Those that the adapter saw while it was trained: NF4, unpacked; also of a head that was in NF4."""

    disk: DiskWeights
    double_quant: bool

    def linear(self, name: str) -> Tensor:
        """Unpacked to fp32."""
        parts = nf4.checkpoint_names(name, double_quant=self.double_quant)
        packed = nf4.from_checkpoint(name, {part: self.disk.mapped(part) for part in parts})
        return nf4.dequantize(packed, torch.float32)

    def dense(self, name: str) -> Tensor:
        """As the cache stores it, in bf16; a head in NF4 unpacked to fp32."""
        return self.linear(name) if f"{name}.absmax" in self.disk.files else self.disk.mapped(name)


def original_weights(folder: Path, layers: LayerRanges = ()) -> OriginalWeights:
    """The weights of a base's folder, of whose layers some are repeated."""
    return OriginalWeights(DiskWeights.of(folder, layers))


def dequantized_weights(cache_folder: Path, *, double_quant: bool) -> DequantizedWeights:
    """The weights of its NF4 cache."""
    return DequantizedWeights(DiskWeights.of(cache_folder), double_quant)


class MergedWeights(Mapping[str, Tensor]):
    """Name in the checkpoint -> merged tensor of `dtype`, computed anew each time it is asked for.

    Args:
        base: the base's weights.
        adapter: by our names.
        settings: what the adapter is.
        shapes: of the result, as `merged_shapes` gives them.
        parts: of the base.
        updates: by the full name of a table that the adapter has no weight of.
    """

    def __init__(
        self,
        base: BaseWeights,
        adapter: Mapping[str, Tensor],
        settings: LoraSettings,
        shapes: Mapping[str, Tensor],
        parts: Parts,
        updates: Mapping[str, TableUpdate] | None = None,
    ) -> None:
        self._updates = updates or {}
        self._biases = {f"{name}.bias": name for name in parts.linears}
        self._dense = set(parts.dense_parameters)
        self._base, self._adapter, self._settings, self._shapes = base, adapter, settings, shapes
        self._targets = {f"{name}.weight": name for name in settings.targets}
        self._linears = {f"{name}.weight" for name in parts.linears}
        # A head that was tied is the input embedding, also where the embedding has become another.
        self._tied = {f"{parts.head}.weight": f"{parts.embeddings[0]}.weight"} if parts.is_tied else {}

    def __getitem__(self, name: str) -> Tensor:
        like = self._shapes[name]
        if name in self._targets:
            merged = self._merged(self._targets[name], self._base.linear(name), like.dtype)
        elif name.rpartition(".")[0] in self._updates:
            merged = self._updated(name, like)
        elif name in self._biases:
            merged = self._bias(name, like)
        elif name in self._adapter:
            merged = self._adapter[name].to(like.dtype)
        else:
            stored = self._base.linear(name) if name in self._linears else self._base.dense(self._tied.get(name, name))
            merged = stored.to(like.dtype)
        if merged.shape != like.shape:
            raise _broken(name, f"the shape {tuple(merged.shape)}", f"{tuple(like.shape)}, as config.json says")
        if not _is_finite(merged):
            fix = "Take --dtype bf16, whose largest number is that of fp32, or another adapter."
            raise _broken(name, f"NaN or an infinity in {str(like.dtype).removeprefix('torch.')}", "numbers", fix)
        return merged

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def _bias(self, name: str, like: Tensor) -> Tensor:
        """Of a linear: its own, trained or not, or none, and with `lora_bias` that of its B."""
        linear = self._biases[name]
        of_B_O = self._adapter.get(f"{linear}.lora_B_bias")
        if name in self._adapter or name in self._dense:
            own_O = self._adapter[name] if name in self._adapter else self._base.dense(name)
        else:
            own_O = torch.zeros(like.shape)
        if of_B_O is None or own_O.shape != like.shape:  # which is refused by whoever asked
            return own_O.to(like.dtype)
        return torch.add(own_O.float(), of_B_O.float(), alpha=self._settings.scale_of(linear)).to(like.dtype)

    def _updated(self, name: str, like: Tensor) -> Tensor:
        update, stored = self._updates[name.rpartition(".")[0]], self._base.dense(self._tied.get(name, name))
        if stored.shape != like.shape:
            raise _broken(name, f"the shape {tuple(stored.shape)}", f"{tuple(like.shape)}, as config.json says")
        if name.endswith(".bias"):
            return updated_bias(stored, update).to(like.dtype)
        table_VH = torch.empty(like.shape, dtype=like.dtype)
        start_VH = stored if update.own_VH is None else update.own_VH
        update_table_(table_VH, None, replace(update, own_VH=start_VH))
        return table_VH

    def _merged(self, target: str, weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
        a_RI, b_OR = (self._adapter[f"{target}.{leaf}"].float() for leaf in ("lora_A", "lora_B"))
        magnitude_O = self._adapter[f"{target}.lora_magnitude_vector"].float() if self._settings.use_dora else None
        if weight_OI.shape != (b_OR.shape[0], a_RI.shape[1]):
            expected = f"{(b_OR.shape[0], a_RI.shape[1])}, as config.json says"
            raise _broken(f"{target}.weight", f"the shape {tuple(weight_OI.shape)}", expected)
        out_OI = torch.empty(weight_OI.shape, dtype=dtype)
        rows = max(1, _BLOCK_ELEMENTS // weight_OI.shape[1])
        for first in range(0, weight_OI.shape[0], rows):
            block = slice(first, first + rows)
            sum_QI = torch.addmm(weight_OI[block].float(), b_OR[block], a_RI, alpha=self._settings.scale_of(target))
            if magnitude_O is not None:
                norm_Q = torch.linalg.vector_norm(sum_QI, dim=1)
                norm_Q.masked_fill_(norm_Q == 0.0, 1.0)  # a row of zeros stays zero, as in training (`model.dora`)
                sum_QI *= (magnitude_O[block] / norm_Q).unsqueeze(1)
            out_OI[block] = sum_QI
        return out_OI


def _is_finite(tensor: Tensor) -> bool:
    """Some of it at a time: `isfinite` makes several copies."""
    return all(bool(torch.isfinite(part).all()) for part in tensor.reshape(-1).split(_BLOCK_ELEMENTS))


def merged_shapes(
    skeleton: PreTrainedModel, parts: Parts, settings: LoraSettings, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Name -> tensor on meta, of every parameter of the merged model, in the order of the model.

    A linear has a bias where the skeleton gives it one: that of the base, or one with biases that a merge adds.
    A tied head is no longer tied where it or its embedding was trained on its own; see `unties_head`.
    """
    kept = {f"{name}.weight" for name in parts.linears} | set(parts.dense_parameters)
    if unties_head(parts, settings):
        kept.add(f"{parts.head}.weight")
    return {
        name: torch.empty(parameter.shape, dtype=dtype, device="meta")
        for name, parameter in skeleton.named_parameters(remove_duplicate=False)
        if name in kept
    }


def unties_head(parts: Parts, settings: LoraSettings) -> bool:
    """Whether merging gives a head of its own to a model that had none: PEFT trains a copy of one of the two.

    Not where one copy serves both.
    """
    trained = (parts.head, parts.embeddings[0])
    return parts.is_tied and settings.tied_head is None and any(name in settings.modules_to_save for name in trained)


def _broken(
    name: str, found: str, expected: str, fix: str = "Fetch the base again, or use the base of this adapter."
) -> ConfigError:
    return ConfigError(where=f"merging {name}", found=found, expected=expected, fix=fix)

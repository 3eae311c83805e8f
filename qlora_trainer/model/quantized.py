"""A causal language model whose linears are NF4 and whose other weights are frozen: assembled, and run.

Legend: B rows, T tokens a row, H hidden size, N positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from qlora_trainer.config.levers import NO_LEVERS, Levers
from qlora_trainer.hardware.heap import ResidentLimit
from qlora_trainer.model.activated import set_active_tokens
from qlora_trainer.model.final_norm import FinalNorm, replace_final_norm
from qlora_trainer.model.frozen import FrozenEmbedding, FrozenHead
from qlora_trainer.model.fused_layer import fuse_layers, make_tileable
from qlora_trainer.model.linear import NF4Linear
from qlora_trainer.model.lora_adapter import OfTokens
from qlora_trainer.model.nf4 import NF4Weight
from qlora_trainer.model.skeleton import Parts, find_parts
from qlora_trainer.model.trainable_norm import TrainableNorm, take_over_norms


class DenseSource(Protocol):
    """Where the weights come from that stay as they are."""

    def dense(self, name: str) -> Tensor:
        """The tensor called `name` in the checkpoint, of 16 bits or more."""


class WeightSource(DenseSource, Protocol):
    """Where an assembled model's weights come from: a cache on disk, random numbers, or nothing (a dry run)."""

    def nf4(self, name: str) -> NF4Weight:
        """The packed weight of the linear whose checkpoint name is `name`."""


class CausalModel(Protocol):
    """What it takes to run a model, whatever its linears are."""

    @property
    def module(self) -> PreTrainedModel:
        """The transformers model."""

    @property
    def head(self) -> FrozenHead:
        """The output projection."""

    @property
    def logit_shape(self) -> LogitShape:
        """What happens to logits after the head."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""


@dataclass(frozen=True, slots=True)
class LogitShape:
    """What a model does to its logits after the head: `softcap * tanh(logits * scale / softcap)`.

    Attributes:
        scale: factor on the logits (Cohere's `logit_scale`, Granite's 1 / `logits_scaling`).
        softcap: Gemma 2's `final_logit_softcapping`; 0 for none.
    """

    scale: float
    softcap: float

    @classmethod
    def of(cls, config: PreTrainedConfig) -> LogitShape:
        scale = getattr(config, "logit_scale", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        return cls(scale, getattr(config, "final_logit_softcapping", None) or 0.0)

    def apply(self, logits: Tensor) -> Tensor:
        """A new tensor, in the dtype of `logits`."""
        if self.softcap == 0.0:
            return logits * self.scale
        return self.softcap * torch.tanh(logits * (self.scale / self.softcap))


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """The parts of one model that training and planning need by name.

    Attributes:
        module: the transformers model, its linears, embeddings and head replaced.
        linears: checkpoint name -> NF4 linear, in model order.
        head: the output projection.
        logit_shape: what happens to logits after the head.
        compute_dtype: dtype of activations and matrix products.
        device: where the weights are.
        of_tokens: shared by all adapters: what they know of the tokens that go through.
        resident_limit: shared by all linears; nothing is done about it until it is given a number.
        final_norm: behind the last layer; None where there is none.
        norms: by name, those that have a weight, in model order.
    """

    module: PreTrainedModel
    linears: dict[str, NF4Linear]
    head: FrozenHead
    logit_shape: LogitShape
    compute_dtype: torch.dtype
    device: torch.device
    of_tokens: OfTokens
    resident_limit: ResidentLimit
    final_norm: FinalNorm | None = None
    norms: Mapping[str, TrainableNorm | FinalNorm] = field(default_factory=dict)


def assemble(
    module: PreTrainedModel,
    weights: WeightSource,
    *,
    compute_dtype: torch.dtype,
    device: torch.device,
    levers: Levers = NO_LEVERS,
) -> QuantizedModel:
    """Put `weights` into a skeleton; each tensor goes to `device` as it is taken.

    1-D parameters (norms, biases) are held in the compute dtype, which is exact for fp32; tables stay as stored, but
    for a head that `levers` want in NF4.

    Args:
        module: as `build_skeleton` returned it, its buffers real; it becomes the model.
        weights: where every parameter comes from.
        compute_dtype: dtype of activations and matrix products.
        device: where everything goes, but for what `levers` keep elsewhere.
        levers: what `pull_levers` will be asked for.

    Raises:
        ConfigError: the architecture is not one that can be trained (see `find_parts`).
    """
    parts = find_parts(module)
    dense = take_dense(parts, weights, compute_dtype=compute_dtype, device=device, levers=levers)
    linears, resident_limit = {}, ResidentLimit()
    for name in parts.linears:
        packed = weights.nf4(f"{name}.weight")
        linears[name] = NF4Linear(packed, dense.pop(f"{name}.bias", None), resident_limit)
        if levers.base_residency == "device":
            linears[name].to(device)
        module.set_submodule(name, linears[name])
    head = put_dense(
        module,
        parts,
        dense,
        compute_dtype=compute_dtype,
        device=device,
        resident_limit=resident_limit,
        packed_head=_packed_head(parts, weights, device, levers) if levers.nf4_head else None,
    )
    norms = take_over_norms(module)
    fuse_layers(module)
    make_tileable(module)
    final_norm = replace_final_norm(module)
    return QuantizedModel(
        module,
        linears,
        head,
        LogitShape.of(module.config),
        compute_dtype,
        device,
        OfTokens(),
        resident_limit,
        final_norm,
        {
            name: final_norm if final_norm is not None and final_norm.norm is norm else norm
            for name, norm in norms.items()
        },
    )


def take_dense(
    parts: Parts,
    weights: DenseSource,
    *,
    compute_dtype: torch.dtype,
    device: torch.device,
    levers: Levers = NO_LEVERS,
) -> dict[str, Tensor]:
    """Everything but the linears' weights, by name: 1-D parameters in the compute dtype, tables as stored.

    All of it goes to `device`, but for tables that `levers` keep on the host. A head in NF4 is none of it.
    """
    head = f"{parts.head}.weight"
    tables = {*(f"{name}.weight" for name in parts.embeddings), head}
    stays = tables if levers.embedding_residency == "host" else set()
    return {
        name: _as_stored_or_computed(
            weights.dense(name) if name in stays else weights.dense(name).to(device), compute_dtype
        )
        for name in parts.dense_parameters
        if not (levers.nf4_head and name == head)
    }


def put_dense(
    module: PreTrainedModel,
    parts: Parts,
    dense: dict[str, Tensor],
    *,
    compute_dtype: torch.dtype,
    device: torch.device,
    resident_limit: ResidentLimit,
    packed_head: NF4Weight | None = None,
) -> FrozenHead:
    """Put what `take_dense` gave into a skeleton whose linears are replaced already, and freeze it; returns the head.

    Args:
        module: the skeleton, its buffers real.
        parts: of the skeleton.
        dense: is emptied of the tables.
        compute_dtype: of activations.
        device: where the buffers go.
        resident_limit: asked for room by the head.
        packed_head: the head's weight where it is in NF4, and then not in `dense`.
    """
    module.requires_grad_(False)
    head = _replace_tables(module, parts, dense, packed_head, compute_dtype, resident_limit)
    for name, tensor in dense.items():
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner).register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if isinstance(part, NF4Linear | FrozenEmbedding | FrozenHead) and name != "scale":
                continue  # where it should be since it was taken, which may be the host
            part.register_buffer(name, buffer.to(device), persistent=name not in part._non_persistent_buffers_set)
        if isinstance(part, nn.Dropout):
            part.p = 0.0  # the base is frozen: only the adapter's own dropout draws
    return head


def hidden_states(
    model: CausalModel,
    input_ids_BT: Tensor,
    position_ids_BT: Tensor,
    document_lengths: Sequence[int],
    row_lengths: Sequence[int] | None = None,
) -> Tensor:
    """The last layer's normed output [B, T, H] in the compute dtype, what the head sees.

    Args:
        model: the model to run, in its present train or eval mode.
        input_ids_BT, position_ids_BT: int64; positions restart at 0 in each document.
        document_lengths: lengths that cut each row of T tokens into documents.
        row_lengths: tokens of each row that are no padding behind its document; None for all.
    """
    if isinstance(model, QuantizedModel):
        set_active_tokens(model.of_tokens, input_ids_BT, position_ids_BT, row_lengths)
    out = model.module.base_model(
        input_ids=input_ids_BT,
        position_ids=position_ids_BT,
        use_cache=False,
        document_lengths=tuple(document_lengths),
    )
    hidden_BTH: Tensor = out.last_hidden_state
    return hidden_BTH


def _packed_head(parts: Parts, weights: WeightSource, device: torch.device, levers: Levers) -> NF4Weight:
    """On `device`, but for the packed bytes of one that lives on the host."""
    assert not parts.is_tied, "an embedding is not packed"  # `require_nf4_head` has refused it
    own = weights.nf4(f"{parts.head}.weight")
    scales = own.scales.to(device)
    packed = own.packed if levers.embedding_residency == "host" else own.packed.to(device)
    return NF4Weight(packed, scales.absmax, scales.nested_absmax, scales.offset, scales.code, own.shape)


def _as_stored_or_computed(tensor: Tensor, compute_dtype: torch.dtype) -> Tensor:
    return tensor.to(compute_dtype) if tensor.ndim == 1 else tensor


def _replace_tables(
    module: PreTrainedModel,
    parts: Parts,
    dense: dict[str, Tensor],
    packed_head: NF4Weight | None,
    compute_dtype: torch.dtype,
    resident_limit: ResidentLimit,
) -> FrozenHead:
    tables = {}
    for name in parts.embeddings:
        scale = getattr(module.get_submodule(name), "embed_scale", None)
        tables[name] = FrozenEmbedding(dense.pop(f"{name}.weight"), compute_dtype, scale)
    if parts.is_tied:
        input_name = next(name for name in tables if module.get_submodule(name) is module.get_input_embeddings())
        head = FrozenHead(tables[input_name].weight, None, resident_limit)
    else:
        weight_VH = packed_head or dense.pop(f"{parts.head}.weight")
        head = FrozenHead(weight_VH, dense.pop(f"{parts.head}.bias", None), resident_limit)
    for name, table in tables.items():
        module.set_submodule(name, table)
    module.set_submodule(parts.head, head)
    return head

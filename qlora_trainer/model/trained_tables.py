"""Embedding and head that are trained whole: put onto a model in the place of the frozen ones, as its parameters.

Their gradients are added straight to `.grad`, which is fp32: that of the head by the loss while a chunk's logits are
there (`step.loss`), that of the embedding where backward arrives (`model.frozen`).

Legend: V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from qlora_trainer.model.adapter_folder import AdapterFolder
from qlora_trainer.model.final_norm import FinalNorm
from qlora_trainer.model.frozen import FrozenEmbedding, FrozenHead
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.quantized import CausalModel, QuantizedModel
from qlora_trainer.model.table_names import BaseTables
from qlora_trainer.model.table_updates import require_updates_fit, update_table_
from qlora_trainer.model.trainable_norm import TrainableNorm, norm_names

Table = FrozenEmbedding | FrozenHead
_LEAVES = ("weight", "bias")


def tables_of(model: CausalModel) -> dict[str, Table]:
    """Embeddings and head by name, in model order."""
    return {name: part for name, part in model.module.named_modules() if isinstance(part, Table)}


def base_tables_of(model: CausalModel) -> BaseTables:
    """Their names, and those of the norms."""
    found = tables_of(model)
    embeddings = [name for name, part in found.items() if isinstance(part, FrozenEmbedding)]
    embeddings.sort(key=lambda name: found[name] is not model.module.get_input_embeddings())  # stable: that one first
    head = next(name for name, part in found.items() if part is model.head)
    is_tied = bool(getattr(model.module.config, "tie_word_embeddings", False))
    return BaseTables(tuple(embeddings), head, is_tied, norm_names(model.module.named_modules()))


def table_shapes(model: CausalModel, settings: LoraSettings) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what is trained of tables: a weight [V, H] of each that is trained whole, a head's bias [V]."""
    return {name: tuple(tensor.shape) for name, tensor in table_weights(model, settings).items()}


def table_weights(model: CausalModel, settings: LoraSettings) -> dict[str, Tensor]:
    """The same tables as they are now: those of the base, until they are trained."""
    found = tables_of(model)
    return {
        f"{name}.{leaf}": tensor.detach()
        for name, leaf in _trained_leaves(found, settings)
        if (tensor := getattr(found[name], leaf, None)) is not None
    }


def train_tables(
    model: CausalModel, settings: LoraSettings, weights: Mapping[str, Tensor], *, dtype: torch.dtype
) -> None:
    """Put a copy of each table that `settings` names in the place of the frozen one, to be trained.

    Args:
        model: whose tables they are; what is replaced is gone.
        settings: which, and whether the head uses that of the embedding.
        weights: `{module}.weight` and, of a head that has one, `{module}.bias`; other names are passed over.
        dtype: what a weight is held in; a bias is fp32. Gradients are fp32 whatever it is.
    """
    found = tables_of(model)
    for name, leaf in _trained_leaves(found, settings):
        if (given := weights.get(f"{name}.{leaf}")) is not None:
            own_dtype = dtype if leaf == "weight" else torch.float32
            parameter = nn.Parameter(given.to(device=model.device, dtype=own_dtype, copy=True))
            parameter.grad_dtype = torch.float32
            put(found[name], leaf, parameter)
    if settings.tied_head is not None:
        put(found[settings.tied_head], "weight", found[settings.modules_to_save[0]].weight)


def put(table: Table, leaf: str, tensor: Tensor) -> None:
    """Set a table's "weight" or "bias": a parameter is trained, any other tensor is not."""
    delattr(table, leaf)
    if isinstance(tensor, nn.Parameter):
        table.register_parameter(leaf, tensor)
    else:
        table.register_buffer(leaf, tensor, persistent=False)


def table_parameters(model: CausalModel) -> dict[str, nn.Parameter]:
    """`{module}.weight` and `{module}.bias` of all that is trained, in model order; one that serves two only once."""
    found: dict[str, nn.Parameter] = {}
    for name, table in tables_of(model).items():
        for leaf, parameter in table.named_parameters():
            if parameter.requires_grad and all(parameter is not other for other in found.values()):
                found[f"{name}.{leaf}"] = parameter
    return found


def held_tables(
    model: CausalModel, settings: LoraSettings, weights: Mapping[str, Tensor]
) -> dict[tuple[str, str], Tensor]:
    """(module, leaf) -> a copy of each table that an adapter has in the place of the base's, in the dtype it is in."""
    tables = {
        (name, leaf): weights[f"{name}.{leaf}"].to(device=model.device, copy=True)
        for name, leaf in _trained_leaves(tables_of(model), settings)
        if f"{name}.{leaf}" in weights
    }
    if settings.tied_head is not None:
        tables[settings.tied_head, "weight"] = tables[settings.modules_to_save[0], "weight"]
    return tables


def updated_tables(model: QuantizedModel, adapter: AdapterFolder) -> dict[str, Tensor]:
    """`{module}.weight` and `{module}.bias` of the tables that an adapter updates.

    Args:
        model: which trains them, and has those of the base there still: they are changed in place.
        adapter: that fits it.
    """
    made = {
        name: own for name, own in table_weights(model, adapter.settings).items() if _owner(name) in adapter.updates
    }
    for name, update in adapter.updates.items():
        update_table_(made[f"{name}.weight"], made.get(f"{name}.bias"), update)
    return made


def with_updated_tables(model: QuantizedModel, adapter: AdapterFolder, *, where: str = "adapter") -> AdapterFolder:
    """The adapter with copies of those tables among its weights, in the compute dtype.

    The model is left as it is; an error calls the adapter `where`.

    Raises:
        ConfigError: an update of another base.
    """
    tables = table_weights(model, adapter.settings)
    require_updates_fit(adapter.updates, {name: tuple(own.shape) for name, own in tables.items()}, where=where)
    made = {
        name: own.to(dtype=model.compute_dtype, copy=True)
        for name, own in tables.items()
        if _owner(name) in adapter.updates
    }
    for name, update in adapter.updates.items():
        update_table_(made[f"{name}.weight"], made.get(f"{name}.bias"), update)
    return replace(adapter, weights=adapter.weights | made, updates={})


def _trained_leaves(found: Mapping[str, Table], settings: LoraSettings) -> list[tuple[str, str]]:
    """(table, leaf) of what is trained; whether a head has a bias is not asked."""
    whole = [(name, leaf) for name in settings.modules_to_save for leaf in _LEAVES]
    return [*whole, *((name, "bias") for name in settings.biases if name in found)]


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def tensors_at(model: CausalModel, places: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Tensor]:
    """(module, leaf) -> what is there now."""
    return {(name, leaf): getattr(model.module.get_submodule(name), leaf) for name, leaf in places}


def put_tensors(model: CausalModel, tensors: Mapping[tuple[str, str], Tensor]) -> None:
    """Put tables, norms and biases, not to be trained, where they belong; no weight is copied."""
    for (name, leaf), tensor in tensors.items():
        part = model.module.get_submodule(name)
        if getattr(part, leaf) is tensor:
            continue
        if isinstance(part, TrainableNorm | FinalNorm) and isinstance(tensor, nn.Parameter):
            part.hold(leaf, tensor)
        else:
            setattr(part, leaf, tensor)

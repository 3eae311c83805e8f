"""Whether an adapter fits a base, asked of the base's skeleton: no weight of the base is read."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.skeleton import Parts
from qlora_trainer.model.table_names import BaseTables


def base_tables(parts: Parts) -> BaseTables:
    """The embeddings and the head of a base."""
    return BaseTables(parts.embeddings, parts.head, parts.is_tied)


def expected_shapes(skeleton: PreTrainedModel, settings: LoraSettings) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of an adapter with these settings on this base."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in settings.targets:
        linear = skeleton.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        shapes[f"{name}.lora_A"] = (settings.rank_of(name), linear.in_features)
        shapes[f"{name}.lora_B"] = (linear.out_features, settings.rank_of(name))
        if settings.use_dora:
            shapes[f"{name}.lora_magnitude_vector"] = (linear.out_features,)
    for name in settings.modules_to_save:
        for leaf, parameter in skeleton.get_submodule(name).named_parameters():
            shapes[f"{name}.{leaf}"] = tuple(parameter.shape)
    return shapes

"""Adapters read for a model, and swapped on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora_trainer.model.adapter_fit import base_tables, require_adapter_fits
from qlora_trainer.model.adapter_folder import AdapterFolder, read_adapter_folder
from qlora_trainer.model.adapter_set import AdapterSet
from qlora_trainer.model.adapters import attach_adapters
from qlora_trainer.model.base import Base
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.nf4_cache import NF4Cache
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.model.skeleton import build_skeleton, find_parts
from qlora_trainer.model.trained_tables import base_tables_of
from qlora_trainer.step.document import Document
from tests.model.tiny_bases import CONFIGS
from tests.model.tiny_models import load_for_training, packed_logits, prepare_apart, random_adapter

Prepared = dict[str, tuple[Base, NF4Cache]]


def prepared_apart(factory: pytest.TempPathFactory, names: Sequence[str]) -> Prepared:
    """These tiny bases by name, each with a cache of its own."""
    return {name: prepare_apart(factory.mktemp(name), CONFIGS[name]) for name in names}


def read_for(folder: Path, model: QuantizedModel) -> AdapterFolder:
    """A PEFT folder, whatever it makes of tables."""
    names, tables = list(model.linears), base_tables_of(model)
    return read_adapter_folder(folder, linear_names=names, tables=tables, may_change_base=True)


def read_that_fits(folder: Path, base: Base) -> AdapterFolder:
    """Another one, which is held against its base without any weight of that."""
    skeleton = build_skeleton(base.config, with_buffers=False)
    parts = find_parts(skeleton)
    adapter = read_adapter_folder(folder, linear_names=parts.linears, tables=base_tables(parts))
    require_adapter_fits(skeleton, adapter, where=str(folder))
    return adapter


def require_fresh_after_swaps(
    base: Base, cache: NF4Cache, settings: Mapping[str, LoraSettings], documents: Sequence[Document]
) -> None:
    """After any swap the logits are to the bit those of a fresh load, and the base's once it is alone; all differ."""
    model = load_for_training(base, cache)
    model.module.eval()
    adapters = AdapterSet(model)
    fresh_TV: dict[str | None, Tensor] = {None: packed_logits(model, documents)}
    for seed, (name, chosen) in enumerate(settings.items()):
        weights = random_adapter(model, chosen, b_size=0.2, seed=seed)
        adapters.add(name, AdapterFolder("base", None, chosen, weights))
        own = load_for_training(base, cache)
        own.module.eval()
        attach_adapters(own, chosen, weights, dtype=torch.float32)
        fresh_TV[name] = packed_logits(own, documents)
    first, second, third = settings
    for active in (second, first, third, second, None, third, first, None):
        adapters.activate(active)
        assert torch.equal(packed_logits(model, documents), fresh_TV[active])
    every = list(fresh_TV.values())
    assert all(not torch.equal(one, other) for number, one in enumerate(every) for other in every[:number])

"""Where the tables of the vocabulary live: on the device, or on the host, from where rows and blocks are fetched."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from qlora_trainer.hardware.mapped_pages import file_spans, give_back
from qlora_trainer.hardware.side_stream import SideStream
from qlora_trainer.model.frozen import FrozenEmbedding, FrozenHead
from qlora_trainer.model.quantized import QuantizedModel


def place_tables(model: QuantizedModel, *, is_on_host: bool) -> None:
    """Let embeddings and head live on the host from now on, or on the device; wherever they are.

    On a CPU, where both are the same memory, tables on the host are parts of the mapped cache whose pages are given
    back after use.

    Args:
        model: on a CPU, loaded from a cache on disk (`CachedWeights`), whose mapped tensors it still has.
        is_on_host: which of the two.

    Raises:
        ValueError: a table of a model on a CPU is in no mapped file.
    """
    moved: dict[int, Tensor] = {}  # a head that is tied is moved once
    for owner in _owners(model):
        key = id(owner.weight)
        if key not in moved:
            moved[key] = _placed(owner.weight, model.device, is_on_host=is_on_host)
        owner.weight = moved[key]
    for embedding in embeddings_of(model):
        embedding.device = model.device if is_on_host else None
    model.head.is_on_host = is_on_host


def embeddings_of(model: QuantizedModel) -> list[FrozenEmbedding]:
    """In model order."""
    return [part for part in model.module.modules() if isinstance(part, FrozenEmbedding)]


def tables_of(model: QuantizedModel) -> list[Tensor]:
    """The different tables."""
    return list({id(owner.weight): owner.weight for owner in _owners(model)}.values())


def _owners(model: QuantizedModel) -> list[FrozenEmbedding | FrozenHead]:
    return [*embeddings_of(model), model.head]


def _placed(table_VH: Tensor, device: torch.device, *, is_on_host: bool) -> Tensor:
    if device.type == "cpu":
        if is_on_host and not is_fake(table_VH):
            give_back(file_spans([table_VH]))  # what loading has touched
        return table_VH
    if not is_on_host:
        return table_VH.to(device)
    host = SideStream(device).host_memory(table_VH.numel(), table_VH.dtype).view(table_VH.shape)
    return host.copy_(table_VH)

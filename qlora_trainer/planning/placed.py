"""Where the frozen model lies for what is pulled: on the device, or on the host and passing through."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora_trainer.config.levers import Levers
from qlora_trainer.hardware.device_memory import DeviceMemory
from qlora_trainer.model.base_stream import NUM_BUFFERS, PARTS, layer_bytes, linears_of_layers, part_bytes
from qlora_trainer.model.linear import NF4Linear
from qlora_trainer.model.nf4 import NF4Weight
from qlora_trainer.model.tables import tables_of
from qlora_trainer.model.vocabulary_blocks import rows_in_block
from qlora_trainer.planning.dry_model import DryModel
from qlora_trainer.planning.pulled import packed_head


@dataclass(frozen=True, slots=True)
class Placed:
    """The model without adapters.

    Attributes:
        device: category -> bytes on the device, rounded.
        host_bytes: of what waits on the host, where that is other memory than the device.
        load_peak_bytes: most of the device while it is loaded.
        streamed_bytes: of what passes through the device, each time all layers have their turn.
    """

    device: Mapping[str, int]
    host_bytes: int
    load_peak_bytes: int
    streamed_bytes: int = 0


def place(dry: DryModel, memory: DeviceMemory, levers: Levers) -> Placed:
    """What the model takes of device and host.

    Args:
        dry: the model, nothing pulled.
        memory: of the device.
        levers: what is pulled.
    """
    device = {name: sum(map(memory.aligned, sizes)) for name, sizes in dry.resident.items()}
    placed = Placed(device, host_bytes=0, load_peak_bytes=dry.load_peak_bytes)
    tables = tables_of(dry.model)
    if levers.nf4_head:
        packed = packed_head(dry, torch.device("meta"))
        placed = _with_nf4_head(dry, memory, placed, packed)
        tables = [*(table for table in tables if table is not dry.model.head.weight), _by_token(packed)]
    if levers.embedding_residency == "host":
        placed = _with_tables_on_host(tables, memory, placed)
    return _with_streamed_base(dry, memory, placed) if levers.base_residency == "streamed" else placed


def _with_nf4_head(dry: DryModel, memory: DeviceMemory, placed: Placed, packed: NF4Weight) -> Placed:
    """Packed bytes in the place of the dense head's, and scales beside those of the linears."""
    scales = (packed.absmax, packed.nested_absmax, packed.offset)
    device = dict(placed.device)
    device["embedding"] += memory.aligned(packed.packed.nbytes) - memory.aligned(dry.model.head.weight.nbytes)
    device["quant_state"] += sum(memory.aligned(tensor.nbytes) for tensor in scales if tensor is not None)
    return _placed_as(placed, device)


def _by_token(packed: NF4Weight) -> Tensor:
    return packed.packed.view(packed.shape[0], -1)


def _with_tables_on_host(tables: Sequence[Tensor], memory: DeviceMemory, placed: Placed) -> Placed:
    """On a CPU the pages of one block stay, in a head's product or in a lookup; on a GPU nothing does."""
    largest_block = max(rows_in_block(table) * table.shape[1] * table.itemsize for table in tables)
    device = dict(placed.device)
    device["embedding"] -= sum(memory.aligned(table.nbytes) for table in tables)
    device["embedding"] += largest_block if memory.kind == "cpu" else 0
    on_host = 0 if memory.kind == "cpu" else sum(table.nbytes for table in tables)
    return replace(_placed_as(placed, device), host_bytes=placed.host_bytes + on_host)


def _with_streamed_base(dry: DryModel, memory: DeviceMemory, placed: Placed) -> Placed:
    """Two buffers as large as the largest layer; on a CPU the pages of one layer."""
    layers = [linears for linears in linears_of_layers(dry.model) if linears]
    largest = max(layers, key=layer_bytes)
    device = dict(placed.device)
    for name, parts in (("base", PARTS[:1]), ("quant_state", PARTS[1:])):
        device[name] -= sum(_bytes_of(linears, parts, memory) for linears in layers)
    if memory.kind == "cpu":
        device["base"] += part_bytes(largest, PARTS[:1]) + 2 * mmap.PAGESIZE * len(largest)
        device["quant_state"] += part_bytes(largest, PARTS[1:])
    else:
        device["base"] += NUM_BUFFERS * part_bytes(largest, PARTS[:1])
        device["quant_state"] += NUM_BUFFERS * (memory.aligned(layer_bytes(largest)) - part_bytes(largest, PARTS[:1]))
    streamed_bytes = sum(layer_bytes(linears) for linears in layers)
    return replace(
        _placed_as(placed, device),
        host_bytes=placed.host_bytes + (0 if memory.kind == "cpu" else streamed_bytes),
        streamed_bytes=streamed_bytes,
    )


def _placed_as(placed: Placed, device: Mapping[str, int]) -> Placed:
    """The same with other bytes on the device; what it took beyond them to be loaded stays."""
    load_peak_bytes = placed.load_peak_bytes - sum(placed.device.values()) + sum(device.values())
    return replace(placed, device=device, load_peak_bytes=load_peak_bytes)


def _bytes_of(linears: Sequence[NF4Linear], names: Sequence[str], memory: DeviceMemory) -> int:
    tensors = (getattr(linear, name) for linear in linears for name in names)
    return sum(memory.aligned(tensor.nbytes) for tensor in tensors if tensor is not None)

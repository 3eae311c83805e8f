"""What is trained at one rank: shapes, and the bytes that it takes beside gradient and optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch

from qlora_trainer.hardware.device_memory import DeviceMemory
from qlora_trainer.model.adapters import MAGNITUDE, adapter_shapes
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.planning.dry_model import DryModel
from qlora_trainer.step.optimizer import num_flat_elements


@dataclass(frozen=True, slots=True)
class Trained:
    """Adapters of one rank, and tables that are trained whole.

    Attributes:
        shapes: name -> shape, in model order.
        num_elements: of the optimizer's flat buffers.
        adapter_bytes: rounded, where the optimizer is on the device.
        adapter_bytes_beside_host: the same where it is on the host: what is fp32 then has its master there.
    """

    shapes: Mapping[str, tuple[int, ...]]
    num_elements: int
    adapter_bytes: int
    adapter_bytes_beside_host: int


def trained_at(
    rank: int, dry: DryModel, settings: LoraSettings, memory: DeviceMemory, adapter_dtype: torch.dtype
) -> Trained:
    """Count what `settings` train on `dry` at that rank."""
    shapes = adapter_shapes(dry.model, replace(settings, rank=rank))
    # What is fp32 is its own master: it lies in the optimizer's buffer. Beside a magnitude is a norm.
    in_16_bits = [shape for shape in shapes.values() if len(shape) == 2 and adapter_dtype != torch.float32]
    norms = [shape for name, shape in shapes.items() if name.endswith(MAGNITUDE)]
    in_32_bits = [shape for shape in shapes.values() if len(shape) != 2 or adapter_dtype == torch.float32]
    beside_optimizer = sum(memory.aligned(2 * prod(shape)) for shape in in_16_bits)
    beside_optimizer += sum(memory.aligned(4 * prod(shape)) for shape in norms)
    return Trained(
        shapes=shapes,
        num_elements=num_flat_elements(shapes.values()),
        adapter_bytes=beside_optimizer,
        adapter_bytes_beside_host=beside_optimizer + sum(memory.aligned(4 * prod(shape)) for shape in in_32_bits),
    )

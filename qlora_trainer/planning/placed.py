"""Where the frozen model lies for what is pulled: on the device, or on the host and passing through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qlora_trainer.config.levers import Levers
from qlora_trainer.hardware.device_memory import DeviceMemory
from qlora_trainer.planning.dry_model import DryModel


@dataclass(frozen=True, slots=True)
class Placed:
    """The model without adapters.

    Attributes:
        device: category -> bytes on the device, rounded.
        host_bytes: of what waits on the host, where that is other memory than the device.
        load_peak_bytes: most of the device while it is loaded.
    """

    device: Mapping[str, int]
    host_bytes: int
    load_peak_bytes: int


def place(dry: DryModel, memory: DeviceMemory, levers: Levers) -> Placed:
    """What the model takes of device and host.

    Args:
        dry: the model, nothing pulled.
        memory: of the device.
        levers: what is pulled.
    """
    device = {name: sum(map(memory.aligned, sizes)) for name, sizes in dry.resident.items()}
    return Placed(device, host_bytes=0, load_peak_bytes=dry.load_peak_bytes)

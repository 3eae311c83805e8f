"""Plans without a run: for a card that is not here, for this machine, and the dry run of a config with its data."""

from __future__ import annotations

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.planning.budget import Budget, cpu_budget, gpu_budget, machine_budget
from qlora_trainer.planning.make_plan import make_plan
from qlora_trainer.planning.model_config import read_model_config
from qlora_trainer.planning.plan import Plan


def plan_on(config: RunConfig, *, gpu: str | None, vram_bytes: int | None, ram_bytes: int | None) -> Plan:
    """Plan `config` for a device, with its frontier.

    Args:
        config: what is asked for; its data is not read.
        gpu, vram_bytes: a card of the catalogue, and what of it may be used.
        ram_bytes: of this machine's CPU.

    Raises:
        ConfigError: an unknown card or model, or more memory than there is.
    """
    model_config = read_model_config(config.model.base, config.model.revision)
    return make_plan(config, _budget(config, gpu, vram_bytes, ram_bytes), model_config=model_config, with_frontier=True)


def _budget(config: RunConfig, gpu: str | None, vram_bytes: int | None, ram_bytes: int | None) -> Budget:
    asked = None if config.memory.budget == "auto" else config.memory.budget
    host = None if config.memory.host_budget == "auto" else config.memory.host_budget
    if gpu is not None or vram_bytes is not None:
        limit, where = (asked, "memory.budget") if vram_bytes is None else (vram_bytes, "--vram")
        return gpu_budget(gpu, limit, host, where=where)
    if ram_bytes is not None:
        return cpu_budget(ram_bytes)
    return machine_budget(asked, host)

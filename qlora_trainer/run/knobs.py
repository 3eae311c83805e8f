"""What a run decides for itself, once: every `auto` of the config becomes a number before the first step.

The numbers are stored in the run folder's `plan.json` and in each checkpoint, and a resumed run takes them from there:
measured again (which dtype multiplies faster, say) they might differ, and the run would no longer be the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.hardware.device import (
    AdapterDtype,
    ComputeDtype,
    choose_adapter_dtype,
    choose_compute_dtype,
    num_cpu_threads,
)
from qlora_trainer.planning.plan import PlanKnobs

CHECKPOINTS_PER_RUN = 10
EVALUATIONS_PER_RUN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineKnobs:
    """What depends on the machine and is decided before the plan.

    Attributes:
        compute_dtype: name of the dtype of activations and products.
        adapter_dtype: of the one that adapters are held in.
        num_threads: CPU threads; their number changes the order of sums.
    """

    compute_dtype: ComputeDtype
    adapter_dtype: AdapterDtype
    num_threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """All that a run decides.

    Attributes:
        machine: what was decided for the machine.
        plan: what was decided for the memory.
        num_steps: optimizer steps of the whole run.
        save_every, eval_every: optimizer steps between checkpoints and evaluations.
        predicted_peak_bytes: what the plan says of what is measured: RSS on a CPU, allocated bytes on a GPU.
        breakdown: the plan's bytes at that peak by category, told where memory runs out; what it leaves is the process.
    """

    machine: MachineKnobs
    plan: PlanKnobs
    predicted_peak_bytes: int
    breakdown: Mapping[str, int]
    num_steps: int
    save_every: int
    eval_every: int

    def as_json(self) -> dict[str, Any]:
        """Plain values, for `plan.json` and `state.json`."""
        return asdict(self)

    def resolved(self) -> dict[str, Any]:
        """What took the place of `auto` (and of `max`), by dotted key of the config."""
        return {
            "quantization.compute_dtype": self.machine.compute_dtype,
            "lora.dtype": self.machine.adapter_dtype,
            "lora.rank": self.plan.rank,
            "lora.alpha": self.plan.alpha,
            "data.seq_len": self.plan.seq_len,
            "training.optimizer": self.plan.optimizer,
            "training.save_every": self.save_every,
            "training.eval_every": self.eval_every,
            "memory.micro_batch_tokens": self.plan.micro_batch_tokens,
            "memory.loss_chunk_tokens": self.plan.loss_chunk,
            "memory.activation_checkpointing": self.plan.num_recomputed,
            "memory.activation_offload": self.plan.activation_offload_layers,
            "memory.tile_tokens": self.plan.tile_tokens,
            "memory.embedding_residency": self.plan.embedding_residency,
            "memory.optimizer_residency": self.plan.optimizer_residency,
            "memory.base_residency": self.plan.base_residency,
        }


def decide_machine_knobs(config: RunConfig, device: torch.device) -> MachineKnobs:
    """Take what the config pins, decide the rest for `device`."""
    asked = config.quantization.compute_dtype
    compute_dtype = choose_compute_dtype(device) if asked == "auto" else asked
    return MachineKnobs(
        compute_dtype=compute_dtype,
        adapter_dtype=choose_adapter_dtype(config.lora.dtype, compute_dtype),
        num_threads=num_cpu_threads(),
    )


def decide_knobs(
    config: RunConfig,
    machine: MachineKnobs,
    plan: PlanKnobs,
    *,
    predicted_peak_bytes: int,
    breakdown: Mapping[str, int],
    num_steps: int,
) -> Knobs:
    """Decide how often to save and evaluate; what the config pins stays.

    Args:
        config: what the user asked for.
        machine, plan, predicted_peak_bytes, breakdown: decided before.
        num_steps: of the whole run.
    """
    training = config.training
    return Knobs(
        machine=machine,
        plan=plan,
        predicted_peak_bytes=predicted_peak_bytes,
        breakdown=breakdown,
        num_steps=num_steps,
        save_every=_or_decided(training.save_every, math.ceil(num_steps / CHECKPOINTS_PER_RUN)),
        eval_every=_or_decided(training.eval_every, math.ceil(num_steps / EVALUATIONS_PER_RUN)),
    )


def machine_knobs_of(saved: Mapping[str, Any]) -> MachineKnobs:
    """What the run decided when it began, from the plan in a checkpoint."""
    return MachineKnobs(**{field.name: saved["machine"][field.name] for field in fields(MachineKnobs)})


def plan_knobs_of(saved: Mapping[str, Any]) -> PlanKnobs:
    """The same of the memory; what an older version did not have was off."""
    plan = saved["plan"]
    return PlanKnobs(**{field.name: plan[field.name] for field in fields(PlanKnobs) if field.name in plan})


def knobs_of(saved: Mapping[str, Any]) -> Knobs:
    """All of them, as a checkpoint has them."""
    return Knobs(
        machine=machine_knobs_of(saved),
        plan=plan_knobs_of(saved),
        predicted_peak_bytes=int(saved["predicted_peak_bytes"]),
        breakdown=saved["breakdown"],
        num_steps=int(saved["num_steps"]),
        save_every=int(saved["save_every"]),
        eval_every=int(saved["eval_every"]),
    )


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The config with some values, given by dotted key, in place of its own."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return config.model_copy(
        update={section: getattr(config, section).model_copy(update=changes) for section, changes in sections.items()}
    )


def _or_decided(asked: int | str, decided: int) -> int:
    return asked if isinstance(asked, int) else decided

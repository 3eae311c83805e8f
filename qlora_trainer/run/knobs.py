"""What a run decides for itself, once: every `auto` of the config becomes a number before the first step.

The numbers are stored in the run folder's `plan.json` and in each checkpoint, and a resumed run takes them from there:
measured again (which dtype multiplies faster, say) they might differ, and the run would no longer be the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.hardware.device import ComputeDtype, choose_compute_dtype, num_cpu_threads

# The loss makes about three fp32 tensors of this size; larger chunks gain nothing once the product fills the machine.
LOSS_CHUNK_BYTES = 128 * 2**20
MIN_LOSS_CHUNK_TOKENS, MAX_LOSS_CHUNK_TOKENS = 16, 2048
DEFAULT_MICRO_BATCH_TOKENS = 2048
CHECKPOINTS_PER_RUN = 10
EVALUATIONS_PER_RUN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineKnobs:
    """What depends on the machine.

    Attributes:
        compute_dtype: name of the dtype of activations and products.
        num_threads: CPU threads; their number changes the order of sums.
        optimizer: one of the config's optimizers but "auto".
    """

    compute_dtype: ComputeDtype
    num_threads: int
    optimizer: Literal["adamw_32bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"]

    @property
    def optimizer_bits(self) -> Literal[8, 32]:
        return 8 if self.optimizer.endswith("8bit") else 32

    @property
    def optimizer_residency(self) -> Literal["device", "paged"]:
        return "paged" if self.optimizer.startswith("paged") else "device"


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """All that a run decides, as in `plan.json`.

    Attributes:
        machine: what was decided for the machine.
        seq_len: tokens of the longest document that is kept.
        micro_batch_tokens: tokens that go through the model at once, at most.
        loss_chunk_tokens: positions whose logits exist at the same time.
        recompute_layers: layers that keep only their input for backward.
        num_steps: optimizer steps of the whole run.
        save_every, eval_every: optimizer steps between checkpoints and evaluations.
    """

    machine: MachineKnobs
    seq_len: int
    micro_batch_tokens: int
    loss_chunk_tokens: int
    recompute_layers: int
    num_steps: int
    save_every: int
    eval_every: int

    def as_json(self) -> dict[str, Any]:
        """One flat mapping of plain values, for `plan.json` and `state.json`."""
        values = asdict(self)
        machine: dict[str, Any] = values.pop("machine")
        return machine | values


def decide_machine_knobs(config: RunConfig, device: torch.device) -> MachineKnobs:
    """Take what the config pins, decide the rest for `device`."""
    dtype, optimizer = config.quantization.compute_dtype, config.training.optimizer
    return MachineKnobs(
        compute_dtype=choose_compute_dtype(device) if dtype == "auto" else dtype,
        num_threads=num_cpu_threads(),
        # Managed memory costs nothing while it fits; mapped files on a CPU are an option, not the default.
        optimizer=("paged_adamw_32bit" if device.type == "cuda" else "adamw_32bit")
        if optimizer == "auto"
        else optimizer,
    )


def decide_knobs(
    config: RunConfig, machine: MachineKnobs, *, seq_len: int, num_steps: int, num_layers: int, vocabulary_size: int
) -> Knobs:
    """Decide what depends on the data and the model.

    Args:
        config: what the user asked for; what it pins stays.
        machine: decided before.
        seq_len: of the data.
        num_steps: of the whole run.
        num_layers: that can be recomputed.
        vocabulary_size: rows of the output projection.
    """
    memory, training = config.memory, config.training
    return Knobs(
        machine=machine,
        seq_len=seq_len,
        micro_batch_tokens=_or_decided(memory.micro_batch_tokens, max(DEFAULT_MICRO_BATCH_TOKENS, seq_len)),
        loss_chunk_tokens=_or_decided(memory.loss_chunk_tokens, _loss_chunk_tokens(vocabulary_size)),
        recompute_layers=0 if memory.activation_checkpointing is False else num_layers,
        num_steps=num_steps,
        save_every=_or_decided(training.save_every, math.ceil(num_steps / CHECKPOINTS_PER_RUN)),
        eval_every=_or_decided(training.eval_every, math.ceil(num_steps / EVALUATIONS_PER_RUN)),
    )


def machine_knobs_from_plan(plan: Mapping[str, Any]) -> MachineKnobs:
    """What the run decided when it began, from the plan in a checkpoint."""
    return MachineKnobs(**{field.name: plan[field.name] for field in fields(MachineKnobs)})


def _loss_chunk_tokens(vocabulary_size: int) -> int:
    tokens = LOSS_CHUNK_BYTES // (4 * vocabulary_size)
    return min(MAX_LOSS_CHUNK_TOKENS, max(MIN_LOSS_CHUNK_TOKENS, 1 << (max(1, tokens).bit_length() - 1)))


def _or_decided(asked: int | str, decided: int) -> int:
    return asked if isinstance(asked, int) else decided

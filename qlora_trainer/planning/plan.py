"""The plan as a value: what was decided, what it will take, and what else would have fitted. No torch.

`as_json` is the form of `qlora-trainer plan --json` and of the run folder's `plan.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qlora_trainer.config.levers import BaseResidency, Levers, TableResidency

DEVICE_KEY, HOST_KEY = "memory.budget", "memory.host_budget"
Optimizer = Literal["adamw_32bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"]


def optimizer_bits(optimizer: str) -> Literal[8, 32]:
    """Width of the moments of an optimizer that the config names."""
    return 8 if optimizer.endswith("8bit") else 32


def is_paged(optimizer: str) -> bool:
    """Whether its state may leave the device."""
    return optimizer.startswith("paged")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanKnobs:
    """Everything that memory depends on and a plan decides.

    Attributes:
        rank, alpha: of the adapters.
        seq_len: tokens of the longest document.
        micro_batch_tokens: tokens that go through the model at once, at most.
        micro_batches_per_step: see the function of that name.
        activation_keep_layers: layers whose activations are kept for backward: the last ones.
        activation_recompute_layers: layers that keep only their input: those before.
        activation_offload_layers: layers that do not even keep that: it waits in host memory; before the recomputed.
        loss_chunk: positions whose logits exist at the same time.
        optimizer: width and residency of the AdamW state, as the config names it.
        tile_tokens, embedding_residency, nf4_head, optimizer_on_host, base_residency: see `config.levers.Levers`.
    """

    rank: int
    alpha: float
    seq_len: int
    micro_batch_tokens: int
    micro_batches_per_step: int
    activation_keep_layers: int
    activation_recompute_layers: int
    loss_chunk: int
    optimizer: Optimizer
    activation_offload_layers: int = 0
    tile_tokens: int = 0
    embedding_residency: TableResidency = "device"
    nf4_head: bool = False
    optimizer_on_host: bool = False
    base_residency: BaseResidency = "device"

    @property
    def num_recomputed(self) -> int:
        """Layers that are computed again in backward, wherever their input waits: the first ones."""
        return self.activation_recompute_layers + self.activation_offload_layers

    @property
    def optimizer_bits(self) -> Literal[8, 32]:
        return optimizer_bits(self.optimizer)

    @property
    def optimizer_residency(self) -> Literal["device", "paged", "host"]:
        if self.optimizer_on_host:
            return "host"
        return "paged" if is_paged(self.optimizer) else "device"

    @property
    def levers(self) -> Levers:
        """What is pulled beyond the activations, the loss and the optimizer's width."""
        return Levers(
            tile_tokens=self.tile_tokens,
            embedding_residency=self.embedding_residency,
            nf4_head=self.nf4_head,
            optimizer_on_host=self.optimizer_on_host,
            base_residency=self.base_residency,
        )

    @property
    def micro_batch_size(self) -> float:
        """Documents of `seq_len` tokens that go through the model at once."""
        return self.micro_batch_tokens / self.seq_len

    def as_json(self) -> dict[str, Any]:
        size = self.micro_batch_size
        named = {name: value for name, value in asdict(self).items() if name != "optimizer_on_host"}
        return named | {
            "micro_batch_size": int(size) if size == int(size) else size,
            "optimizer_residency": self.optimizer_residency,
        }


def micro_batches_per_step(global_batch_size: int, seq_len: int, micro_batch_tokens: int) -> int:
    """Of a global batch whose documents are all `seq_len` long, none of which is cut between two."""
    documents = max(1, micro_batch_tokens // seq_len)
    return -(-global_batch_size // documents)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a set of knobs takes.

    Attributes:
        allocated_peak_bytes: most bytes of live tensors on the device at once, as its allocator counts them.
        process_peak_bytes: what the driver (CUDA) or the kernel (CPU: resident set) will show for the process;
            what is compared with the budget.
        worst_peak_bytes: the same with all the margins added up; of a GPU, where the step was traced whole, with what
            its allocator then reserves at most.
        host_peak_bytes: resident host memory of the process; on a CPU the same as `process_peak_bytes`.
        peak_phase: the phase of `phases` in which the allocated peak occurs.
        breakdown: category -> bytes at that moment; sums to `allocated_peak_bytes`.
        resident: category -> bytes that stay for the whole run.
        phases: phase -> its own allocated peak; the largest equals `allocated_peak_bytes`.
        tokens_per_second: estimate of the training speed.
        reserved_peak_bytes: what a GPU's allocator takes from the driver for the allocated peak, with expandable
            segments, steps of different sizes coming one after the other; None where it was not replayed.
        fragmentation: the share of that which is in pieces that nothing fits.
    """

    allocated_peak_bytes: int
    process_peak_bytes: int
    worst_peak_bytes: int
    host_peak_bytes: int
    peak_phase: str
    breakdown: Mapping[str, int]
    resident: Mapping[str, int]
    phases: Mapping[str, int]
    tokens_per_second: float
    reserved_peak_bytes: int | None = None
    fragmentation: float | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """Other knobs that fit, and what they take."""

    knobs: PlanKnobs
    predicted: Prediction

    def as_json(self) -> dict[str, Any]:
        return {"knobs": self.knobs.as_json(), "predicted": self.predicted.as_json()}


@dataclass(frozen=True, slots=True, kw_only=True)
class WouldFit:
    """One change that makes a plan fit which does not: `knob` from `before` to `after`."""

    knob: str
    before: int | str
    after: int | str
    allocated_peak_bytes: int

    def as_json(self) -> dict[str, Any]:
        return {
            "knob": self.knob,
            "from": self.before,
            "to": self.after,
            "allocated_peak_bytes": self.allocated_peak_bytes,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierCell:
    """The largest micro-batch that fits for one rank and length, and the levers pulled; zeros where none does."""

    rank: int
    seq_len: int
    micro_batch_tokens: int
    tokens_per_second: float
    levers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LeverGain:
    """What some levers buy at the plan's rank and length; prices, which no trace at full depth confirms.

    Attributes:
        levers: pulled beyond what the config settles: none, one, or all that may be.
        least_bytes: what the device shows for the smallest choice: one document at a time, everything recomputed.
        longest_tokens: the longest document that fits the budgets in that way, as far as the model has positions.
        tokens_per_second: of the fastest choice that fits; 0 where none does.
    """

    levers: tuple[str, ...]
    least_bytes: int
    longest_tokens: int
    tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run will do with its memory.

    Attributes:
        fits: whether `knobs` stay within both budgets; if not, they are the smallest that were allowed.
        model: what the user called the base.
        device: "cpu", or the GPU's name.
        budget_bytes, host_budget_bytes: of the device and of the host; on a CPU the same memory. The host of a GPU that
            is not in this machine is unknown: `budget.NO_LIMIT_BYTES`, 2^62, unless memory.host_budget says.
        device_key: who limits `budget_bytes`: a key of the config, or an option in its place; no part of the JSON.
        knobs: what was decided.
        predicted: what that takes.
        trainable_parameters: elements of all adapters.
        gave_up: what was given up to fit, in words, the least first.
        alternatives: other choices that fit, best first.
        frontier: rank x seq_len.
        lever_gains: without levers, with each alone, with all; empty where none may be pulled, or nobody asked.
        missing_bytes: by how much the smallest choice is too large; 0 if it fits.
        would_fit: single changes that would make it fit.
    """

    fits: bool
    model: str
    device: str
    budget_bytes: int
    host_budget_bytes: int
    knobs: PlanKnobs
    predicted: Prediction
    trainable_parameters: int
    device_key: str = DEVICE_KEY
    gave_up: tuple[str, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    frontier: tuple[FrontierCell, ...] = ()
    lever_gains: tuple[LeverGain, ...] = ()
    missing_bytes: int = 0
    would_fit: tuple[WouldFit, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """JSON values only; `missing_bytes` and `would_fit` are there where it does not fit."""
        values: dict[str, Any] = {
            "fits": self.fits,
            "model": self.model,
            "device": self.device,
            "budget_bytes": self.budget_bytes,
            "host_budget_bytes": self.host_budget_bytes,
            "knobs": self.knobs.as_json(),
            "predicted": self.predicted.as_json(),
            "trainable_parameters": self.trainable_parameters,
            "gave_up": list(self.gave_up),
            "alternatives": [alternative.as_json() for alternative in self.alternatives],
            "frontier": [asdict(cell) | {"levers": list(cell.levers)} for cell in self.frontier],
            "lever_gains": [asdict(gain) | {"levers": list(gain.levers)} for gain in self.lever_gains],
        }
        if not self.fits:
            values["missing_bytes"] = self.missing_bytes
            values["would_fit"] = [change.as_json() for change in self.would_fit]
        return values

"""The plan of a run: made for this machine and this data, kept at a resume, revised when memory ran out."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import DoesNotFitError
from qlora_trainer.hardware.heap import release_free_memory
from qlora_trainer.hardware.memory import OutOfMemoryError, memory_errors_as_ours, resident_bytes
from qlora_trainer.planning.budget import Budget, machine_budget
from qlora_trainer.planning.document_lengths import DocumentLengths
from qlora_trainer.planning.make_plan import make_plan
from qlora_trainer.planning.plan import HOST_KEY, Plan, PlanKnobs, micro_batches_per_step
from qlora_trainer.run.inputs import Inputs
from qlora_trainer.run.knobs import Knobs, MachineKnobs


def documents_of(inputs: Inputs, global_batch_size: int) -> DocumentLengths:
    """What a plan needs to know of the data."""
    lengths = inputs.data.train.documents.lengths
    return DocumentLengths.of(
        lengths.lengths_L, lengths.counts_L, seq_len=inputs.data.seq_len, global_batch_size=global_batch_size
    )


def asked_bytes(size: int | str) -> int | None:
    """What a key of the config asks for; None for `auto`."""
    return size if isinstance(size, int) else None


def budget_of(config: RunConfig, machine: MachineKnobs) -> Budget:
    """What is asked for, or free, on this machine.

    Raises:
        ConfigError: more is asked for than there is.
        DoesNotFitError: nothing is free.
    """
    return machine_budget(
        asked_bytes(config.memory.budget), asked_bytes(config.memory.host_budget), machine.compute_dtype
    )


def plan_run(config: RunConfig, inputs: Inputs, machine: MachineKnobs) -> Plan:
    """Plan for what is free here, for the documents that are trained on.

    Args:
        config: what was asked for.
        inputs: the base, of which no weights are needed, and the data.
        machine: its compute dtype is kept.
    """
    return make_plan(
        config,
        budget_of(config, machine),
        model_config=inputs.base.config,
        can_pack=inputs.base.can_pack,
        documents=documents_of(inputs, config.training.global_batch_size),
        interpreter_bytes=process_bytes,
    )


def require_fit(plan: Plan, config: RunConfig) -> Plan:
    """The plan itself, if it fits.

    Args:
        plan: as it was made.
        config: what it was made for.

    Raises:
        DoesNotFitError: names what is missing, what `config` has pinned, and the single changes that would make it fit.
    """
    if plan.fits:
        return plan
    changes = [f"{change.knob} {change.before} -> {change.after}" for change in plan.would_fit]
    where, place, budget_bytes = plan.device_key, plan.device, plan.budget_bytes
    needed_bytes = plan.predicted.process_peak_bytes
    if needed_bytes <= budget_bytes:  # then it is the host's memory that is short
        where, place, budget_bytes = HOST_KEY, "the host", plan.host_budget_bytes
        needed_bytes = plan.predicted.host_peak_bytes
    raise DoesNotFitError(
        where=where,
        found=f"{_gib(budget_bytes)} on {place}, {_gib(plan.missing_bytes)} too little",
        expected=f"{_gib(needed_bytes)} for the smallest plan{_with_pins(config)}",
        fix=f"Any one of these would fit: {'; '.join(changes)}." if changes else "Choose a smaller base.",
    )


def _with_pins(config: RunConfig) -> str:
    """What was asked for and takes more than a plan must: all recomputed, 8 bits, all on the host are the least."""
    memory = config.memory
    asked: dict[str, object] = {
        "memory.micro_batch_tokens": memory.micro_batch_tokens,
        "memory.activation_checkpointing": memory.activation_checkpointing,
        "memory.loss_chunk_tokens": memory.loss_chunk_tokens,
        "training.optimizer": config.training.optimizer,
        "memory.activation_offload": memory.activation_offload,
        "memory.tile_tokens": memory.tile_tokens,
        "memory.embedding_residency": memory.embedding_residency,
        "memory.optimizer_residency": memory.optimizer_residency,
        "memory.base_residency": memory.base_residency,
    }
    least = ("auto", "adamw_8bit", "paged_adamw_8bit", "host", "streamed")
    pins = [f"{key} = {str(value).lower()}" for key, value in asked.items() if value is not True and value not in least]
    return f" with the pinned {' and '.join(pins)}" if pins else ""


def halved(knobs: PlanKnobs, global_batch_size: int) -> PlanKnobs | None:
    """The same with half of the micro-batch, for a device that ran out of memory; None at one document of full length.

    What is learned stays the same: the documents of a step and their random draws do not depend on the cut.
    """
    tokens = max(knobs.seq_len, knobs.micro_batch_tokens // 2)
    if tokens >= knobs.micro_batch_tokens:
        return None
    return replace(
        knobs,
        micro_batch_tokens=tokens,
        loss_chunk=min(knobs.loss_chunk, tokens),
        micro_batches_per_step=micro_batches_per_step(global_batch_size, knobs.seq_len, tokens),
    )


def halved_or_refused(knobs: Knobs, global_batch_size: int, *, where: str) -> Knobs:
    """Knobs with half of the micro-batch.

    Raises:
        DoesNotFitError: a micro-batch is one document already; names what the plan had said, by category.
    """
    revised = halved(knobs.plan, global_batch_size)
    if revised is None:
        raise DoesNotFitError(
            where=where,
            found=f"no memory left, in micro-batches of {knobs.plan.micro_batch_tokens:,} tokens, one document",
            expected=counted_on(knobs),
            fix="End what else uses the memory, or lower data.seq_len, lora.rank or memory.budget; "
            "--resume auto goes on from the last save.",
        )
    return replace(knobs, plan=revised)


def counted_on(knobs: Knobs) -> str:
    """What the plan counts on at its peak, and what that is made of, the largest first; for one line."""
    process_bytes = knobs.predicted_peak_bytes - sum(knobs.breakdown.values())
    parts = [*knobs.breakdown.items(), ("program and libraries", process_bytes)]
    table = ", ".join(
        f"{name.replace('_', ' ')} {num_bytes / 2**20:,.2f}"
        for name, num_bytes in sorted(parts, key=lambda part: -part[1])
        if num_bytes > 0
    )
    return f"the {_gib(knobs.predicted_peak_bytes)} that the plan counts on to be free (in MiB: {table})"


@contextmanager
def lack_of_memory_told(where: str, knobs: Knobs | None = None) -> Iterator[None]:
    """Turn what a device raises when memory runs out into one line, where nothing smaller can be tried.

    Args:
        where: the phase, for the message.
        knobs: what the plan said, for the message; None before there is a plan.

    Raises:
        DoesNotFitError: memory ran out within.
    """
    try:
        with memory_errors_as_ours():
            yield
    except OutOfMemoryError as error:
        raise DoesNotFitError(
            where=where,
            found="no memory left",
            expected="what a run of this base takes" if knobs is None else counted_on(knobs),
            fix="End what else uses the memory, or lower memory.budget; --resume auto goes on from the last save.",
        ) from error


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def process_bytes() -> int:
    """What this process takes now, before a model is loaded, without what it no longer uses."""
    gc.collect()
    release_free_memory()
    return resident_bytes()

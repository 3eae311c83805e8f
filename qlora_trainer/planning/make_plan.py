"""From a config and a budget to a `Plan`: the model on fake tensors, a few traces, a search, a confirmation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from math import prod
from typing import cast

from transformers import PreTrainedConfig

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.hardware.device_memory import cpu_memory
from qlora_trainer.hardware.kernel_workspace import compiled_bytes
from qlora_trainer.model.positions import require_positions
from qlora_trainer.model.repeated_layers import with_repeated_layers
from qlora_trainer.planning.budget import Budget
from qlora_trainer.planning.document_lengths import DocumentLengths, full_length, require_micro_batch
from qlora_trainer.planning.explain import gave_up, would_fit
from qlora_trainer.planning.frontier import frontier_cells
from qlora_trainer.planning.full_trace import without_collector
from qlora_trainer.planning.lever_gains import lever_gains
from qlora_trainer.planning.model_config import read_model_config
from qlora_trainer.planning.plan import (
    Alternative,
    Optimizer,
    Plan,
    PlanKnobs,
    Prediction,
    micro_batches_per_step,
)
from qlora_trainer.planning.planner import MAX_RANKS, Planner
from qlora_trainer.planning.rungs import fastest_that_fits, tried
from qlora_trainer.planning.search import Candidate, Space, find, smallest

MAX_ALTERNATIVES = 4
MAX_CONFIRMATIONS = 3
# `lora.rank: max` takes the largest rank that costs less than this share of the speed at the smallest.
MAX_RANK_COST = 0.05


def make_plan(
    config: RunConfig,
    budget: Budget,
    *,
    model_config: PreTrainedConfig | None = None,
    can_pack: bool = True,
    documents: DocumentLengths | None = None,
    interpreter_bytes: Callable[[], int] | None = None,
    with_frontier: bool = False,
) -> Plan:
    """Decide everything that `config` leaves to `auto`, within `budget`.

    Args:
        config: what was asked for; what it pins stays.
        budget: the device and its memory.
        model_config: the architecture of `config.model.base`, with layers repeated as asked, if it has been accepted;
            None reads it and sees to that (see `read_model_config`).
        can_pack: whether documents of that base may share a row; read with it where `model_config` is None.
        documents: lengths of the data; None plans for global batches of documents of full length.
        interpreter_bytes: asked once the traces are made: what the process takes without a model. None for what a
            process of this kind usually takes.
        with_frontier: also work out rank x seq_len, and what each lever buys.

    Returns:
        The plan; if nothing fits, the smallest, with `fits` false.

    Raises:
        ConfigError: documents longer than the model's positions or than a pinned micro-batch, or a base that is
            unknown, cannot be trained, or does not have the layers that are to be repeated.
    """
    if model_config is None:
        model_config, can_pack = read_model_config(config.model.base, config.model.revision)
        model_config = with_repeated_layers(model_config, config.lora.layer_replication)
    seq_len = documents.seq_len if documents is not None else full_length(config, model_config)
    require_positions(seq_len, model_config, config.model.base)
    require_micro_batch(seq_len, config)
    size = config.training.global_batch_size
    documents = documents or DocumentLengths.of_full_length(seq_len, global_batch_size=size)
    with without_collector():
        planner = Planner.of(config, budget, model_config, documents, packing=config.data.packing and can_pack)
        if interpreter_bytes is not None and budget.kind == "cpu":
            compiled = compiled_bytes(planner.dry.model.compute_dtype, has_one_length=documents.are_equal)
            memory = cpu_memory(interpreter_bytes(), compiled_bytes=compiled)
            planner = replace(planner, budget=replace(budget, memory=memory))
        plan = choose(planner, choose_rank(planner))
        if with_frontier:
            gains = lever_gains(planner, plan.knobs)
            plan = replace(plan, frontier=frontier_cells(planner, plan.knobs), lever_gains=gains)
    return plan


def choose(planner: Planner, rank: int) -> Plan:
    """The fastest that fits at a rank, which a trace at full depth confirms; the smallest where nothing does."""
    settled = planner.space(rank, planner.documents.seq_len)
    slack = 0
    for _ in range(MAX_CONFIRMATIONS):
        fits = partial(planner.is_within, slack_bytes=slack)
        search = partial(find, price=planner.price, estimate=planner.estimate, fits=fits)
        found, space = fastest_that_fits(settled, planner.levers(), search)
        if not found:
            break
        chosen = planner.confirmed(found[0])
        if planner.is_within(chosen.usage):
            return _fitting_plan(planner, chosen, [chosen, *found[1:]], space)
        slack += chosen.usage.peak_bytes - found[0].usage.peak_bytes
    # Prices that are too low several times in a row say nothing of the smallest plan.
    # Of a tiny model more levers may need more: three weights for a tile, a block of a table.
    spaces = tried(settled, planner.levers())
    smallest_of = [smallest(one, planner.price, planner.estimate) for one in spaces]
    candidate, space = min(zip(smallest_of, spaces, strict=True), key=lambda pair: planner.excess_bytes(pair[0].usage))
    least = planner.confirmed(candidate)
    if planner.is_within(least.usage):
        return _fitting_plan(planner, least, [least], space)
    return _does_not_fit(planner, least, space)


def choose_rank(planner: Planner) -> int:
    """What was asked for; `max` is the largest that costs little speed, the smallest if not even that fits."""
    if planner.config.lora.rank != "max":
        return planner.config.lora.rank
    speeds = {}
    for rank in MAX_RANKS:
        found = find(planner.space(rank, planner.documents.seq_len), planner.price, planner.estimate, planner.is_within)
        speeds[rank] = found[0].tokens_per_second if found else 0.0
    least = (1 - MAX_RANK_COST) * speeds[MAX_RANKS[0]]
    return max(rank for rank, speed in speeds.items() if speed >= least > 0 or rank == MAX_RANKS[0])


def _knobs(planner: Planner, candidate: Candidate) -> PlanKnobs:
    layout, pinned = candidate.layout, planner.config.memory.micro_batch_tokens
    tokens = layout.tokens if pinned == "auto" else pinned
    optimizer = candidate.optimizer
    if layout.levers.optimizer_on_host:  # what is not on the device need not be paged out of it
        optimizer = optimizer.removeprefix("paged_")
    return PlanKnobs(
        rank=layout.rank,
        alpha=planner.config.lora.alpha_for(layout.rank),
        seq_len=layout.seq_len,
        micro_batch_tokens=tokens,
        micro_batches_per_step=micro_batches_per_step(
            planner.config.training.global_batch_size, layout.seq_len, tokens
        ),
        activation_keep_layers=planner.dry.num_layers - layout.num_recomputed,
        activation_recompute_layers=layout.num_recomputed - layout.num_offloaded,
        activation_offload_layers=layout.num_offloaded,
        loss_chunk=layout.loss_chunk,
        optimizer=cast(Optimizer, optimizer),
        **asdict(layout.levers),
    )


def _prediction(planner: Planner, candidate: Candidate) -> Prediction:
    used, memory = candidate.usage, planner.budget.memory
    process, reserved = planner.needed_bytes(used), used.reserved
    worst = memory.worst_bytes(used.peak_bytes, used.paged_bytes)
    if reserved is not None:
        worst = max(process, memory.fixed_bytes + used.paged_bytes + round(used.peak_bytes * reserved.worst_ratio))
    return Prediction(
        allocated_peak_bytes=used.peak_bytes,
        process_peak_bytes=process,
        worst_peak_bytes=worst,
        host_peak_bytes=planner.needed_host_bytes(used),
        peak_phase=used.peak_phase,
        breakdown=used.breakdown,
        resident=used.resident,
        phases=used.phases,
        tokens_per_second=candidate.tokens_per_second,
        reserved_peak_bytes=None if reserved is None else round(used.peak_bytes * reserved.ratio),
        fragmentation=None if reserved is None else reserved.fragmentation,
    )


def _fitting_plan(planner: Planner, chosen: Candidate, found: Sequence[Candidate], space: Space) -> Plan:
    return Plan(
        fits=True,
        model=planner.config.model.base,
        device=planner.budget.device_name,
        budget_bytes=planner.budget.budget_bytes,
        host_budget_bytes=planner.budget.host_budget_bytes,
        device_key=planner.budget.limiting_key,
        knobs=_knobs(planner, chosen),
        predicted=_prediction(planner, chosen),
        trainable_parameters=sum(map(prod, planner.trained(chosen.layout.rank).shapes.values())),
        gave_up=gave_up(chosen, space, planner.space(chosen.layout.rank, chosen.layout.seq_len).levers),
        alternatives=tuple(
            Alternative(knobs=_knobs(planner, one), predicted=_prediction(planner, one))
            for one in _different(found)[1 : MAX_ALTERNATIVES + 1]
        ),
    )


def _does_not_fit(planner: Planner, least: Candidate, space: Space) -> Plan:
    process = planner.needed_bytes(least.usage)
    host = planner.needed_host_bytes(least.usage)
    missing = max(process - planner.budget.budget_bytes, host - planner.budget.host_budget_bytes)
    return replace(
        _fitting_plan(planner, least, [], space),
        fits=False,
        alternatives=(),
        missing_bytes=missing,
        would_fit=would_fit(least, planner, process_bytes=process, host_bytes=host),
    )


def _different(found: Sequence[Candidate]) -> list[Candidate]:
    """One candidate a micro-batch: the same tokens with another loss chunk is no alternative worth showing."""
    seen: dict[int, Candidate] = {}
    for candidate in found:
        seen.setdefault(candidate.layout.tokens, candidate)
    return list(seen.values())

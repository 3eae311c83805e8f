"""From a config and a budget to a `Plan`: the model on fake tensors, a few traces, a search, a confirmation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import ArrayLike
from transformers import PreTrainedConfig

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import ConfigError
from qlora_trainer.hardware.device import DTYPES
from qlora_trainer.hardware.device_memory import cpu_memory
from qlora_trainer.hardware.python_accelerator import python_accelerator
from qlora_trainer.model.adapters import LoraSettings, select_targets
from qlora_trainer.model.positions import max_positions
from qlora_trainer.planning.budget import Budget
from qlora_trainer.planning.dry_model import DryModel, build_dry_model
from qlora_trainer.planning.explain import Bound, gave_up, would_fit
from qlora_trainer.planning.frontier import frontier_cells
from qlora_trainer.planning.full_trace import StateTrace, trace_state, trace_training, without_collector
from qlora_trainer.planning.model_config import read_model_config
from qlora_trainer.planning.plan import (
    Alternative,
    FrontierCell,
    Optimizer,
    Plan,
    PlanKnobs,
    Prediction,
    micro_batches_per_step,
)
from qlora_trainer.planning.price import Layout, Prices, Usage, evaluation_level, training_levels, usage
from qlora_trainer.planning.search import Candidate, Space, chunk_steps, find, smallest, token_steps
from qlora_trainer.planning.shallow_trace import trace_step
from qlora_trainer.planning.throughput import Demand, tokens_per_second
from qlora_trainer.planning.timeline import Level
from qlora_trainer.step.optimizer import num_flat_elements

DEFAULT_SEQ_LEN = 2048
MAX_ALTERNATIVES = 4
MAX_CONFIRMATIONS = 3
PRICE_MARGIN = 0.02  # by which a trace at full depth may exceed a price
# `lora.rank: max` takes the largest of these that costs less than this share of the speed at the smallest.
MAX_RANKS, MAX_RANK_COST = (8, 16, 32, 64, 128, 256), 0.05


@dataclass(frozen=True, slots=True)
class Documents:
    """What is known of the data: a length as a value, since `planning` knows no data.

    Attributes:
        seq_len: tokens of the longest document that is kept.
        mean_tokens, shortest_tokens: of a document.
        largest_batch_tokens: of the longest documents that can meet in one global batch.
    """

    seq_len: int
    mean_tokens: float
    shortest_tokens: int
    largest_batch_tokens: int

    @classmethod
    def of_full_length(cls, seq_len: int, *, global_batch_size: int) -> Documents:
        """Of documents that are not there yet."""
        return cls(seq_len, float(seq_len), seq_len, seq_len * global_batch_size)

    @classmethod
    def of(cls, lengths: ArrayLike, *, seq_len: int, global_batch_size: int) -> Documents:
        """Of the documents that are trained on."""
        lengths_N = np.asarray(lengths, dtype=np.int64)
        largest_batch_tokens = int(np.sort(lengths_N)[-global_batch_size:].sum())
        num_repeated = max(global_batch_size - lengths_N.size, 0)  # an epoch may end within a batch
        return cls(
            seq_len,
            float(lengths_N.mean()),
            int(lengths_N.min()),
            largest_batch_tokens + num_repeated * int(lengths_N.max()),
        )


def make_plan(
    config: RunConfig,
    budget: Budget,
    *,
    model_config: PreTrainedConfig | None = None,
    documents: Documents | None = None,
    interpreter_bytes: Callable[[], int] | None = None,
    with_frontier: bool = False,
) -> Plan:
    """Decide everything that `config` leaves to `auto`, within `budget`.

    Args:
        config: what was asked for; what it pins stays.
        budget: the device and its memory.
        model_config: the architecture of `config.model.base`, if it has been accepted and `data.packing` is what it
            allows; None reads it and sees to both (see `read_model_config`).
        documents: lengths of the data; None plans for global batches of documents of full length.
        interpreter_bytes: asked once the traces are made: what the process takes without a model. None for what a
            process of this kind usually takes.
        with_frontier: also work out rank x seq_len.

    Returns:
        The plan; if nothing fits, the smallest, with `fits` false.

    Raises:
        ConfigError: documents longer than the model's positions or than a pinned micro-batch, or a base that is unknown
            or cannot be trained.
    """
    if model_config is None:
        model_config, can_pack = read_model_config(config.model.base, config.model.revision)
        packing = config.data.packing and can_pack
        config = config.model_copy(update={"data": config.data.model_copy(update={"packing": packing})})
    seq_len = documents.seq_len if documents is not None else _full_length(config, model_config)
    _require_positions(seq_len, model_config, config.model.base)
    _require_micro_batch(seq_len, config)
    size = config.training.global_batch_size
    documents = documents or Documents.of_full_length(seq_len, global_batch_size=size)
    with without_collector():
        planner = _Planner.of(config, budget, model_config, documents)
        if interpreter_bytes is not None and budget.kind == "cpu":
            planner.budget = replace(budget, memory=cpu_memory(interpreter_bytes()))
        plan = planner.plan(planner.rank())
        if with_frontier:
            plan = replace(plan, frontier=planner.frontier(plan))
    return plan


@dataclass(slots=True)
class _Planner:
    """One model on one device, traced; asked for many layouts."""

    config: RunConfig
    budget: Budget
    documents: Documents
    dry: DryModel
    settings: LoraSettings
    prices: Prices
    base: Mapping[str, int]
    state_of: Callable[[int, Literal[8, 32]], StateTrace]

    @classmethod
    def of(cls, config: RunConfig, budget: Budget, model_config: PreTrainedConfig, documents: Documents) -> _Planner:
        device = (python_accelerator() if budget.kind == "cuda" else None) or torch.device("cpu")
        alignment = budget.memory.alignment_bytes
        pinned = config.quantization.compute_dtype
        dry = build_dry_model(
            model_config,
            double_quant=config.quantization.double_quant,
            compute_dtype=DTYPES[budget.compute_dtype if pinned == "auto" else pinned],
            device=device,
            alignment_bytes=alignment,
        )
        rank = MAX_RANKS[0] if config.lora.rank == "max" else config.lora.rank
        settings = LoraSettings(
            rank=rank,
            alpha=config.lora.alpha_for(rank),
            dropout=config.lora.dropout,
            targets=select_targets(list(dry.model.linears), config.lora.target_modules),
        )
        parts = trace_step(dry, settings, adapter_dtype=DTYPES[config.lora.dtype])

        def state_of(num_elements: int, bits: Literal[8, 32]) -> StateTrace:
            return trace_state(
                num_elements,
                bits=bits,
                adapter_dtype=DTYPES[config.lora.dtype],
                device=device,
                alignment_bytes=alignment,
            )

        base = {name: sum(_rounded(size, alignment) for size in sizes) for name, sizes in dry.resident.items()}
        prices = Prices(parts, budget.memory)
        return cls(config, budget, documents, dry, settings, prices, base, lru_cache(maxsize=64)(state_of))

    def plan(self, rank: int) -> Plan:
        space = self.space(rank, self.documents.seq_len)
        slack = 0
        for _ in range(MAX_CONFIRMATIONS):
            found = find(space, self.price, self.estimate, partial(self.is_within, slack_bytes=slack))
            if not found:
                break
            chosen = self.confirmed(found[0])
            if self.is_within(chosen.usage):
                return self._plan(chosen, [chosen, *found[1:]], space)
            slack += chosen.usage.peak_bytes - found[0].usage.peak_bytes
        # Prices that are too low several times in a row say nothing of the smallest plan.
        least = self.confirmed(smallest(space, self.price, self.estimate))
        return self._plan(least, [least], space) if self.is_within(least.usage) else self._does_not_fit(least, space)

    def rank(self) -> int:
        """What was asked for; `max` is the largest that costs little speed, the smallest if not even that fits."""
        if self.config.lora.rank != "max":
            return self.config.lora.rank
        speeds = {}
        for rank in MAX_RANKS:
            found = find(self.space(rank, self.documents.seq_len), self.price, self.estimate, self.is_within)
            speeds[rank] = found[0].tokens_per_second if found else 0.0
        least = (1 - MAX_RANK_COST) * speeds[MAX_RANKS[0]]
        return max(rank for rank, speed in speeds.items() if speed >= least > 0 or rank == MAX_RANKS[0])

    def space(self, rank: int, seq_len: int) -> Space:
        """What may vary: everything that the config leaves open."""
        memory, documents = self.config.memory, self.documents
        num_layers = self.dry.num_layers
        tokens: tuple[int, ...]
        if memory.micro_batch_tokens == "auto":
            most = max(seq_len, documents.largest_batch_tokens * seq_len // documents.seq_len)
            tokens = token_steps(seq_len, most, multiples_of=seq_len)
        else:
            tokens = token_steps(memory.micro_batch_tokens, memory.micro_batch_tokens)
        chunk = memory.loss_chunk_tokens
        policy = memory.activation_checkpointing
        asked = self.config.training.optimizer
        # Only where the state lives is decided here: 8 bits would learn something else, and are never chosen unasked.
        decided = "paged_adamw_32bit" if self.budget.kind == "cuda" else "adamw_32bit"
        return Space(
            rank=rank,
            seq_len=seq_len,
            rows_of=(lambda _: 1) if self.config.data.packing else (lambda number: max(1, number // seq_len)),
            tokens=tokens,
            loss_chunks=chunk_steps(tokens[-1]) if chunk == "auto" else (chunk,),
            recompute=(0, num_layers) if policy == "auto" else (_pinned(policy, num_layers),) * 2,
            optimizer=decided if asked == "auto" else asked,
        )

    def price(self, layout: Layout, optimizer: str) -> Usage:
        levels = {str(level.label): level for level in training_levels(self.prices, layout)}
        return self._usage(layout, optimizer, levels)

    def confirmed(self, candidate: Candidate) -> Candidate:
        """The same knobs, traced at full depth."""
        layout = candidate.layout
        rest = layout.tokens % layout.seq_len
        traced = trace_training(
            self.dry,
            replace(self.settings, rank=layout.rank),
            adapter_dtype=DTYPES[self.config.lora.dtype],
            num_tokens=layout.tokens,
            document_lengths=(layout.seq_len, rest) if rest else (layout.seq_len,),
            rows=layout.rows,
            num_recomputed=layout.num_recomputed,
            loss_chunk_tokens=layout.loss_chunk,
            alignment_bytes=self.budget.memory.alignment_bytes,
        )
        levels: dict[str, Level] = {}
        for level in traced:
            phase = str(level.label[0]) if isinstance(level.label, tuple) else str(level.label)
            phase = "forward" if phase == "embed" else phase
            if phase not in levels or level.peak_bytes > levels[phase].peak_bytes:
                levels[phase] = level
        return replace(candidate, usage=self._usage(layout, candidate.optimizer, levels))

    def _usage(self, layout: Layout, optimizer: str, levels: Mapping[str, Level]) -> Usage:
        shapes = self.shapes(layout.rank)
        state = self.state_of(num_flat_elements(shapes), _bits(optimizer))
        alignment = self.budget.memory.alignment_bytes
        item_bytes = 4 if self.config.lora.dtype == "float32" else 2
        resident = dict(self.base)
        adapters = sum(_rounded(rows * columns * item_bytes, alignment) for rows, columns in shapes)
        # An fp32 adapter is its own master: its weights lie in the optimizer's buffer.
        resident["adapter"] = 0 if self.config.lora.dtype == "float32" else adapters
        resident["gradient"] = sum(_rounded(size, alignment) for size in state.gradient)
        resident["optimizer"] = sum(_rounded(size, alignment) for size in state.optimizer)
        if self.is_paged(optimizer):
            resident["optimizer"] -= state.pageable_bytes
        resident["other"] = resident.get("other", 0) + self.budget.memory.workspace_bytes
        evaluation = {"eval": evaluation_level(self.prices, layout)}
        used = usage(resident, self.dry.load_peak_bytes, {**levels, **evaluation}, state)
        return replace(used, paged_bytes=state.pageable_bytes if self.is_paged(optimizer) else 0)

    def estimate(self, layout: Layout) -> float:
        stretch = layout.seq_len / self.documents.seq_len
        demand = Demand(
            self.config.training.global_batch_size,
            self.documents.mean_tokens * stretch,
            self.documents.shortest_tokens * stretch,
        )
        return tokens_per_second(self.prices, layout, demand, self.budget.speed)

    def is_paged(self, optimizer: str) -> bool:
        return optimizer.startswith("paged")

    def is_within(self, used: Usage, slack_bytes: int = 0) -> bool:
        process = self.budget.memory.process_bytes(used.peak_bytes + slack_bytes, used.paged_bytes)
        host = self.budget.memory.host_peak_bytes(process)
        return process <= self.budget.budget_bytes and host <= self.budget.host_budget_bytes

    def needed_bytes(self, candidate: Candidate) -> int:
        """What the device is expected to show."""
        used = candidate.usage
        return self.budget.memory.process_bytes(used.peak_bytes, used.paged_bytes)

    def _is_well_within(self, used: Usage) -> bool:
        return self.is_within(used, slack_bytes=round(used.peak_bytes * PRICE_MARGIN))

    def shapes(self, rank: int) -> list[tuple[int, int]]:
        found = []
        for name in self.settings.targets:
            linear = self.dry.model.linears[name]
            found += [(rank, linear.in_features), (linear.out_features, rank)]
        return found

    def knobs(self, candidate: Candidate) -> PlanKnobs:
        layout, pinned = candidate.layout, self.config.memory.micro_batch_tokens
        tokens = layout.tokens if pinned == "auto" else pinned
        return PlanKnobs(
            rank=layout.rank,
            alpha=self.config.lora.alpha_for(layout.rank),
            seq_len=layout.seq_len,
            micro_batch_tokens=tokens,
            micro_batches_per_step=micro_batches_per_step(
                self.config.training.global_batch_size, layout.seq_len, tokens
            ),
            activation_keep_layers=self.dry.num_layers - layout.num_recomputed,
            activation_recompute_layers=layout.num_recomputed,
            loss_chunk=layout.loss_chunk,
            optimizer=cast(Optimizer, candidate.optimizer),
        )

    def prediction(self, candidate: Candidate) -> Prediction:
        used, memory = candidate.usage, self.budget.memory
        process = self.needed_bytes(candidate)
        return Prediction(
            allocated_peak_bytes=used.peak_bytes,
            process_peak_bytes=process,
            worst_peak_bytes=memory.worst_bytes(used.peak_bytes, used.paged_bytes),
            host_peak_bytes=memory.host_peak_bytes(process),
            peak_phase=used.peak_phase,
            breakdown=used.breakdown,
            resident=used.resident,
            phases=used.phases,
            tokens_per_second=candidate.tokens_per_second,
        )

    def _plan(self, chosen: Candidate, found: Sequence[Candidate], space: Space) -> Plan:
        return Plan(
            fits=True,
            model=self.config.model.base,
            device=self.budget.device_name,
            budget_bytes=self.budget.budget_bytes,
            host_budget_bytes=self.budget.host_budget_bytes,
            device_key=self.budget.limiting_key,
            knobs=self.knobs(chosen),
            predicted=self.prediction(chosen),
            trainable_parameters=sum(rows * columns for rows, columns in self.shapes(chosen.layout.rank)),
            gave_up=gave_up(chosen, space),
            alternatives=tuple(
                Alternative(knobs=self.knobs(one), predicted=self.prediction(one))
                for one in _different(found)[1 : MAX_ALTERNATIVES + 1]
            ),
        )

    def _does_not_fit(self, least: Candidate, space: Space) -> Plan:
        process = self.needed_bytes(least)
        host = self.budget.memory.host_peak_bytes(process)
        missing = max(process - self.budget.budget_bytes, host - self.budget.host_budget_bytes)
        # Prices are not confirmed here, so what is promised has room for what a confirmation may add.
        bound = Bound(self.space, self.price, self._is_well_within, self.config, self.dry.num_layers)
        return replace(
            self._plan(least, [], space),
            fits=False,
            alternatives=(),
            missing_bytes=missing,
            would_fit=would_fit(least, bound, self.budget, process_bytes=process, host_bytes=host),
        )

    def frontier(self, plan: Plan) -> tuple[FrontierCell, ...]:
        positions = max_positions(self.dry.model.module.config)
        return frontier_cells(
            self.space, self.price, self.estimate, self.is_within, plan.knobs, max_positions=positions
        )


def _different(found: Sequence[Candidate]) -> list[Candidate]:
    """One candidate a micro-batch: the same tokens with another loss chunk is no alternative worth showing."""
    seen: dict[int, Candidate] = {}
    for candidate in found:
        seen.setdefault(candidate.layout.tokens, candidate)
    return list(seen.values())


def _full_length(config: RunConfig, model_config: PreTrainedConfig) -> int:
    """Tokens of a document that is not there yet: what was asked for, or as many as usual where all limits allow it.

    A limit that the user did not break must not be held against them: `auto` stays below it.
    """
    if config.data.seq_len != "auto":
        return config.data.seq_len
    pinned = config.memory.micro_batch_tokens
    limits = [max_positions(model_config), pinned if pinned != "auto" else None]
    return min([DEFAULT_SEQ_LEN, *(limit for limit in limits if limit is not None)])


def _require_micro_batch(seq_len: int, config: RunConfig) -> None:
    """The config itself compares two pinned values; here `data.seq_len` is what the documents made of `auto`."""
    pinned = config.memory.micro_batch_tokens
    if pinned != "auto" and pinned < seq_len:
        raise ConfigError(
            where="memory.micro_batch_tokens",
            found=f"{pinned} tokens",
            expected=f"at least {seq_len}, the data.seq_len of these documents: none is cut between micro-batches",
            fix=f"Raise memory.micro_batch_tokens to {seq_len}, or lower data.seq_len to {pinned}.",
        )


def _require_positions(seq_len: int, model_config: PreTrainedConfig, name: str) -> None:
    most = max_positions(model_config)
    if most is not None and seq_len > most:
        raise ConfigError(
            where="data.seq_len",
            found=f"{seq_len} tokens",
            expected=f"at most {most}, the positions of {name}",
            fix="Lower data.seq_len, or choose a base with a longer context.",
        )


def _pinned(policy: bool | int, num_layers: int) -> int:
    """How many layers `memory.activation_checkpointing` wants recomputed."""
    if isinstance(policy, bool):
        return num_layers if policy else 0
    return min(policy, num_layers)


def _bits(optimizer: str) -> Literal[8, 32]:
    return 8 if optimizer.endswith("8bit") else 32


def _rounded(num_bytes: int, alignment_bytes: int) -> int:
    return -(-num_bytes // alignment_bytes) * alignment_bytes

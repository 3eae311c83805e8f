"""One model on one device, traced once and asked for many layouts: what may vary, what it takes, how fast it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from math import prod
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig

from qlora_trainer.config.levers import NO_LEVERS, Levers
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.hardware.device import DTYPES, choose_adapter_dtype
from qlora_trainer.hardware.python_accelerator import python_accelerator
from qlora_trainer.model.activation_policy import can_tile
from qlora_trainer.model.lora_settings import LoraSettings, asked_settings
from qlora_trainer.model.table_names import require_frozen_tables, require_nf4_head
from qlora_trainer.model.trained_tables import base_tables_of
from qlora_trainer.model.trained_vectors import biased_modules, require_trainable_biases
from qlora_trainer.planning.budget import Budget
from qlora_trainer.planning.document_lengths import DocumentLengths
from qlora_trainer.planning.dry_model import DryModel, build_dry_model, without_replaced
from qlora_trainer.planning.full_trace import trace_training
from qlora_trainer.planning.placed import Placed, place
from qlora_trainer.planning.plan import is_paged, optimizer_bits
from qlora_trainer.planning.price import (
    Layout,
    Prices,
    Usage,
    evaluation_level,
    hidden_bytes,
    training_levels,
    usage,
)
from qlora_trainer.planning.pulled import pulled
from qlora_trainer.planning.replay import Reserved, Storages, replay, resident_sizes
from qlora_trainer.planning.rungs import Lever
from qlora_trainer.planning.search import MAX_MULTIPLES, Candidate, Space, chunk_steps, token_steps, whole_rows
from qlora_trainer.planning.shallow_trace import trace_step
from qlora_trainer.planning.state_trace import StateForm, StateTrace, trace_state
from qlora_trainer.planning.throughput import Demand, tokens_per_second
from qlora_trainer.planning.timeline import Level
from qlora_trainer.planning.trained import Trained, trained_at

PRICE_MARGIN = 0.02  # by which a trace at full depth may exceed a price
# Of a tile that the planner proposes: large enough that its products are as fast as those of all tokens.
TILE_TOKENS = 1024
TRACED_TILES = 2  # as many as it takes to have one after another
MAX_RANKS = (8, 16, 32, 64, 128, 256)  # that `lora.rank: max` may take


@dataclass(frozen=True, slots=True)
class Planner:
    """One model on one device, traced; asked for many layouts.

    Attributes:
        config: what was asked for.
        budget: the device and its memory; another one of the same device may take its place.
        documents: lengths of the data.
        packing: whether documents share a row.
        dry: the model on fake tensors.
        settings: of its adapters, at one rank of many.
        adapter_dtype: what they are held in.
        prices: of the parts of a step, for a rank and what is pulled.
        trained: what is trained at a rank.
        placed: where the model without adapters lies, for what is pulled.
        state_of: the optimizer's phases, for so many elements in so many bits, on the host or not.
    """

    config: RunConfig
    budget: Budget
    documents: DocumentLengths
    packing: bool
    dry: DryModel
    settings: LoraSettings
    adapter_dtype: torch.dtype
    prices: Callable[[int, Levers], Prices]
    trained: Callable[[int], Trained]
    placed: Callable[[Levers], Placed]
    state_of: Callable[[int, Literal[8, 32], bool], StateTrace]

    @classmethod
    def of(
        cls,
        config: RunConfig,
        budget: Budget,
        model_config: PreTrainedConfig,
        documents: DocumentLengths,
        *,
        packing: bool,
    ) -> Planner:
        """Trace a model; see the attributes."""
        device = (python_accelerator() if budget.kind == "cuda" else None) or torch.device("cpu")
        alignment = budget.memory.alignment_bytes
        pinned = config.quantization.compute_dtype
        compute_dtype = budget.compute_dtype if pinned == "auto" else pinned
        adapter_dtype = DTYPES[choose_adapter_dtype(config.lora.dtype, compute_dtype)]
        dry = build_dry_model(
            model_config,
            double_quant=config.quantization.double_quant,
            compute_dtype=DTYPES[compute_dtype],
            device=device,
            alignment_bytes=alignment,
        )
        rank = MAX_RANKS[0] if config.lora.rank == "max" else config.lora.rank
        tables = base_tables_of(dry.model)
        linears = list(dry.model.linears)
        settings = asked_settings(config.lora, rank, linears, tables, biased=biased_modules(dry.model))
        require_trainable_biases(dry.model.module, settings)
        if config.memory.embedding_residency == "host":
            require_frozen_tables(settings.modules_to_save)
        if config.quantization.head == "nf4":
            require_nf4_head(tables.head, is_tied=tables.is_tied, trained=settings.modules_to_save)
        dry = without_replaced(dry, settings)

        @cache
        def traced(rank: int, levers: Levers) -> Prices:
            own, pulling = replace(settings, rank=rank), partial(pulled, dry, levers)
            return Prices(trace_step(dry, own, adapter_dtype=adapter_dtype, pulling=pulling), budget.memory)

        @cache
        def prices_of(rank: int, levers: Levers = NO_LEVERS) -> Prices:
            # Where some ranks are fixed, sizes are no multiples of the others' any more: each rank is traced for
            # itself. Where the base and the optimizer live changes nothing of what a step makes.
            # One trace is good for tiles of any size.
            tile_tokens = TILE_TOKENS if levers.tile_tokens else 0
            levers = replace(levers, base_residency="device", optimizer_on_host=False, tile_tokens=tile_tokens)
            return traced(rank if settings.rank_pattern else settings.rank, levers)

        def state_of(num_elements: int, bits: Literal[8, 32], is_on_host: bool) -> StateTrace:
            form = StateForm(
                bits=bits,
                adapter_dtype=adapter_dtype,
                device=device,
                alignment_bytes=alignment,
                is_on_host=is_on_host,
            )
            return trace_state(num_elements, form)

        prices_of(rank)  # traced now, so that the process is as large as it will be when it is asked for its size
        return cls(
            config=config,
            budget=budget,
            documents=documents,
            packing=packing,
            dry=dry,
            settings=settings,
            adapter_dtype=adapter_dtype,
            prices=prices_of,
            trained=lru_cache(maxsize=None)(
                partial(trained_at, dry=dry, settings=settings, memory=budget.memory, adapter_dtype=adapter_dtype)
            ),
            placed=lru_cache(maxsize=None)(partial(place, dry, budget.memory)),
            state_of=lru_cache(maxsize=64)(state_of),
        )

    def space(self, rank: int, seq_len: int) -> Space:
        """What may vary: everything that the config leaves open."""
        memory = self.config.memory
        num_layers = self.dry.num_layers
        tokens: tuple[int, ...]
        if memory.micro_batch_tokens == "auto":
            tokens = self._micro_batches(seq_len)
        else:
            tokens = token_steps(memory.micro_batch_tokens, memory.micro_batch_tokens)
        chunk = memory.loss_chunk_tokens
        policy = memory.activation_checkpointing
        asked = self.config.training.optimizer
        # Only where the state lives is decided here: 8 bits would learn something else, and are never chosen unasked.
        is_paged_by_default = self.budget.kind == "cuda" and memory.optimizer_residency == "auto"
        decided = "paged_adamw_32bit" if is_paged_by_default or memory.optimizer_residency == "paged" else "adamw_32bit"
        offload = memory.activation_offload
        return Space(
            rank=rank,
            seq_len=seq_len,
            rows_of=(lambda _: 1) if self.packing else (lambda number: max(1, number // seq_len)),
            tokens=tokens,
            loss_chunks=chunk_steps(tokens[-1]) if chunk == "auto" else (chunk,),
            recompute=(0, num_layers) if policy == "auto" else (_pinned(policy, num_layers),) * 2,
            optimizer=decided if asked == "auto" else asked,
            offload=(0, 0) if offload == "auto" else (_pinned(offload, num_layers),) * 2,
            levers=Levers(
                tile_tokens=0 if memory.tile_tokens == "auto" else memory.tile_tokens,
                embedding_residency="host" if memory.embedding_residency == "host" else "device",
                nf4_head=self.config.quantization.head == "nf4",
                optimizer_on_host=memory.optimizer_residency == "host",
                base_residency="streamed" if memory.base_residency == "streamed" else "device",
            ),
        )

    def _micro_batches(self, seq_len: int) -> tuple[int, ...]:
        """Sizes to try, ascending.

        Of documents of many lengths, the last global batches' worth are those that are just filled: a global batch that
        takes 4 micro-batches of 4,096 leaves a sixth of them empty where 4 of 3,840 do as well.
        """
        demand, largest = self._demand(seq_len), self.documents.largest_batch_tokens
        most = max(seq_len, largest * seq_len // self.documents.seq_len)
        if not self.packing or not self.documents.std_tokens:
            return token_steps(seq_len, most, multiples_of=seq_len)
        levels = {min(demand.level_tokens(number), whole_rows(most)) for number in range(1, MAX_MULTIPLES + 1)}
        levels = {tokens for tokens in levels if tokens >= seq_len} or {whole_rows(seq_len)}
        return tuple(sorted({*token_steps(seq_len, min(levels)), *levels}))

    def levers(self) -> tuple[Lever, ...]:
        """What may be pulled beyond a `space`, in the order of giving up: what the config leaves open, and runs."""
        memory = self.config.memory
        offload = [Lever("offload", self.dry.num_layers)] if memory.activation_offload == "auto" else []
        open_keys = {
            "tile_tokens": memory.tile_tokens,
            # Who names a paged one has said where it lives.
            "optimizer_on_host": "paged" if is_paged(self.config.training.optimizer) else memory.optimizer_residency,
            "embedding_residency": memory.embedding_residency,
            "base_residency": memory.base_residency,
        }
        others = [Lever(name, value) for name, value in self.pullable().items() if open_keys[name] == "auto"]
        return (*offload, *others)

    def pullable(self) -> dict[str, Any]:
        """The fields of `Levers` that this model can be run with on this device, and what they become."""
        tiles = {"tile_tokens": TILE_TOKENS} if can_tile(self.dry.model) else {}
        # On a CPU the host is the device.
        optimizer = {"optimizer_on_host": True} if self.budget.kind == "cuda" else {}
        tables = {} if self.settings.modules_to_save else {"embedding_residency": "host"}  # what is trained stays
        return {**tiles, **optimizer, **tables, "base_residency": "streamed"}

    def price(self, layout: Layout, optimizer: str) -> Usage:
        """What a layout takes, put together from the parts of a step."""
        levels = {str(level.label): level for level in training_levels(self.prices(layout.rank, layout.levers), layout)}
        return self._usage(layout, optimizer, levels)

    def confirmed(self, candidate: Candidate) -> Candidate:
        """The same knobs, traced at full depth."""
        layout, optimizer = candidate.layout, candidate.optimizer
        shorter = _with_few_tiles(layout)
        levels, storages = self._traced(shorter)
        reserved = self._reserved(self._usage(shorter, optimizer, levels), shorter, optimizer, storages)
        if shorter == layout:
            return replace(candidate, usage=replace(self._usage(layout, optimizer, levels), reserved=reserved))
        # Tiles are alike, and a million tokens have a thousand: what a trace adds to the price of two is added to all.
        prices = self.prices(layout.rank, layout.levers)
        priced = {str(level.label): level.peak_bytes for level in training_levels(prices, shorter)}
        scaled = {
            phase: _scaled(level, max(1.0, levels[phase].peak_bytes / max(1, priced[phase])))
            for phase, level in ((str(level.label), level) for level in training_levels(prices, layout))
        }
        return replace(candidate, usage=replace(self._usage(layout, optimizer, scaled), reserved=reserved))

    def _reserved(self, used: Usage, layout: Layout, optimizer: str, storages: Storages) -> Reserved | None:
        """What a GPU's allocator makes of the steps of a run; None on a CPU."""
        if self.budget.kind == "cpu":
            return None
        trained = self.trained(layout.rank)
        bits, is_on_host = optimizer_bits(optimizer), layout.levers.optimizer_on_host
        state = self.state_of(trained.num_elements, bits, is_on_host)
        adapters = [2 * prod(shape) for shape in trained.shapes.values() if len(shape) == 2]
        tensors = {**self.dry.resident, "adapter": adapters, "gradient": state.gradient, "optimizer": state.optimizer}
        memory = self.budget.memory
        limit_bytes = self.budget.budget_bytes - memory.fixed_bytes - used.paged_bytes
        return replay(resident_sizes(used.resident, tensors, memory), storages, limit_bytes=limit_bytes)

    def _traced(self, layout: Layout) -> tuple[dict[str, Level], Storages]:
        """Phase -> its highest level; and all storages.

        Whether layers are streamed changes nothing that a step makes: it is left out.
        """
        rest = layout.tokens % layout.seq_len
        with pulled(self.dry, replace(layout.levers, base_residency="device")):
            traced = trace_training(
                self.dry,
                replace(self.settings, rank=layout.rank),
                adapter_dtype=self.adapter_dtype,
                num_tokens=layout.tokens,
                document_lengths=(layout.seq_len, rest) if rest else (layout.seq_len,),
                rows=layout.rows,
                num_recomputed=layout.num_recomputed,
                num_offloaded=layout.num_offloaded,
                loss_chunk_tokens=layout.loss_chunk,
                alignment_bytes=self.budget.memory.alignment_bytes,
            )
        levels: dict[str, Level] = {}
        for level in traced.levels:
            phase = str(level.label[0]) if isinstance(level.label, tuple) else str(level.label)
            phase = "forward" if phase == "embed" else phase
            if phase not in levels or level.peak_bytes > levels[phase].peak_bytes:
                levels[phase] = level
        return levels, traced.storages

    def _usage(self, layout: Layout, optimizer: str, levels: Mapping[str, Level]) -> Usage:
        trained, is_on_host = self.trained(layout.rank), layout.levers.optimizer_on_host
        state = self.state_of(trained.num_elements, optimizer_bits(optimizer), is_on_host)
        aligned = self.budget.memory.aligned
        placed = self.placed(layout.levers)
        resident = dict(placed.device)
        resident["adapter"] = trained.adapter_bytes_beside_host if is_on_host else trained.adapter_bytes
        resident["gradient"] = sum(map(aligned, state.gradient))
        resident["optimizer"] = sum(map(aligned, state.optimizer))
        paged_bytes = state.pageable_bytes if is_paged(optimizer) and not is_on_host else 0
        resident["optimizer"] -= paged_bytes
        resident["other"] = resident.get("other", 0) + self.budget.memory.workspace_bytes
        evaluation = {"eval": evaluation_level(self.prices(layout.rank, layout.levers), layout)}
        used = usage(resident, placed.load_peak_bytes, {**levels, **evaluation}, state)
        host_bytes = placed.host_bytes + state.host_bytes + self._offloaded_bytes(layout)
        return replace(used, paged_bytes=paged_bytes, host_bytes=host_bytes)

    def _offloaded_bytes(self, layout: Layout) -> int:
        """Of layers' inputs on the host: nothing on a CPU, where they are in a file."""
        if self.budget.kind == "cpu":
            return 0
        return layout.num_offloaded * hidden_bytes(self.prices(layout.rank, layout.levers), layout)

    def estimate(self, layout: Layout) -> float:
        """Tokens a second, for documents of the data stretched to the layout's length."""
        demand = self._demand(layout.seq_len)
        streamed_bytes = self.placed(layout.levers).streamed_bytes
        prices, speed = self.prices(layout.rank, layout.levers), self.budget.speed
        num_on_host = 0
        if layout.levers.optimizer_on_host:
            num_on_host = self.trained(layout.rank).num_elements
        return tokens_per_second(
            prices, layout, demand, speed, streamed_bytes=streamed_bytes, host_elements=num_on_host
        )

    def _demand(self, seq_len: int) -> Demand:
        stretch = seq_len / self.documents.seq_len
        return Demand(
            self.config.training.global_batch_size,
            self.documents.mean_tokens * stretch,
            self.documents.shortest_tokens * stretch,
            self.documents.std_tokens * stretch,
        )

    def is_within(self, used: Usage, slack_bytes: int = 0) -> bool:
        """Whether both budgets hold that, and `slack_bytes` more."""
        process = self.budget.memory.process_bytes(used.peak_bytes + slack_bytes, used.paged_bytes)
        host = self.budget.memory.host_peak_bytes(process) + used.host_bytes
        return process <= self.budget.budget_bytes and host <= self.budget.host_budget_bytes

    def excess_bytes(self, used: Usage) -> int:
        """By how much the budget that is harder to keep would be passed; negative within both."""
        device = self.needed_bytes(used) - self.budget.budget_bytes
        return max(device, self.needed_host_bytes(used) - self.budget.host_budget_bytes)

    def is_well_within(self, used: Usage) -> bool:
        """Whether both budgets hold it with room for what a trace at full depth may add to a price."""
        return self.is_within(used, slack_bytes=round(used.peak_bytes * PRICE_MARGIN))

    def needed_bytes(self, used: Usage) -> int:
        """What the device is expected to show."""
        return self.budget.memory.process_bytes(used.peak_bytes, used.paged_bytes)

    def needed_host_bytes(self, used: Usage) -> int:
        """Resident memory of the process on the host; on a CPU that is the device's."""
        return self.budget.memory.host_peak_bytes(self.needed_bytes(used)) + used.host_bytes


def _with_few_tiles(layout: Layout) -> Layout:
    """The same with about `TRACED_TILES` tiles of tokens at most, in one document or in as many rows as they take."""
    tokens, row_tokens = TRACED_TILES * layout.levers.tile_tokens, layout.tokens // layout.rows
    if not tokens or tokens >= layout.tokens:
        return layout
    if layout.rows == 1 or row_tokens >= tokens:
        return replace(layout, tokens=tokens, seq_len=min(layout.seq_len, tokens), rows=1)
    rows = min(layout.rows, -(-tokens // row_tokens))
    return replace(layout, tokens=rows * row_tokens, rows=rows)


def _scaled(level: Level, factor: float) -> Level:
    at_peak = {name: round(num_bytes * factor) for name, num_bytes in level.at_peak.items()}
    return Level(level.label, sum(at_peak.values()), at_peak)


def _pinned(policy: bool | int, num_layers: int) -> int:
    """How many layers `memory.activation_checkpointing` wants recomputed, or `memory.activation_offload` offloaded."""
    if isinstance(policy, bool):
        return num_layers if policy else 0
    return min(policy, num_layers)

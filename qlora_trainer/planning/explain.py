"""What a plan gave up, and what would have to be given up for one that does not fit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from qlora_trainer.config.levers import Levers
from qlora_trainer.model.trained_tables import base_tables_of
from qlora_trainer.planning.budget import Budget
from qlora_trainer.planning.plan import HOST_KEY, WouldFit, optimizer_bits
from qlora_trainer.planning.planner import Planner
from qlora_trainer.planning.price import Layout
from qlora_trainer.planning.rungs import pulled_levers
from qlora_trainer.planning.search import MIN_LOSS_CHUNK, Candidate, Space, layout_of, token_steps

_MIN_SEQ_LEN = 64
# What a lever gives up, in words.
_LEVER_WORDS = {
    "tile_tokens": "recomputed layers take {:,} tokens at a time",
    "embedding_residency": "embedding and head live on the {}",
    "optimizer_on_host": "the optimizer's state lives on the host",
    "base_residency": "the base is {} from the host",
}
_GIB = 2**30


def gave_up(chosen: Candidate, space: Space, asked: Levers) -> tuple[str, ...]:
    """In words, the least first: what is smaller than it could be if there were more memory, and where it went.

    Args:
        chosen: the plan.
        space: in which it was found, or that of what the config settles.
        asked: what the config pulls itself.
    """
    words = []
    layout = chosen.layout
    if layout.tokens < space.tokens[-1]:
        words.append(f"micro-batches of {layout.tokens:,} tokens instead of {space.tokens[-1]:,}")
    num_given_up = layout.num_recomputed - space.recompute[0]
    num_offloaded = layout.num_offloaded - min(space.offload[0], layout.num_recomputed)
    if num_given_up:
        words.append(
            f"{num_given_up} {'layer recomputes its' if num_given_up == 1 else 'layers recompute their'} activations"
        )
    if num_offloaded:
        words.append(
            f"the input of {num_offloaded} {'layer waits' if num_offloaded == 1 else 'layers waits'} on the host"
        )
    words += [
        _LEVER_WORDS[name].format(value)
        for name, value in pulled_levers(layout.levers, num_offloaded=0).items()
        if name not in pulled_levers(asked, num_offloaded=0)
    ]
    return tuple(words)


def would_fit(least: Candidate, planner: Planner, *, process_bytes: int, host_bytes: int) -> tuple[WouldFit, ...]:
    """Single changes to the smallest plan that make it fit, in the order in which they should be given up.

    Args:
        least: the smallest plan, which does not fit.
        planner: prices others. These are not confirmed, so what is promised has room for what that may add.
        process_bytes, host_bytes: what the smallest plan needs of the device and of the host.
    """
    layout, optimizer = least.layout, least.optimizer
    found: list[WouldFit | None] = [
        _micro_batch(layout, optimizer, planner),
        _recompute(layout, optimizer, planner),
        _offload(layout, optimizer, planner),
        *(_lever(name, value, layout, optimizer, planner) for name, value in planner.pullable().items()),
        _loss_chunk(layout, optimizer, planner),
        _optimizer(layout, optimizer, planner),
        _head(layout, optimizer, planner),
        _seq_len(layout, optimizer, planner),
        _rank(layout, optimizer, planner),
        _memory(least, planner.budget, process_bytes=process_bytes, host_bytes=host_bytes),
    ]
    return tuple(change for change in found if change is not None)


def _memory(least: Candidate, budget: Budget, *, process_bytes: int, host_bytes: int) -> WouldFit | None:
    """More memory of the one kind that is short, where there can be that much."""
    device, host = (budget.device_key, budget.most_bytes), (HOST_KEY, budget.most_host_bytes)
    if budget.kind == "cpu":  # both keys limit the same memory
        asked = {device: budget.asked_bytes, host: budget.asked_host_bytes}
        short = {key: size for key, size in asked.items() if size is not None and size < process_bytes}
        short = short or {device: budget.budget_bytes}
    else:
        of_device = {device: budget.budget_bytes} if process_bytes > budget.budget_bytes else {}
        of_host = {host: budget.host_budget_bytes} if host_bytes > budget.host_budget_bytes else {}
        short = of_device | of_host
    if len(short) != 1:  # one change alone is not enough
        return None
    (((knob, most_bytes), before_bytes),) = short.items()
    hundredths = math.ceil(100 * (host_bytes if knob == HOST_KEY else process_bytes) / _GIB)
    if hundredths * _GIB > 100 * most_bytes:
        return None
    return WouldFit(
        knob=knob,
        before=f"{before_bytes / _GIB:.2f}GiB",
        after=f"{hundredths / 100:.2f}GiB",
        allocated_peak_bytes=least.usage.peak_bytes,
    )


def _asked(pinned: bool | int | str, decided: int) -> int | str:
    """What a change goes out from: what the config says, since that is what is changed; what was decided for `auto`."""
    if isinstance(pinned, bool):
        return str(pinned).lower()
    return decided if pinned == "auto" else pinned


def _tried(
    layout: Layout, optimizer: str, planner: Planner, knob: str, before: int | str, after: int | str
) -> WouldFit | None:
    used = planner.price(layout, optimizer)
    if not planner.is_well_within(used):
        return None
    return WouldFit(knob=knob, before=before, after=after, allocated_peak_bytes=used.peak_bytes)


def _micro_batch(layout: Layout, optimizer: str, planner: Planner) -> WouldFit | None:
    before = _asked(planner.config.memory.micro_batch_tokens, layout.tokens)
    for tokens in reversed(token_steps(layout.seq_len, layout.tokens)[:-1]):
        smaller = replace(layout, tokens=tokens, loss_chunk=min(layout.loss_chunk, tokens))
        change = _tried(smaller, optimizer, planner, "memory.micro_batch_tokens", before, tokens)
        if change is not None:
            return change
    return None


def _recompute(layout: Layout, optimizer: str, planner: Planner) -> WouldFit | None:
    if layout.num_recomputed == planner.dry.num_layers:
        return None
    every = replace(layout, num_recomputed=planner.dry.num_layers)
    before = _asked(planner.config.memory.activation_checkpointing, layout.num_recomputed)
    return _tried(every, optimizer, planner, "memory.activation_checkpointing", before, "true")


def _offload(layout: Layout, optimizer: str, planner: Planner) -> WouldFit | None:
    if layout.num_offloaded == layout.num_recomputed:
        return None
    every = replace(layout, num_offloaded=layout.num_recomputed)
    before = _asked(planner.config.memory.activation_offload, layout.num_offloaded)
    return _tried(every, optimizer, planner, "memory.activation_offload", before, "true")


def _lever(name: str, value: Any, layout: Layout, optimizer: str, planner: Planner) -> WouldFit | None:
    """One that is pinned where it is; what is left to the plan is pulled already."""
    if getattr(layout.levers, name) == value:
        return None
    key, after = ("optimizer_residency", "host") if name == "optimizer_on_host" else (name, value)
    pulled = replace(layout, levers=replace(layout.levers, **{name: value}))
    before = getattr(planner.config.memory, key)
    return _tried(pulled, optimizer, planner, f"memory.{key}", before, after)


def _loss_chunk(layout: Layout, optimizer: str, planner: Planner) -> WouldFit | None:
    if layout.loss_chunk <= MIN_LOSS_CHUNK:
        return None
    smaller = replace(layout, loss_chunk=MIN_LOSS_CHUNK)
    before = _asked(planner.config.memory.loss_chunk_tokens, layout.loss_chunk)
    return _tried(smaller, optimizer, planner, "memory.loss_chunk_tokens", before, MIN_LOSS_CHUNK)


def _optimizer(layout: Layout, optimizer: str, planner: Planner) -> WouldFit | None:
    if optimizer_bits(optimizer) == 8:
        return None
    narrow = optimizer.replace("32bit", "8bit")
    return _tried(layout, narrow, planner, "training.optimizer", optimizer, narrow)


def _head(layout: Layout, optimizer: str, planner: Planner) -> WouldFit | None:
    """Where the head is one of its own that is on the device, and frozen. What is learned then is learned beside it."""
    tables = base_tables_of(planner.dry.model)
    is_trained = tables.head in planner.settings.modules_to_save
    if layout.levers.nf4_head or layout.levers.embedding_residency == "host" or tables.is_tied or is_trained:
        return None
    packed = replace(layout, levers=replace(layout.levers, nf4_head=True))
    return _tried(packed, optimizer, planner, "quantization.head", planner.config.quantization.head, "nf4")


def _seq_len(layout: Layout, optimizer: str, planner: Planner) -> WouldFit | None:
    seq_len = 1 << ((layout.seq_len - 1).bit_length() - 1)
    while seq_len >= _MIN_SEQ_LEN:
        space = replace(planner.space(layout.rank, seq_len), levers=layout.levers)
        shorter = layout_of(space, space.tokens[0], layout.loss_chunk, layout.num_recomputed, layout.num_offloaded)
        change = _tried(shorter, optimizer, planner, "data.seq_len", layout.seq_len, seq_len)
        if change is not None:
            return change
        seq_len //= 2
    return None


def _rank(layout: Layout, optimizer: str, planner: Planner) -> WouldFit | None:
    rank = 1 << ((layout.rank - 1).bit_length() - 1) if layout.rank > 1 else 0
    while rank >= 1:
        change = _tried(replace(layout, rank=rank), optimizer, planner, "lora.rank", layout.rank, rank)
        if change is not None:
            return change
        rank //= 2
    return None

"""Prices a set of knobs from the parts of a step: bytes in every phase.

Parts are put one after the other: embedding, layers forward, loss, layers backward. Each raises the level by its net
and reaches a peak above it; the maximum over all of them is taken last. Nothing here traces or allocates anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from qlora_trainer.config.levers import NO_LEVERS, Levers
from qlora_trainer.hardware.device_memory import DeviceMemory
from qlora_trainer.planning.inside import LOSS, ROW_NORMS, bytes_of, norms_of_rank, resized
from qlora_trainer.planning.replay import Reserved
from qlora_trainer.planning.shallow_trace import LayerParts, Policy, StepParts
from qlora_trainer.planning.state_trace import StateTrace
from qlora_trainer.planning.timeline import EMPTY_SEGMENT, Level, Outline, Segment, outline
from qlora_trainer.planning.tracker import CATEGORIES, Inside

PHASES = ("load", "forward", "loss", "backward", "optimizer", "eval", "save", "resume")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What the bytes of a training step depend on.

    Attributes:
        rank: of the adapters.
        tokens: of a micro-batch, all of it supervised.
        seq_len: of its longest document.
        rows: documents that attention sees at once, 1 when packed.
        num_recomputed: layers that keep only their input at most, the first ones.
        loss_chunk: positions in a chunk of the loss.
        num_offloaded: of the recomputed layers those whose input waits on the host, the first ones.
        levers: what else is pulled.
    """

    rank: int
    tokens: int
    seq_len: int
    rows: int
    num_recomputed: int
    loss_chunk: int
    num_offloaded: int = 0
    levers: Levers = NO_LEVERS


@dataclass(frozen=True, slots=True)
class Usage:
    """Allocated bytes of a whole run.

    Attributes:
        phases: phase -> its own peak.
        peak_phase: where the largest is.
        breakdown: category -> bytes at that moment.
        resident: category -> bytes between two steps.
        paged_bytes: optimizer state beyond all that, which torch's allocator does not see; counted as resident.
        host_bytes: what the levers keep on the host, where that is other memory than the device.
        reserved: what a GPU's allocator takes for it, where the whole step was traced.
    """

    phases: Mapping[str, int]
    peak_phase: str
    breakdown: Mapping[str, int]
    resident: Mapping[str, int]
    paged_bytes: int = 0
    host_bytes: int = 0
    reserved: Reserved | None = None

    @property
    def peak_bytes(self) -> int:
        return self.phases[self.peak_phase]


@dataclass(frozen=True, slots=True)
class LayerRun:
    """Layers one after the other that are alike in kind and policy."""

    policy: Policy
    parts: LayerParts
    num_layers: int


@dataclass(slots=True)
class Prices:
    """The parts of a model's step, with what has been worked out of them so far."""

    parts: StepParts
    memory: DeviceMemory
    _outlines: dict[tuple[int, int, int, int, int, int, int], Outline] = field(default_factory=dict)
    _runs: dict[tuple[int, int], list[LayerRun]] = field(default_factory=dict)
    _with_loss: dict[int, bool] = field(default_factory=dict)

    def outline(self, segment: Segment, layout: Layout) -> Outline:
        """A part at given sizes; what only depends on them is worked out once."""
        if id(segment) not in self._with_loss:
            self._with_loss[id(segment)] = any(inside.op == LOSS for _, inside in segment.insides)
        chunk = layout.loss_chunk if self._with_loss[id(segment)] else 0
        key = (id(segment), layout.rank, layout.tokens, layout.seq_len, layout.rows, chunk, layout.levers.tile_tokens)
        if key not in self._outlines:
            sizes = segment.sizes(
                layout.tokens,
                layout.rank,
                tile=layout.levers.tile_tokens,
                alignment_bytes=self.memory.alignment_bytes,
                inside_bytes=lambda inside: bytes_of(self._resized(inside, layout)),
            )
            self._outlines[key] = outline(segment, sizes)
        return self._outlines[key]

    def layer_runs(self, layout: Layout) -> list[LayerRun]:
        """The layers of the whole model, in order; the first, whose input needs no gradient, is a run of its own."""
        key = (layout.num_recomputed, layout.num_offloaded)
        if key not in self._runs:
            each = ((policy_of(layout, index), kind, index == 0) for index, kind in enumerate(self.parts.kinds))
            self._runs[key] = [
                LayerRun(policy, self.parts.of(policy).layers[kind, is_first], len(list(alike)))
                for (policy, kind, is_first), alike in groupby(each)
            ]
        return self._runs[key]

    def _resized(self, inside: Inside, layout: Layout) -> Inside:
        if inside.op == ROW_NORMS:
            probe = self.parts.probe
            return norms_of_rank(inside, probe.rank, layout.rank) if probe.has_rank else inside
        return resized(
            inside,
            self.parts.probe,
            tokens=layout.tokens,
            tile=layout.levers.tile_tokens,
            seq_len=layout.seq_len,
            rows=layout.rows,
            loss_chunk=layout.loss_chunk,
        )


def training_levels(prices: Prices, layout: Layout) -> list[Level]:
    """The peak of each part of a training step, beyond base, adapters, gradients and optimizer."""
    parts = prices.parts
    runs = prices.layer_runs(layout)
    first, last = runs[0], runs[-1]
    order: list[tuple[str, Segment, int]] = [("forward", parts.of(first.policy).embed, 1)]
    order += [("forward", run.parts.forward, run.num_layers) for run in runs]
    order.append(("loss", parts.of(last.policy).loss, 1))
    order += [("backward", run.parts.backward, run.num_layers) for run in reversed(runs)]
    levels: dict[str, Level] = {}
    level: NDArray[np.int64] = np.zeros(len(CATEGORIES), dtype=np.int64)
    level_bytes = 0  # its sum: thousands of layouts are priced, and few parts reach the most
    for phase, segment, number in order:
        own = prices.outline(segment, layout)
        if phase == "loss" and first.policy != last.policy and first.parts.backward is not EMPTY_SEGMENT:
            # The first layer's input: the loss behind a layer of some policy lets go of it if the first is alike.
            change = parts.drops_input(last.policy) - parts.drops_input(first.policy)
            level[CATEGORIES.index("saved_activation")] += change * hidden_bytes(prices, layout)
            level_bytes += change * hidden_bytes(prices, layout)
        # Of equal layers one after the other, the first or the last reaches the most.
        num_before = number - 1 if own.net_bytes > 0 else 0
        peak = level_bytes + own.net_bytes * num_before + own.peak_bytes
        if phase not in levels or peak > levels[phase].peak_bytes:
            top = level + own.net * num_before
            levels[phase] = Level(phase, peak, dict(zip(CATEGORIES, (top + own.at_peak).tolist(), strict=True)))
        level = level + own.net * number
        level_bytes += own.net_bytes * number
    return list(levels.values())


def policy_of(layout: Layout, index: int) -> Policy:
    """What the layer of that number keeps: the first ones least, whose activations wait longest."""
    if index < layout.num_offloaded:
        return "offload"
    return "recompute" if index < layout.num_recomputed else "keep"


def hidden_bytes(prices: Prices, layout: Layout) -> int:
    """Of the hidden states of a micro-batch: what goes into a layer."""
    hidden, _ = prices.parts.head_spec
    return prices.memory.aligned(layout.tokens * hidden.shape[1] * hidden.dtype.itemsize)


def evaluation_level(prices: Prices, layout: Layout) -> Level:
    """The peak of an evaluation of the same micro-batch: nothing is kept, so a few layers need what all do."""
    own = prices.outline(prices.parts.evaluation, layout)
    return Level("eval", own.peak_bytes, dict(zip(CATEGORIES, own.at_peak.tolist(), strict=True)))


def usage(resident: Mapping[str, int], load_peak_bytes: int, levels: Mapping[str, Level], state: StateTrace) -> Usage:
    """Put the phases of a run on top of what is always there.

    Args:
        resident: category -> bytes of base, adapters, gradients and optimizer, rounded.
        load_peak_bytes: most that is alive while the base is loaded.
        levels: "forward", "loss", "backward" and "eval" -> most beyond that.
        state: the same of the optimizer's phases.
    """
    resident_bytes = sum(resident.values())
    peaks = {"load": load_peak_bytes}
    for phase, level in {**levels, **state.levels}.items():
        peaks[phase] = resident_bytes + level.peak_bytes
    phases = {phase: peaks.get(phase, resident_bytes) for phase in PHASES}  # no backward, where a head alone is trained
    peak_phase = max(phases, key=lambda phase: phases[phase])
    above = {**levels, **state.levels}.get(peak_phase)
    breakdown = {name: resident.get(name, 0) + (above.at_peak[name] if above is not None else 0) for name in CATEGORIES}
    if above is None:  # loading: what is not the base yet is workspace
        breakdown["other"] += load_peak_bytes - sum(breakdown.values())
    return Usage(phases, peak_phase, breakdown, {name: resident.get(name, 0) for name in CATEGORIES})

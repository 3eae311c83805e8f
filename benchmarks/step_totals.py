"""A step's operations summed up: what `step_cost.py` shows, and what its golden file holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.step_ledger import PHASES, Entry
from benchmarks.step_operations import DEQUANTIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is traced, alike for both sides: one row, every token but a document's first supervised, no dropout.

    Attributes:
        model: a name that `plan --model` knows, of a model whose linears are named like Llama's.
        num_layers: of the model, or fewer.
        num_tokens: of the row.
        rank: of adapters on all linears.
        is_recomputed: whether layers are recomputed in backward (activation checkpointing).
        loss_chunk_tokens: ours; TRL's are its own.
        lever: ours alone; a name of `step_ours.LEVERS`, or "" for none.
        num_documents: ours alone; of equal lengths, which do not see each other. To torch's attention, which TRL takes
            where FlashAttention's package is not installed, a packed row is one document.
    """

    model: str
    num_layers: int
    num_tokens: int
    rank: int
    is_recomputed: bool
    loss_chunk_tokens: int
    lever: str = ""
    num_documents: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Of one step.

    Attributes:
        gemm_flops, attention_flops: of matrix products, and of those inside attention kernels.
        dequantizations: weights unpacked, by phase.
        moved_bytes: read and written by everything that is neither a product nor an attention kernel.
        dequantization_bytes: of `moved_bytes`, those of unpacking weights and their scales.
        launches: kernels.
        outside_bytes, outside_launches: of these, what is neither forward nor backward: clip, update, bookkeeping.
        copies_to_device, copies_to_host, copied_bytes: between host and device; a value that is asked for is a copy.
        waits: calls in which the host waits for the device.
    """

    gemm_flops: int
    attention_flops: int
    dequantizations: dict[str, int]
    moved_bytes: int
    dequantization_bytes: int
    launches: int
    outside_bytes: int
    outside_launches: int
    copies_to_device: int
    copies_to_host: int
    copied_bytes: int
    waits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one operation or one place has of a step."""

    name: str
    moved_bytes: int
    launches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """Where a step's bytes and launches come from, most bytes first; and where it waits.

    Attributes:
        operations: by operation.
        places: by the function it came from and the phase.
        waits: place -> number.
    """

    operations: tuple[Share, ...]
    places: tuple[Share, ...]
    waits: dict[str, int]


def sum_up(entries: Iterable[Entry]) -> tuple[Totals, Breakdown]:
    """Totals of a step, and where they come from."""
    number: Counter[str] = Counter()
    dequantizations = dict.fromkeys(PHASES[:3], 0)
    bytes_of: tuple[Counter[str], Counter[str]] = Counter(), Counter()
    launches_of: tuple[Counter[str], Counter[str]] = Counter(), Counter()
    waits: Counter[str] = Counter()
    for entry in entries:
        done = entry.operation
        if done.waits:
            waits[f"{entry.place} ({done.name})"] += 1
        if done.copied_to is not None:
            number[f"copies_to_{done.copied_to}"] += 1
            number["copied_bytes"] += done.moved_bytes
            continue
        moved_bytes = 0 if done.flops else done.moved_bytes
        number["gemm_flops" if done.kind == "product" else "attention_flops"] += done.flops
        number["moved_bytes"] += moved_bytes
        number["launches"] += done.launches
        if done.kind == "dequantization":
            number["dequantization_bytes"] += moved_bytes
            dequantizations[entry.phase] += done.name == DEQUANTIZE
        if entry.phase == "outside":
            number["outside_bytes"] += moved_bytes
            number["outside_launches"] += done.launches
        for key, own_bytes, own_launches in zip(
            (done.name, f"{entry.place} ({entry.phase})"), bytes_of, launches_of, strict=True
        ):
            own_bytes[key] += moved_bytes
            own_launches[key] += done.launches
    operations, places = (
        tuple(
            Share(name=name, moved_bytes=own_bytes[name], launches=own_launches[name])
            for name in sorted(own_bytes, key=lambda name: (-own_bytes[name], -own_launches[name], name))
        )
        for own_bytes, own_launches in zip(bytes_of, launches_of, strict=True)
    )
    fields = {name: number[name] for name in Totals.__slots__ if name not in ("dequantizations", "waits")}
    totals = Totals(**fields, dequantizations=dequantizations, waits=sum(waits.values()))
    return totals, Breakdown(operations=operations, places=places, waits=dict(sorted(waits.items())))


def inside_on_a_line(two: Mapping[str, Any], three: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """What forward and backward of `num_layers` layers cost, from `Totals` of two and of three, each as JSON.

    Each further layer costs what the third one adds. Not so outside of forward and backward, where lists of tensors are
    cut as far as a kernel's arguments reach, and buffers into pieces.
    """
    found: dict[str, Any] = {}
    for name, value in inside_of(two).items():
        further = inside_of(three)[name]
        if isinstance(value, dict):
            found[name] = {phase: value[phase] + (num_layers - 2) * (further[phase] - value[phase]) for phase in value}
        else:
            found[name] = value + (num_layers - 2) * (further - value)
    return found


def inside_of(totals: Mapping[str, Any]) -> dict[str, Any]:
    """`Totals` as JSON without what is outside of forward and backward."""
    inside = dict(totals)
    inside["moved_bytes"] -= inside.pop("outside_bytes")
    inside["launches"] -= inside.pop("outside_launches")
    return inside

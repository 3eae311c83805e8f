"""Every way of trading time for memory, each in a tiny run of its own: the same gradients, and the predicted bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from qlora_trainer.config.load import load_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.run.self_test.check import Check, attempted, judged, within
from qlora_trainer.run.self_test.measured import Measured, measure, relative_difference
from qlora_trainer.run.self_test.tiny_base import Sizes, sizes_for, write_base, write_rows

MAX_OFF = 0.02  # of a phase's bytes, up or down
# Where a lever changes how something is rounded; by compute dtype, since in 16 bits each product is rounded.
_REORDERED = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
_NOISE_FACTOR = 4  # by which a difference may exceed what the same gradient differs by when it is computed again


@dataclass(frozen=True, slots=True)
class Lever:
    """One way, as the config pulls it.

    Attributes:
        name: for people.
        options: of the config.
        reorders: of what the sums have another order: of nothing, so that no bit differs, of the gradient, or of the
            optimizer's update.
        is_mapped_on_cpu: whether on a CPU it is the kernel's pages that it saves, which are allocated all the same.
    """

    name: str
    options: tuple[str, ...]
    reorders: Literal["nothing", "gradient", "update"] = "nothing"
    is_mapped_on_cpu: bool = False


@dataclass(frozen=True, slots=True)
class LeverRun:
    """A lever and what its run took: phase -> (predicted, measured) bytes."""

    name: str
    phases: dict[str, tuple[int, int]]


BASELINE = Lever("layers recomputed", ())
LEVERS = (
    Lever("layers kept", ("memory.activation_checkpointing=false",)),
    Lever("optimizer paged", ("training.optimizer=paged_adamw_32bit",)),
    Lever("layer inputs offloaded", ("memory.activation_offload=true",)),
    Lever("layers and loss in tiles", ("memory.tile_tokens=128",), reorders="gradient"),
    Lever(
        "embedding and head on the host",
        ("memory.embedding_residency=host",),
        reorders="gradient",
        is_mapped_on_cpu=True,
    ),
    # bitsandbytes has one kernel for each device; on a CPU both are one.
    Lever("optimizer on the host", ("memory.optimizer_residency=host",), reorders="update"),
    Lever("base streamed", ("memory.base_residency=streamed",), is_mapped_on_cpu=True),
)


def lever_checks(device: torch.device, folder: Path, runs: list[LeverRun]) -> Iterator[Check]:
    """A run with recomputation alone, and one of each lever: its bytes, and its gradients beside the first's.

    Args:
        device: that trains.
        folder: for base, data and runs; on a disk.
        runs: what each run took is added here, also where it is not as it was predicted.
    """
    sizes = sizes_for(device)
    base, rows = write_base(folder / "base", sizes), write_rows(folder / "rows.jsonl", sizes)
    expected: Measured | None = None
    for number, lever in enumerate((BASELINE, *LEVERS)):
        config = config_of(lever, base, rows, folder / f"run-{number}", sizes)
        found: list[Measured] = []

        def bytes_checked(lever: Lever = lever, config: RunConfig = config, found: list[Measured] = found) -> Check:
            found.append(measure(config, device))
            if lever.is_mapped_on_cpu and device.type == "cpu":
                seen = "pages of a mapped file count as allocated"
                return Check(f"memory, {lever.name}", "not on this device", seen, "a device with memory of its own")
            runs.append(LeverRun(lever.name, dict(found[0].phases)))
            return judged_bytes(lever.name, found[0])

        yield from attempted(f"memory, {lever.name}", bytes_checked)
        if found and lever is BASELINE:
            expected = found[0]
        elif found and expected is not None:
            yield judged_gradients(lever, found[0], expected)


def config_of(lever: Lever, base: Path, rows: Path, run: Path, sizes: Sizes) -> RunConfig:
    """One micro-batch a step, every layer recomputed and everything on the device, but for what the lever changes."""
    return load_config(
        None,
        [
            f"model.base={base}",
            f"data.train={rows}",
            f"data.seq_len={sizes.seq_len}",
            "data.eval_fraction=0",
            f"training.global_batch_size={sizes.documents}",
            "training.max_steps=2",
            "training.optimizer=adamw_32bit",
            f"memory.micro_batch_tokens={sizes.documents * sizes.seq_len}",
            "memory.loss_chunk_tokens=256",
            "memory.activation_checkpointing=true",
            "output.sample_questions=0",
            f"output.dir={run}",
            *lever.options,
        ],
    )


def judged_bytes(name: str, measured: Measured) -> Check:
    """Whether every phase took what was predicted."""
    off = {phase: predicted / taken - 1.0 for phase, (predicted, taken) in measured.phases.items()}
    worst = max(off, key=lambda phase: abs(off[phase]))
    peak_bytes = max(taken for _, taken in measured.phases.values())
    return judged(
        f"memory, {name}",
        is_right=abs(off[worst]) <= MAX_OFF,
        found=f"peak {peak_bytes / 2**20:.1f} MiB, plan off by {off[worst]:+.2%} in {worst}",
        expected=f"at most {MAX_OFF:.0%} in every phase",
    )


def judged_gradients(lever: Lever, found: Measured, expected: Measured) -> Check:
    """Whether the gradients are those of the run without the lever: to the bit, where this device repeats itself."""
    noise = max(found.noise, expected.noise)
    limit = _NOISE_FACTOR * noise
    if lever.reorders != "nothing":
        limit = max(limit, _REORDERED[found.compute_dtype])
    if lever.reorders == "gradient":
        error = relative_difference(found.gradient_of_same, expected.gradient_of_same)
    else:
        error = relative_difference(found.gradient, expected.gradient)
    return within(f"gradients, {lever.name}", error, limit)

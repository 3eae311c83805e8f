"""One point of `scaling.py`, in a process of its own: some steps of one size, their time, and the memory they take.

    python -m benchmarks.scaling_point SPEC.json RESULT.json

A first step gives freed blocks back to the system at once, as nothing but what is alive then counts: its peak is the
memory. The steps that are timed keep freed blocks, as a run does; their peak is told, too.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.plan_accuracy_inputs import SMOLLM2
from benchmarks.plan_accuracy_run import forget_peak, status_bytes
from benchmarks.random_nf4 import random_model
from benchmarks.roofline_step import RealStep, StepSpec
from qlora_trainer.hardware.device import DTYPES, choose_compute_dtype, num_cpu_threads
from qlora_trainer.hardware.heap import UNASKED_BYTES, keep_freed_blocks, release_free_memory, return_freed_blocks
from qlora_trainer.model.adapters import trainable_parameters
from qlora_trainer.model.base import resolve_base
from qlora_trainer.model.load import load_quantized
from qlora_trainer.model.nf4_cache import prepare_nf4_cache
from qlora_trainer.model.quantized import QuantizedModel

PACKAGED = "135m"  # SmolLM2; the other sizes are of random weights


@dataclass(frozen=True, slots=True, kw_only=True)
class PointSpec:
    """What is trained.

    Attributes:
        model: "135m", or a size of `benchmarks.load`.
        micro_batch_tokens: of the one micro-batch of a step.
        seq_len: of its documents, every token but the first supervised.
        rank, is_recomputed, loss_chunk_tokens, dtype: see `roofline_step.StepSpec`.
        num_steps: timed ones.
        limit_bytes: what the process may take; None for no limit.
    """

    model: str
    micro_batch_tokens: int
    seq_len: int
    rank: int = 16
    is_recomputed: bool = False
    loss_chunk_tokens: int = 512
    dtype: str = "auto"
    num_steps: int = 3
    limit_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.micro_batch_tokens % self.seq_len:
            raise ValueError(f"{self}: documents of seq_len must fill the micro-batch")


def measure(spec: PointSpec) -> dict[str, Any]:
    """Seconds and bytes."""
    told: dict[str, Any] = {"import_bytes": status_bytes()["resident"]}
    torch.set_num_threads(num_cpu_threads())  # as a run does
    return_freed_blocks()
    dtype = choose_compute_dtype(torch.device("cpu")) if spec.dtype == "auto" else spec.dtype
    start = time.perf_counter()
    model = _model(spec.model, DTYPES[dtype])
    told |= {"compute_dtype": dtype, "load_seconds": time.perf_counter() - start}
    step = RealStep(
        StepSpec(
            model=spec.model,
            lengths=(spec.seq_len,) * (spec.micro_batch_tokens // spec.seq_len),
            supervised_share=1.0,
            micro_batch_tokens=spec.micro_batch_tokens,
            rank=spec.rank,
            loss_chunk_tokens=spec.loss_chunk_tokens,
            is_recomputed=spec.is_recomputed,
        ),
        model,
        model.module.config.vocab_size,
    )
    release_free_memory()
    if spec.limit_bytes is not None:
        model.resident_limit.limit_bytes = spec.limit_bytes - UNASKED_BYTES
    told["load_peak_bytes"] = status_bytes()["peak"]
    told["resident_bytes"] = status_bytes()["resident"]
    forget_peak()
    told["first_seconds"] = step.run()
    told["peak_bytes"] = status_bytes()["peak"]
    release_free_memory()
    keep_freed_blocks()
    forget_peak()
    told["step_seconds"] = [step.run() for _ in range(spec.num_steps)]
    told["timed_peak_bytes"] = status_bytes()["peak"]
    told["process_peak_bytes"] = max(told[name] for name in ("load_peak_bytes", "peak_bytes", "timed_peak_bytes"))
    told["trainable_parameters"] = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    told["base_parameters"] = _num_parameters(model)
    return told


def _model(name: str, compute_dtype: torch.dtype) -> QuantizedModel:
    if name != PACKAGED:
        return random_model(name, compute_dtype)
    base = resolve_base(SMOLLM2)
    cache = prepare_nf4_cache(base, double_quant=True)
    return load_quantized(base, cache, compute_dtype=compute_dtype, device=torch.device("cpu"))


def _num_parameters(model: QuantizedModel) -> int:
    table: Any = model.module.get_input_embeddings()
    tables = {id(weight): weight for weight in (table.weight, model.head.weight)}  # a tied head is its embedding
    linears = sum(linear.in_features * linear.out_features for linear in model.linears.values())
    return linears + sum(weight.numel() for weight in tables.values())


def main() -> None:
    spec_path, result = map(Path, sys.argv[1:])
    result.write_text(json.dumps(measure(PointSpec(**json.loads(spec_path.read_text())))))


if __name__ == "__main__":
    main()

"""One step of `small_cards`, in a process of its own that a control group limits, done as by `train`.

    python -m benchmarks.small_cards_run SPEC.json RESULT.json

The base is an NF4 cache of random weights (`benchmarks.random_nf4.write_random_cache`). What the kernel says of the
process's peak is told for the step alone, and for the whole process.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.load import SIZES
from benchmarks.plan_accuracy_run import status_bytes
from benchmarks.roofline_step import random_documents
from qlora_trainer.config.load import load_config
from qlora_trainer.hardware.device import DTYPES, num_cpu_threads
from qlora_trainer.hardware.heap import UNASKED_BYTES, keep_freed_blocks, release_free_memory, return_freed_blocks
from qlora_trainer.hardware.input_store import input_store
from qlora_trainer.hardware.memory import forget_peak, resident_bytes
from qlora_trainer.model.adapters import attach_new_adapters, trainable_parameters
from qlora_trainer.model.base import Base
from qlora_trainer.model.load import load_quantized
from qlora_trainer.model.lora_settings import asked_settings
from qlora_trainer.model.nf4_cache import NF4Cache
from qlora_trainer.model.offload import keep_least
from qlora_trainer.model.trained_tables import base_tables_of
from qlora_trainer.model.trained_vectors import biased_modules
from qlora_trainer.planning.budget import cpu_budget
from qlora_trainer.planning.make_plan import make_plan
from qlora_trainer.step.batch import make_micro_batch
from qlora_trainer.step.optimizer import AdapterOptimizer, OptimizerSettings
from qlora_trainer.step.train_step import accumulate_gradients

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSpec:
    """What is run.

    Attributes:
        size: of `benchmarks.load.SIZES`.
        cache: the NF4 form of random weights.
        seq_len: tokens of the one document of a step.
        budget_bytes: of the process.
        overrides: of the config.
        num_steps: run one after the other.
    """

    size: str
    cache: str
    seq_len: int
    budget_bytes: int
    overrides: tuple[str, ...] = ()
    num_steps: int = 1


def run(spec: StepSpec) -> dict[str, Any]:
    """What was planned, and what was measured."""
    torch.set_num_threads(num_cpu_threads())
    return_freed_blocks()
    config = load_config(
        None,
        [
            "model.base=random",
            "data.train=none.jsonl",
            f"data.seq_len={spec.seq_len}",
            "training.global_batch_size=1",
            "quantization.compute_dtype=float32",
            *spec.overrides,
        ],
    )
    model_config = LlamaConfig(**SIZES[spec.size])  # type: ignore[arg-type]
    plan = make_plan(
        config,
        cpu_budget(spec.budget_bytes, compute_dtype="float32", where="memory.budget"),
        model_config=model_config,
        interpreter_bytes=_process_bytes,
    )
    told: dict[str, Any] = {"plan": plan.as_json()}
    if not plan.fits:
        return told
    knobs = plan.knobs
    base = Base("random", None, Path(spec.cache), model_config)
    cache = NF4Cache(Path(spec.cache), "random", was_built=False, defects=())
    model = load_quantized(base, cache, compute_dtype=DTYPES["float32"], device=CPU, levers=knobs.levers)
    lora = asked_settings(
        config.lora, knobs.rank, list(model.linears), base_tables_of(model), biased=biased_modules(model)
    )
    attach_new_adapters(model, lora, dtype=torch.bfloat16, seed=0)
    keep_least(model, knobs.num_recomputed, knobs.activation_offload_layers, input_store(CPU, Path(spec.cache).parent))
    model.module.train()
    optimizer = AdapterOptimizer(
        trainable_parameters(model),
        OptimizerSettings(
            bits=knobs.optimizer_bits,
            residency=knobs.optimizer_residency,
            weight_decay=0.0,
            paging_folder=Path(spec.cache).parent,
        ),
    )
    release_free_memory()
    forget_peak(CPU)
    keep_freed_blocks()
    model.resident_limit.limit_bytes = plan.predicted.process_peak_bytes - UNASKED_BYTES
    told |= {"losses": [], "step_seconds": []}
    (document,) = random_documents((spec.seq_len,), model_config.vocab_size, 1.0)
    batch = make_micro_batch([document], seed=0, step=0, packing=True)
    for _ in range(spec.num_steps):
        start = time.perf_counter()
        optimizer.zero_gradients()
        loss = accumulate_gradients(
            model,
            [batch],
            num_supervised_tokens=document.num_supervised_tokens,
            loss_chunk_tokens=knobs.loss_chunk,
        )
        norm = optimizer.clip_gradients(1.0)
        optimizer.update(1e-4, norm)
        told["losses"].append(float(loss))
        told["step_seconds"].append(time.perf_counter() - start)
    return told | {"measured_bytes": status_bytes()["peak"], "grad_norm": float(norm)}


def _process_bytes() -> int:
    gc.collect()
    release_free_memory()
    return resident_bytes()


def main() -> None:
    spec_path, result = map(Path, sys.argv[1:])
    spec = json.loads(spec_path.read_text())
    result.write_text(json.dumps(run(StepSpec(**spec | {"overrides": tuple(spec.get("overrides", ()))}))))


if __name__ == "__main__":
    main()

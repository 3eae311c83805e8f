"""One process of `roofline.py`: real steps and their products alone, in turn.

python -m benchmarks.roofline_step SPEC.json RESULT.json
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.plan_accuracy_run import status_bytes
from benchmarks.roofline_products import Product, ProductRecorder, Replay, in_any_dtype, num_flops
from qlora_trainer.data.micro_batches import cut
from qlora_trainer.hardware.device import DTYPES, choose_compute_dtype, num_cpu_threads
from qlora_trainer.hardware.heap import keep_freed_blocks, release_free_memory
from qlora_trainer.model.activation_policy import decoder_layers, recompute_layers
from qlora_trainer.model.adapters import attach_new_adapters, trainable_parameters
from qlora_trainer.model.base import resolve_base
from qlora_trainer.model.load import load_quantized
from qlora_trainer.model.lora_settings import LoraSettings, select_targets
from qlora_trainer.model.nf4_cache import prepare_nf4_cache
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.step.batch import make_micro_batch
from qlora_trainer.step.document import IGNORE_INDEX, Document
from qlora_trainer.step.optimizer import AdapterOptimizer, OptimizerSettings
from qlora_trainer.step.train_step import accumulate_gradients

CPU = torch.device("cpu")
LEARNING_RATE, MAX_GRAD_NORM = 1e-4, 1.0
NUM_TOLD = 20  # products, by the time they take


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSpec:
    """What is timed.

    Attributes:
        model: a base, as `model.base` takes it.
        lengths: of the documents of a step.
        supervised_share: of each document, its end.
        micro_batch_tokens, rank, loss_chunk_tokens: as they are called.
        is_recomputed: all layers, or none.
        dtype: "float32", "bfloat16", or "auto" as a run decides it.
        adapter_dtype: as `lora.dtype`.
        rounds: of a step and its products in each dtype.
    """

    model: str
    lengths: tuple[int, ...]
    supervised_share: float = 0.59
    micro_batch_tokens: int = 2048
    rank: int = 16
    loss_chunk_tokens: int = 1024
    is_recomputed: bool = False
    dtype: str = "auto"
    adapter_dtype: str = "bfloat16"
    rounds: int = 5


class RealStep:
    """A model that is ready to be trained on random documents.

    Args:
        spec: what is trained.
        model: the base, without adapters.
        vocabulary: tokens are drawn from below this.
    """

    def __init__(self, spec: StepSpec, model: QuantizedModel, vocabulary: int) -> None:
        self.spec, self.model = spec, model
        targets = select_targets(list(model.linears), "all-linear")
        lora = LoraSettings(rank=spec.rank, alpha=2.0 * spec.rank, dropout=0.0, targets=targets)
        attach_new_adapters(model, lora, dtype=DTYPES[spec.adapter_dtype], seed=0)
        model.module.train()
        recompute_layers(model, len(decoder_layers(model)) if spec.is_recomputed else 0)
        settings = OptimizerSettings(bits=32, residency="device", weight_decay=0.0, paging_folder=Path())
        self.optimizer = AdapterOptimizer(trainable_parameters(model), settings)
        documents = random_documents(spec.lengths, vocabulary, spec.supervised_share)
        self.micro_batches = [
            make_micro_batch([documents[place] for place in places], seed=0, step=0, packing=True)
            for places in cut(spec.lengths, spec.micro_batch_tokens)
        ]
        self.num_supervised_tokens = sum(document.num_supervised_tokens for document in documents)

    def run(self) -> float:
        """What `run.attempts` does for a global batch, in its order; returns the seconds it took."""
        start = time.perf_counter()
        self.optimizer.zero_gradients()
        loss = accumulate_gradients(
            self.model,
            self.micro_batches,
            num_supervised_tokens=self.num_supervised_tokens,
            loss_chunk_tokens=self.spec.loss_chunk_tokens,
        )
        loss_and_norm = torch.stack((loss, self.optimizer.clip_gradients(MAX_GRAD_NORM)))
        self.optimizer.update(LEARNING_RATE, loss_and_norm)  # which changes nothing where one of the two is not finite
        found = loss_and_norm.tolist()
        seconds = time.perf_counter() - start
        assert all(0.0 < number < math.inf for number in found), found
        return seconds


def random_documents(lengths: tuple[int, ...], vocabulary: int, supervised_share: float) -> list[Document]:
    """Of random tokens, the last ones supervised."""
    generator = np.random.default_rng(0)
    documents = []
    for index, length in enumerate(lengths):
        ids_T = generator.integers(0, vocabulary, length).astype(np.int32)
        labels_T = ids_T.astype(np.int32)
        labels_T[: round((1 - supervised_share) * length)] = IGNORE_INDEX
        documents.append(Document(index, ids_T, labels_T))
    return documents


def measure(spec: StepSpec) -> dict[str, Any]:
    """Seconds of real steps and of their products alone, round by round."""
    torch.set_num_threads(num_cpu_threads())  # as a run does
    base = resolve_base(spec.model)
    cache = prepare_nf4_cache(base, double_quant=True)
    dtype = choose_compute_dtype(CPU) if spec.dtype == "auto" else spec.dtype
    model = load_quantized(base, cache, compute_dtype=DTYPES[dtype], device=CPU)
    step = RealStep(spec, model, base.config.vocab_size)
    release_free_memory()
    keep_freed_blocks()
    recorder = ProductRecorder()
    with recorder:
        step.run()
    products = recorder.products
    replays = {name: Replay(products, DTYPES[name]) for name in ("float32", "bfloat16")}
    step.run()
    for replay in replays.values():
        replay.run()
    step_seconds: list[float] = []
    floor_seconds: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(spec.rounds):
        step_seconds.append(step.run())
        for name, replay in replays.items():
            floor_seconds[name].append(replay.run())
    return {
        "step_seconds": step_seconds,
        "floor_seconds": floor_seconds,
        "compute_dtype": dtype,
        "gflop": num_flops(products) / 1e9,
        "num_products": len(products),
        "num_tokens": sum(spec.lengths),
        "num_supervised_tokens": step.num_supervised_tokens,
        "num_threads": torch.get_num_threads(),
        "peak_bytes": status_bytes()["peak"],
        "products": told_products(products, replays),
    }


def told_products(products: list[Product], replays: Mapping[str, Replay]) -> list[dict[str, Any]]:
    """The kinds of products that take longest, and how long all of a kind take, each by itself."""
    rows: dict[str, dict[str, Any]] = {}
    for product in products:
        row = rows.setdefault(
            product.name, {"name": product.name, "count": 0, "gflop": 0.0, "seconds": dict.fromkeys(replays, 0.0)}
        )
        row["count"] += 1
        row["gflop"] += product.flops / 1e9
        for dtype, replay in replays.items():
            row["seconds"][dtype] += replay.seconds_of[in_any_dtype(product)]
    return sorted(rows.values(), key=lambda row: -min(row["seconds"].values()))[:NUM_TOLD]


def main() -> None:
    spec_path, result = map(Path, sys.argv[1:])
    told = json.loads(spec_path.read_text())
    result.write_text(json.dumps(measure(StepSpec(**told | {"lengths": tuple(told["lengths"])}))))


if __name__ == "__main__":
    main()

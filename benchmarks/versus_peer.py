"""One run of TRL's `SFTTrainer` for `versus_trl.py`, in a process of its own.

    python -m benchmarks.versus_peer SPEC.json RESULT.json

Nothing of ours is imported. The result is written anew after each step, so that whoever loses patience has something.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.plan_accuracy_run import status_bytes

# The same on both sides.
LEARNING_RATE, SCHEDULE, WARMUP_RATIO, WEIGHT_DECAY, MAX_GRAD_NORM = 2e-4, "cosine", 0.03, 0.0, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSpec:
    """A run.

    Attributes:
        cache_folder: NF4 weights that transformers loads.
        tokenizer_folder: of the base.
        rows: JSON Lines of prompts and completions, in order; one pass over them.
        initial_adapter: a PEFT folder to begin with.
        adapter: where the adapter is saved; "" for nowhere.
        seed: of sampling.
        max_length: as it is called.
        micro_batch, accumulation: rows of a forward pass, and passes of a step.
        batching, is_recomputed, dtype, is_compiled: see `versus_forms.Form`.
    """

    cache_folder: str
    tokenizer_folder: str
    rows: str
    initial_adapter: str
    adapter: str
    seed: int
    max_length: int
    micro_batch: int
    accumulation: int
    batching: str
    is_recomputed: bool
    dtype: str
    is_compiled: bool


def compute_in(model: Any, dtype: Any) -> None:
    """Let bitsandbytes multiply in this dtype; the folder says bf16, far slower on a CPU without bf16 instructions."""
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            module.compute_dtype = weight.quant_state.dtype = dtype


class CountingCollator:
    """The trainer's own, which notes the real tokens of each micro-batch."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate
        self.tokens: list[int] = []

    def __call__(self, features: Any) -> Any:
        batch = self.collate(features)
        mask = batch.get("attention_mask")
        self.tokens.append(batch["input_ids"].numel() if mask is None else int(mask.sum()))
        return batch

    def of_steps(self, num_steps: int, accumulation: int) -> list[int]:
        return [sum(self.tokens[step * accumulation : (step + 1) * accumulation]) for step in range(num_steps)]


def sampling(batching: str) -> str:
    """How the trainer draws: in the given order where it can."""
    return {"plain": "sequential", "grouped": "group_by_length", "packed": "random"}[batching]


def run(spec: PeerSpec, result: Path) -> None:
    """Train, and write what it took."""
    import bitsandbytes  # noqa: F401 -- transformers would import it later, and it is an import
    import torch
    from datasets import Dataset, disable_progress_bars
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    told: dict[str, Any] = {"import_bytes": status_bytes()["resident"], "seconds_of_steps": []}
    disable_progress_bars()
    dtype = getattr(torch, spec.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(spec.cache_folder, dtype=dtype, device_map={"": "cpu"})
    compute_in(model, dtype)
    with open(spec.rows) as lines:
        rows = [json.loads(line) for line in lines]
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())
            tell()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())
            tell()

    def tell() -> None:
        told["seconds_of_steps"] = [later - earlier for earlier, later in itertools.pairwise(marks)]
        told["tokens_of_steps"] = collator.of_steps(len(marks) - 1, spec.accumulation)
        told["peak_bytes"] = status_bytes()["peak"]
        unfinished = result.with_suffix(".tmp")
        unfinished.write_text(json.dumps(told))
        os.replace(unfinished, result)

    trainer: Any = SFTTrainer(
        model=PeftModel.from_pretrained(model, spec.initial_adapter, is_trainable=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(spec.tokenizer_folder),
        callbacks=[Clock()],
        args=SFTConfig(
            output_dir=str(result.parent / "trainer"),
            per_device_train_batch_size=spec.micro_batch,
            gradient_accumulation_steps=spec.accumulation,
            num_train_epochs=1,
            gradient_checkpointing=spec.is_recomputed,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=spec.dtype == "bfloat16",
            use_cpu=True,
            max_length=spec.max_length,
            packing=spec.batching == "packed",
            train_sampling_strategy=sampling(spec.batching),
            torch_compile=spec.is_compiled,
            seed=spec.seed,
            disable_tqdm=True,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type=SCHEDULE,
            warmup_steps=WARMUP_RATIO,  # below 1 a share of the steps
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
        ),
    )
    collator = CountingCollator(trainer.data_collator)
    trainer.data_collator = collator
    trainer.train()
    tell()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    told["losses"], told["is_done"] = losses, True
    told["num_tokens"] = sum(len(ids) for ids in trainer.train_dataset["input_ids"])
    told["adapter_dtype"] = str(next(p.dtype for p in model.parameters() if p.requires_grad)).removeprefix("torch.")
    if spec.adapter:
        trainer.model.save_pretrained(spec.adapter)
    tell()


def main() -> None:
    spec_path, result = map(Path, sys.argv[1:])
    run(PeerSpec(**json.loads(spec_path.read_text())), result)


if __name__ == "__main__":
    main()

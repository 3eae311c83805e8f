"""Checkpoints of a run with a few numbers in it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qlora_trainer.run.checkpoint.save import save_checkpoint
from qlora_trainer.run.checkpoint.storage import LOCAL, Storage
from qlora_trainer.run.records import Saved

FINGERPRINTS = {"tokenizer": "c0ffee", "base": "ba5e"}


def adapter_of(step: int) -> dict[str, Tensor]:
    weight_RI = torch.arange(6, dtype=torch.float32).reshape(2, 3) + step
    return {"q_proj.lora_A": weight_RI.to(torch.bfloat16), "q_proj.lora_B": weight_RI.T}  # one is not contiguous


def optimizer_of(step: int) -> dict[str, Tensor]:
    return {
        "q_proj.lora_A.master": torch.full((2, 3), step + 0.125),
        "q_proj.lora_A.state1": torch.full((256,), step % 256, dtype=torch.uint8),
        "step": torch.tensor(step),
    }


def save(
    folder: Path,
    step: int,
    *,
    storage: Storage = LOCAL,
    keep: int = 3,
    is_best: bool = False,
    best_step: int | None = None,
    run_id: str = "run-1",
) -> Saved:
    return save_checkpoint(
        folder,
        step=step,
        adapter=adapter_of(step),
        optimizer=optimizer_of(step),
        state={"run_id": run_id, "samples_seen": 16 * step, "best_step": step if is_best else best_step},
        fingerprints=FINGERPRINTS,
        keep_checkpoints=keep,
        is_best=is_best,
        storage=storage,
    )

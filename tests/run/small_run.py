"""Checkpoints of a run with a few numbers in it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qlora_trainer.data.order import ORDER_VERSION
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
    order: int = ORDER_VERSION,
) -> Saved:
    return save_checkpoint(
        folder,
        step=step,
        adapter=adapter_of(step),
        optimizer=optimizer_of(step),
        state={
            "run_id": run_id,
            "samples_seen": 16 * step,
            "best_step": step if is_best else best_step,
            "order": order,
        },
        fingerprints=FINGERPRINTS,
        keep_checkpoints=keep,
        is_best=is_best,
        storage=storage,
    )


def state_of_rank_16() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Adapters of SmolLM2-135M at rank 16, 4.9 M parameters in 420 tensors, and their optimizer's 32-bit state."""
    sizes = {
        "q": (576, 576),
        "k": (576, 192),
        "v": (576, 192),
        "o": (576, 576),
        "gate": (576, 1536),
        "down": (1536, 576),
    }
    sizes["up"] = sizes["gate"]
    adapter = {}
    for layer in range(30):
        for name, (num_in, num_out) in sizes.items():
            adapter[f"model.layers.{layer}.{name}_proj.lora_A"] = torch.rand(16, num_in, dtype=torch.bfloat16)
            adapter[f"model.layers.{layer}.{name}_proj.lora_B"] = torch.rand(num_out, 16, dtype=torch.bfloat16)
    parts = ("master", "state1", "state2")
    optimizer = {f"{name}.{part}": torch.rand(tensor.shape) for name, tensor in adapter.items() for part in parts}
    return adapter, optimizer

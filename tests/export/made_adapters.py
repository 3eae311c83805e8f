"""Adapters of every kind, made by PEFT on a tiny base in fp32, as if they had been trained."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from qlora_trainer.step.document import Document
from tests.model.peft_oracle import load_adapter, logits, wrap
from tests.model.tiny_bases import write_base

PATTERNS: dict[str, Any] = {
    "use_rslora": True,
    "rank_pattern": {"o_proj": 2, r"layers\.1\.mlp\.down_proj": 7},
    "alpha_pattern": {"o_proj": 1.5, "down_proj": 11},
}


def base_with_tokenizer(folder: Path, config: PreTrainedConfig, tokenizer_of: Path, **fields: Any) -> Path:
    """A random base, with the tokenizer of another."""
    write_base(folder, config, **fields)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer_of / name, folder / name)
    return folder


def load_base(folder: Path) -> Any:
    """The base as transformers loads it, in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def make_adapter(
    folder: Path, base: Path, *, target_modules: str | list[str] = "all-linear", seed: int = 0, **fields: Any
) -> Any:
    """Save an adapter of rank 3 and alpha 5 whose weights change the result; returns PEFT's model."""
    config = peft.LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": target_modules, "task_type": "CAUSAL_LM"} | fields
    )
    wrapped = wrap(load_base(base), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if not parameter.requires_grad:
            continue
        if "lora_magnitude_vector" in name:
            parameter.data *= 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
        elif ".lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        elif ".modules_to_save." in name or ".trainable_tokens_delta." in name or name.endswith(".bias"):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(folder)
    return wrapped.eval()


@torch.no_grad()
def peft_logits(base: Path, adapter: Path, documents: Sequence[Document]) -> Tensor:
    """fp32 [T, V] of base and adapter, loaded by PEFT."""
    return logits(load_adapter(load_base(base), adapter).eval(), documents)


@torch.no_grad()
def model_logits(folder: Path, documents: Sequence[Document]) -> Tensor:
    """fp32 [T, V] of a transformers folder."""
    return logits(load_base(folder), documents)

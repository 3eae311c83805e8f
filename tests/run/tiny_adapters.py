"""Adapters for the tiny base that nobody had to train."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from qlora_trainer.model.adapters import adapter_shapes
from qlora_trainer.model.base import resolve_base
from qlora_trainer.model.load import load_quantized
from qlora_trainer.model.lora_settings import LoraSettings, select_targets
from qlora_trainer.model.nf4_cache import prepare_nf4_cache
from qlora_trainer.run.export import export_adapter

ALL = LoraSettings(rank=4, alpha=8.0, dropout=0.0, targets=())


def write_adapter(
    folder: Path,
    base: Path,
    *,
    seed: int,
    settings: LoraSettings = ALL,
    target_modules: str | list[str] = "all-linear",
    size: float = 0.3,
    chat_template: str | None = None,
) -> Path:
    """A PEFT folder with random bf16 weights of standard deviation `size`; returns `folder`."""
    resolved = resolve_base(str(base))
    cpu = torch.device("cpu")
    model = load_quantized(
        resolved, prepare_nf4_cache(resolved, double_quant=True), compute_dtype=torch.float32, device=cpu
    )
    names = list(model.linears)
    settings = replace(settings, targets=select_targets(names, target_modules))
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: (size * torch.randn(shape, generator=generator)).bfloat16()
        for name, shape in adapter_shapes(model, settings).items()
    }
    export_adapter(
        folder,
        weights,
        settings,
        linear_names=names,
        base_name=str(base),
        revision=None,
        chat_template=chat_template,
    )
    return folder

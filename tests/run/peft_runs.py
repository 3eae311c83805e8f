"""Runs that begin with adapters of PEFT's: the adapters, the configs, and what must be the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from qlora_trainer.cli.app import main
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.config.yaml_lines import write_yaml
from qlora_trainer.model.base import resolve_base
from qlora_trainer.model.nf4_cache import prepare_nf4_cache
from tests.model.peft_oracle import load_adapter, load_oracle, logits, wrap
from tests.model.tiny_models import tiny_documents
from tests.run.tiny_run import course, run_to_end, run_until_step, tiny_config
from tests.run.told import complaint


def peft_folder(folder: Path, base: Path, *tables: str, **fields: Any) -> Path:
    """An adapter of rank 3, with LoRA on these tables, too, that changes the logits, as PEFT saves it."""
    cache = prepare_nf4_cache(resolve_base(str(base)), double_quant=True)
    asked = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj", *tables], **fields}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **asked)
    wrapped = wrap(load_oracle(cache.folder, torch.float32), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))  # two may be one
    wrapped.save_pretrained(folder)
    return folder


def peft_logits(base: Path, adapter: Path | None) -> Tensor:
    """Of PEFT's adapter, if any, over our cache of the base."""
    oracle = load_oracle(prepare_nf4_cache(resolve_base(str(base)), double_quant=True).folder, torch.float32)
    with torch.no_grad():
        return logits(oracle if adapter is None else load_adapter(oracle, adapter), tiny_documents(20))


def begun_with(tmp_path: Path, base: Path, folder: Path, *options: str) -> RunConfig:
    """As `tiny_config`, but the rank is left open; nothing is learned."""
    config = tiny_config(tmp_path, base, f"lora.init_from={folder}", "training.learning_rate=1e-30", *options)
    section = config.lora.model_copy()
    fields = {key: getattr(section, key) for key in section.model_fields_set - {"rank"}}
    return config.model_copy(update={"lora": type(section).model_validate(fields)})


def require_same_after_a_cut(tmp_path: Path, base: Path, folder: Path, *options: str) -> None:
    """A run that learns, into `whole`, and one that is cut off after a step and resumed, into `cut`: bit for bit."""
    whole, cut = (
        begun_with(tmp_path, base, folder, *options, "training.learning_rate=5e-3", f"output.dir={tmp_path / name}")
        for name in ("whole", "cut")
    )
    run_to_end(whole)
    run_until_step(cut, 1)
    run_to_end(cut, resume="auto")
    assert course(tmp_path / "cut") == course(tmp_path / "whole")


def refusal(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says of a file that has those keys alone which `config` was given."""
    path = Path(config.output.dir).with_suffix(".yaml")
    path.write_text(write_yaml(config.model_dump(mode="json", exclude_unset=True)))
    capsys.readouterr()
    assert main(["train", str(path)]) == 2
    return complaint(capsys)

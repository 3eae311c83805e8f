"""What a plan needs to know of a model: where its layers end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPTBigCodeConfig, OlmoConfig, PreTrainedConfig

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.quantized import QuantizedModel, assemble
from qlora_trainer.planning import dry_model
from qlora_trainer.planning.dry_model import DryModel, build_dry_model
from tests.model.tiny_bases import CONFIGS

SMALL: dict[str, Any] = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


def dry(config: PreTrainedConfig) -> DryModel:
    return build_dry_model(
        config, double_quant=True, compute_dtype=torch.float32, device=torch.device("cpu"), alignment_bytes=1
    )


@pytest.mark.parametrize(
    "config, name",
    [
        (CONFIGS["llama"], "norm"),
        (CONFIGS["phi"], "final_layernorm"),
        (CONFIGS["persimmon"], "final_layernorm"),
        (GPTBigCodeConfig(vocab_size=128, n_embd=64, n_layer=2, n_head=4), "ln_f"),
        (OlmoConfig(**SMALL, num_attention_heads=4, num_key_value_heads=4), "norm"),  # it has no weight
    ],
    ids=["llama", "phi", "persimmon", "gpt-bigcode", "olmo"],
)
def test_the_norm_after_the_layers_is_found_by_its_place(config: PreTrainedConfig, name: str) -> None:
    model = dry(config)
    assert model.final_norm is getattr(model.model.module.base_model, name)


def test_a_model_without_a_norm_after_its_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_norm(*args: Any, **options: Any) -> QuantizedModel:
        model = assemble(*args, **options)
        model.module.base_model.norm = nn.Identity()
        return model

    monkeypatch.setattr(dry_model, "assemble", without_norm)
    with pytest.raises(ConfigError, match="model type 'llama': found no norm after its layers"):
        dry(CONFIGS["llama"])

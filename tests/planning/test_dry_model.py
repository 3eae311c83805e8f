"""What a plan needs to know of a model: where its layers end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPTBigCodeConfig, OlmoConfig, PreTrainedConfig

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.quantized import QuantizedModel, assemble
from qlora_trainer.planning import dry_model
from qlora_trainer.planning.dry_model import DryModel, build_dry_model
from qlora_trainer.planning.shallow_trace import trace_step
from tests.model.tiny_bases import CONFIGS, small_config

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
        return replace(assemble(*args, **options), final_norm=None)

    monkeypatch.setattr(dry_model, "assemble", without_norm)
    with pytest.raises(ConfigError, match="model type 'llama': found no norm after its layers"):
        dry(CONFIGS["llama"])


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
SCALED = {
    "llama": small_config("llama", rope_parameters=DYNAMIC),
    "gemma3": small_config(  # one for each type of layer
        "gemma3",
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": DYNAMIC,
        },
    ),
}


def frequencies(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers() if name.endswith("inv_freq")}


@pytest.mark.parametrize("name", SCALED)
def test_dynamic_rotary_scaling_is_traced(name: str) -> None:
    """Fails, with a DataDependentOutputException, where the trace asks fake positions for the longest of them."""
    model = dry(SCALED[name])
    trace_step(model, LoraSettings(8, 16.0, 0.0, tuple(model.model.linears)), adapter_dtype=torch.bfloat16)


@pytest.mark.parametrize("name", SCALED)
def test_dynamic_rotary_scaling_changes_nothing_within_the_positions(name: str) -> None:
    """What the trace leaves out does nothing in training: transformers' own model, up to its last position.

    Beyond it frequencies do change, so that the comparison can fail.
    """
    config = SCALED[name]
    module = AutoModelForCausalLM.from_config(config)
    before = frequencies(module)
    for num_tokens in (8, config.max_position_embeddings, 8):
        module(input_ids=torch.ones(1, num_tokens, dtype=torch.int64), use_cache=False)
        after = frequencies(module)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    module(input_ids=torch.ones(1, config.max_position_embeddings + 1, dtype=torch.int64), use_cache=False)
    assert any(not torch.equal(before[key], value) for key, value in frequencies(module).items())

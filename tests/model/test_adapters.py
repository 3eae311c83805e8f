"""Which linears get an adapter, and how adapters start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.adapters import attach_adapters, attach_new_adapters, detach_adapters, trainable_parameters
from qlora_trainer.model.lora_settings import LoraSettings, select_targets
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.model.skeleton import build_skeleton, find_parts
from tests.model.peft_oracle import adapter_parameters, wrap
from tests.model.tiny_bases import CONFIGS
from tests.model.tiny_models import (
    attach_random_adapter,
    load_for_training,
    lora_settings,
    packed_logits,
    prepare,
    random_adapter,
    tiny_documents,
)

DOCUMENTS = tiny_documents(20, 9)


@pytest.fixture
def model(tmp_path: Path) -> QuantizedModel:
    return load_for_training(*prepare(tmp_path / "base", CONFIGS["llama"]))


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "gemma3", "phi3"])
@pytest.mark.parametrize(
    "target_modules",
    [
        "all-linear",
        ["o_proj", "down_proj"],
        ["model.layers.1.self_attn.o_proj"],
        ["layers.0.mlp.down_proj", "o_proj"],
        [".down_proj"],
        r".*\.layers\.1\..*(o_proj|down_proj)",
        r"model\.layers\.[01]\.mlp\.down_proj",
    ],
    ids=str,
)
def test_the_same_linears_as_peft(name: str, target_modules: str | list[str]) -> None:
    config = CONFIGS[name]
    linears = find_parts(build_skeleton(config, with_buffers=False)).linears
    dense: Any = AutoModelForCausalLM.from_config(config)
    try:
        wrapped = wrap(dense, peft.LoraConfig(r=2, target_modules=target_modules, task_type="CAUSAL_LM"))
    except ValueError as error:
        assert "not found in the base model" in str(error)
        with pytest.raises(ConfigError, match=r"lora\.target_modules"):
            select_targets(linears, target_modules)
        return
    theirs = {parameter.rpartition(".")[0] for parameter in adapter_parameters(wrapped)}
    assert set(select_targets(linears, target_modules)) == theirs


@pytest.mark.parametrize(
    "target_modules,found",
    [
        (["q_proj", "qproj"], "'qproj', which names no linear"),
        (["lm_head"], "'lm_head', which names no linear"),
        (["proj"], "'proj', which names no linear"),
        (["embed_tokens"], "'embed_tokens', which names no linear"),
        ("q_proj", "'q_proj', which matches no linear"),  # a string is a pattern for the whole name
        ("(", "broken regular expression"),
        ("", "'', which matches no linear"),
    ],
)
def test_targets_that_mean_nothing_are_refused(target_modules: str | list[str], found: str) -> None:
    linears = find_parts(build_skeleton(CONFIGS["llama"], with_buffers=False)).linears
    with pytest.raises(ConfigError) as error:
        select_targets(linears, target_modules)
    assert found in str(error.value)
    assert "down_proj, gate_proj, k_proj" in str(error.value)


def test_a_new_adapter_changes_nothing_yet(model: QuantizedModel) -> None:
    before_TV = packed_logits(model, DOCUMENTS)
    attach_new_adapters(model, lora_settings(model), dtype=torch.float32, seed=0)
    assert torch.equal(packed_logits(model, DOCUMENTS), before_TV)
    attach_random_adapter(model)
    assert not torch.allclose(packed_logits(model, DOCUMENTS), before_TV)
    detach_adapters(model)
    assert torch.equal(packed_logits(model, DOCUMENTS), before_TV)
    assert trainable_parameters(model) == {}


def test_a_new_adapter_is_drawn_as_peft_draws_it(model: QuantizedModel) -> None:
    settings = LoraSettings(rank=64, alpha=16.0, dropout=0.0, targets=tuple(model.linears))
    attach_new_adapters(model, settings, dtype=torch.float32, seed=0)
    for name, parameter in trainable_parameters(model).items():
        if name.endswith("lora_B"):
            assert not parameter.any()
            continue
        bound = parameter.shape[1] ** -0.5  # kaiming_uniform_(a=sqrt(5)), as torch.nn.Linear and PEFT
        assert 0.98 * bound < parameter.abs().max() <= bound
        assert float(parameter.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.05)


def test_a_draw_depends_on_the_seed_and_the_name_alone(model: QuantizedModel) -> None:
    def draw(target_modules: str | list[str], seed: int) -> dict[str, torch.Tensor]:
        attach_new_adapters(model, lora_settings(model, target_modules), dtype=torch.float32, seed=seed)
        return {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}

    everything, some, other = draw("all-linear", 0), draw(["v_proj"], 0), draw("all-linear", 1)
    for name, tensor in some.items():
        assert torch.equal(tensor, everything[name])
    first = "model.layers.0.self_attn.v_proj.lora_A"
    assert not torch.equal(everything[first], other[first])
    assert not torch.equal(everything[first], everything[first.replace("layers.0", "layers.1")])


def test_weights_that_do_not_fit_are_named(model: QuantizedModel) -> None:
    settings = lora_settings(model)
    weights = random_adapter(model, settings, b_size=0.1)
    wrong = dict(weights)
    del wrong["model.layers.0.self_attn.q_proj.lora_A"]
    wrong["model.layers.9.self_attn.q_proj.lora_A"] = torch.zeros(4, 64)
    for layer in (0, 1):
        for leaf in ("up_proj", "down_proj"):
            wrong[f"model.layers.{layer}.mlp.{leaf}.lora_B"] = torch.zeros(7, 4)
    with pytest.raises(ConfigError) as error:
        attach_adapters(model, settings, wrong, dtype=torch.float32)
    message = str(error.value)
    assert "6 weights that do not fit the base" in message
    assert message.count("adapter (7, 4)") == 4
    assert "model.layers.0.self_attn.q_proj.lora_A: adapter has none, base (4, 64)" in message
    assert "layers.9" not in message  # the sixth
    assert "\n" not in message


def test_only_adapters_are_trained(model: QuantizedModel) -> None:
    attach_random_adapter(model)
    trained = {id(parameter) for parameter in trainable_parameters(model).values()}
    assert trained == {id(parameter) for parameter in model.module.parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 14
    assert {parameter.grad_dtype for parameter in trainable_parameters(model).values()} == {torch.float32}

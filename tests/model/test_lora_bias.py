"""A bias of each B, PEFT's `lora_bias`: its gradients and logits, both ways, on linears with and without one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.activation_policy import tile_layers
from qlora_trainer.model.adapter_folder import WEIGHTS_FILE
from qlora_trainer.model.adapters import attach_adapters, initial_weights
from qlora_trainer.model.nf4_cache import NF4Cache
from qlora_trainer.model.trained_vectors import biased_modules
from qlora_trainer.run.export import export_adapter
from tests.model.adapters_in_use import Prepared, prepared_apart, read_for, require_fresh_after_swaps
from tests.model.peft_oracle import (
    PEFT_PREFIX,
    adapter_parameters,
    load_adapter,
    load_oracle,
    logits,
    moved_by_peft,
    oracle_step,
    wrap,
)
from tests.model.tiny_models import (
    load_for_training,
    lora_settings,
    our_step,
    packed_logits,
    random_adapter,
    relative_error,
    tiny_documents,
)

# PEFT takes a bias of B for a shard, and says that it cannot be merged without one of the linear.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter 'default'", "ignore:`lora_bias=True` was passed but")
DOCUMENTS = tiny_documents(33, 21)
TOLERANCE = 1e-5
# Fused halves without any bias; with some, of which those of the base are trained as well; layers that are not fused.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"]}),
    ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only", "use_rslora": True}),
    ("phi", {"target_modules": ["k_proj", "fc1"], "rank_pattern": {"fc1": 2}, "alpha_pattern": {"k_proj": 3}}),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared_apart(tmp_path_factory, ("llama", "qwen2", "phi"))


def peft_logits(cache: NF4Cache, folder: Path) -> Tensor:
    with torch.no_grad():
        return logits(load_adapter(load_oracle(cache.folder, torch.float32), folder), DOCUMENTS)


@pytest.mark.parametrize("name, fields", CASES, ids=str)
def test_logits_and_gradients_are_those_of_peft(
    name: str, fields: dict[str, Any], prepared: Prepared, tmp_path: Path
) -> None:
    """Mutations tried: without the scale in forward; in backward; the linear's own bias left out."""
    base, cache = prepared[name]
    wrapped = moved_by_peft(cache.folder, lora_bias=True, **fields)
    wrapped.save_pretrained(tmp_path / "adapter")
    model = load_for_training(base, cache)
    adapter = read_for(tmp_path / "adapter", model)
    assert adapter.settings.lora_bias
    expected = oracle_step(wrapped, DOCUMENTS).gradients
    for own, parameter in wrapped.named_parameters():
        if own.endswith(".base_layer.bias") and parameter.grad is not None:
            expected[own.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")] = parameter.grad
    found = our_step(model, adapter.settings, adapter.weights, DOCUMENTS).gradients
    assert found.keys() == expected.keys()
    assert sum(key.endswith(".lora_B_bias") for key in found) == len(adapter.settings.targets)
    for key, gradient in expected.items():
        assert relative_error(found[key], gradient) <= TOLERANCE, key
    theirs_TV = peft_logits(cache, tmp_path / "adapter")
    assert relative_error(packed_logits(model, DOCUMENTS), theirs_TV) <= TOLERANCE
    without = {key: own for key, own in adapter.weights.items() if not key.endswith(".lora_B_bias")}
    attach_adapters(model, replace(adapter.settings, lora_bias=False), without, dtype=torch.float32)
    assert relative_error(packed_logits(model, DOCUMENTS), theirs_TV) > 1e-2


@pytest.mark.parametrize("name, fields", CASES, ids=str)
def test_peft_reads_ours_and_gives_our_logits(
    name: str, fields: dict[str, Any], prepared: Prepared, tmp_path: Path
) -> None:
    """Under the names that PEFT itself writes, and with the field without which it passes them over."""
    base, cache = prepared[name]
    moved_by_peft(cache.folder, lora_bias=True, **fields).save_pretrained(tmp_path / "theirs")
    model = load_for_training(base, cache)
    settings = read_for(tmp_path / "theirs", model).settings
    weights = random_adapter(model, settings, b_size=0.1)
    attach_adapters(model, settings, weights, dtype=torch.float32)
    export_adapter(
        tmp_path / "ours",
        weights,
        settings,
        linear_names=list(model.linears),
        base_name=str(base.folder),
        revision=None,
    )
    ours, theirs = (load_file(tmp_path / one / WEIGHTS_FILE) for one in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["lora_bias"] is True
    theirs_TV = peft_logits(cache, tmp_path / "ours")
    assert relative_error(packed_logits(model, DOCUMENTS), theirs_TV) <= TOLERANCE
    again = read_for(tmp_path / "ours", model)
    assert again.settings == settings
    assert all(torch.equal(again.weights[key], weights[key]) for key in weights)


def test_a_new_one_begins_as_that_of_peft(prepared: Prepared) -> None:
    base, cache = prepared["llama"]
    model = load_for_training(base, cache)
    settings = replace(lora_settings(model, ["q_proj"]), lora_bias=True)
    config = peft.LoraConfig(target_modules=["q_proj"], lora_bias=True, task_type="CAUSAL_LM")
    wrapped = wrap(load_oracle(cache.folder, torch.float32), config)
    ours, theirs = initial_weights(model, settings, seed=0), adapter_parameters(wrapped)
    assert ours.keys() == theirs.keys()
    assert all(not own.any() for found in (ours, theirs) for name, own in found.items() if name.endswith("_bias"))


def test_tiles_add_their_gradients_up(prepared: Prepared) -> None:
    base, cache = prepared["llama"]
    found = {}
    for tile_tokens in (0, 16):
        model = load_for_training(base, cache)
        settings = replace(lora_settings(model, ["v_proj", "o_proj", "up_proj"]), lora_bias=True)
        weights = random_adapter(model, settings, b_size=0.1)
        tile_layers(model, tile_tokens)
        found[tile_tokens] = our_step(model, settings, weights, DOCUMENTS).gradients
    assert all(relative_error(found[16][name], found[0][name]) <= TOLERANCE for name in found[0])


def test_each_adapter_of_a_set_has_its_own(prepared: Prepared) -> None:
    """Beside a trained bias of the linear, and none once it is gone."""
    base, cache = prepared["qwen2"]
    model = load_for_training(base, cache)
    plain = lora_settings(model, ["q_proj", "o_proj"])
    of_b = replace(plain, lora_bias=True)
    both = replace(of_b, biases=biased_modules(model)[:2])
    require_fresh_after_swaps(base, cache, {"plain": plain, "of-B": of_b, "both": both}, DOCUMENTS)


def test_what_peft_refuses_or_passes_over_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    """A config of both is none of PEFT's; weights that the config does not name, PEFT leaves out without a word."""
    with pytest.raises(ValueError, match="lora_bias=True is not supported for DoRA"):
        peft.LoraConfig(use_dora=True, lora_bias=True)
    base, cache = prepared["llama"]
    moved_by_peft(cache.folder, lora_bias=True).save_pretrained(tmp_path / "adapter")
    model = load_for_training(base, cache)
    config = tmp_path / "adapter" / "adapter_config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"use_dora": True}))
    with pytest.raises(ConfigError, match=r"lora_bias and use_dora, of which PEFT's LoraConfig refuses to be both"):
        read_for(tmp_path / "adapter", model)
    config.write_text(json.dumps(fields | {"lora_bias": False}))
    with pytest.raises(ConfigError, match=r"q_proj\.lora_B\.bias, and no lora_bias in adapter_config\.json"):
        read_for(tmp_path / "adapter", model)
    config.write_text(json.dumps(fields))
    path = tmp_path / "adapter" / WEIGHTS_FILE
    tensors = load_file(path)
    save_file({key: own for key, own in tensors.items() if "layers.1.self_attn.q_proj.lora_B.b" not in key}, path)
    adapter = read_for(tmp_path / "adapter", model)
    with pytest.raises(ConfigError, match=r"layers\.1\.self_attn\.q_proj\.lora_B_bias: adapter has none, base \(64,\)"):
        attach_adapters(model, adapter.settings, adapter.weights, dtype=torch.float32)
    head = "base_model.model.lm_head.lora_B.bias"
    save_file(tensors | {head: torch.ones(128)}, path)
    with pytest.raises(ConfigError, match=r"found lora_B\.bias of lm_head; expected nothing"):
        read_for(tmp_path / "adapter", model)

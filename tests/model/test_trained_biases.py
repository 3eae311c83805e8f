"""Biases of the base that an adapter has trained: PEFT's gradients and logits, in both directions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.activation_policy import tile_layers
from qlora_trainer.model.adapter_biases import asked_biases
from qlora_trainer.model.adapter_folder import WEIGHTS_FILE
from qlora_trainer.model.adapter_set import AdapterSet
from qlora_trainer.model.adapters import attach_adapters
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.model.trained_vectors import biased_modules, require_trainable_biases, vector_weights
from qlora_trainer.run.export import export_adapter
from tests.model.adapters_in_use import Prepared, prepared_apart, read_for, require_fresh_after_swaps
from tests.model.peft_oracle import PEFT_PREFIX, load_adapter, load_oracle, logits, moved_by_peft, oracle_step
from tests.model.tiny_models import (
    load_for_training,
    our_step,
    packed_logits,
    random_adapter,
    relative_error,
    tiny_documents,
)

DOCUMENTS = tiny_documents(33, 21)
TOLERANCE = 1e-5
# Fused halves with a bias everywhere; q, k and v alone; and layers that are not fused.
BASES = ("llama-biases", "qwen2", "phi", "persimmon")
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama-biases", {"bias": "all"}),
    ("llama-biases", {"bias": "lora_only", "use_dora": True}),
    ("llama-biases", {"bias": "all", "layers_to_transform": [1]}),  # a whole layer without an adapter
    ("qwen2", {"bias": "all"}),
    ("qwen2", {"bias": "lora_only"}),
    ("phi", {"bias": "lora_only"}),
    ("phi", {"bias": "all"}),  # of norms and of the head as well
    ("persimmon", {"bias": "all", "target_modules": ["dense"], "layers_to_transform": [1]}),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared_apart(tmp_path_factory, BASES)


def bias_gradients(wrapped: Any) -> dict[str, Tensor]:
    return {
        name.removeprefix(PEFT_PREFIX).replace(".base_layer.", "."): parameter.grad
        for name, parameter in wrapped.named_parameters()
        if name.endswith(".bias") and parameter.grad is not None
    }


@pytest.mark.parametrize("name, fields", CASES, ids=str)
def test_logits_and_gradients_are_those_of_peft(
    name: str, fields: dict[str, Any], prepared: Prepared, tmp_path: Path
) -> None:
    """Mutations tried: no gradient where a linear has no adapter; the biases of the base."""
    base, cache = prepared[name]
    wrapped = moved_by_peft(cache.folder, **fields)
    wrapped.save_pretrained(tmp_path / "adapter")
    model = load_for_training(base, cache)
    without_TV = packed_logits(model, DOCUMENTS)
    adapter = read_for(tmp_path / "adapter", model)
    expected = oracle_step(wrapped, DOCUMENTS)
    expected_biases = bias_gradients(wrapped)
    assert {f"{own}.bias" for own in adapter.settings.biases} == expected_biases.keys()
    found = our_step(model, adapter.settings, adapter.weights, DOCUMENTS)
    assert found.gradients.keys() == expected.gradients.keys() | expected_biases.keys()
    for key, gradient in {**expected.gradients, **expected_biases}.items():
        assert relative_error(found.gradients[key], gradient) <= TOLERANCE, key
    with torch.no_grad():
        theirs_TV = logits(load_adapter(load_oracle(cache.folder, torch.float32), tmp_path / "adapter"), DOCUMENTS)
    assert relative_error(packed_logits(model, DOCUMENTS), theirs_TV) <= TOLERANCE
    plain = {key: own for key, own in adapter.weights.items() if not key.endswith(".bias")}
    other = load_for_training(base, cache)
    attach_adapters(other, replace(adapter.settings, biases=()), plain, dtype=torch.float32)
    assert relative_error(packed_logits(other, DOCUMENTS), theirs_TV) > 1e-3  # the biases do something
    assert relative_error(without_TV, theirs_TV) > 1e-2


@pytest.mark.parametrize(
    "name, fields",
    [("qwen2", {"bias": "lora_only"}), ("llama-biases", {"bias": "all"}), ("phi", {"bias": "all"})],
    ids=str,
)
def test_peft_reads_ours_and_gives_our_logits(
    name: str, fields: dict[str, Any], prepared: Prepared, tmp_path: Path
) -> None:
    """Under the names that PEFT itself writes, and with the field that lets it train on."""
    base, cache = prepared[name]
    moved_by_peft(cache.folder, **fields).save_pretrained(tmp_path / "theirs")
    model = load_for_training(base, cache)
    settings = read_for(tmp_path / "theirs", model).settings
    weights = random_adapter(model, settings, b_size=0.1)
    attach_adapters(model, settings, weights, dtype=torch.float32)
    linears = list(model.linears)
    export_adapter(
        tmp_path / "ours", weights, settings, linear_names=linears, base_name=str(base.folder), revision=None
    )
    ours, theirs = (load_file(tmp_path / one / WEIGHTS_FILE) for one in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["bias"] == fields["bias"]
    with torch.no_grad():
        theirs_TV = logits(load_adapter(load_oracle(cache.folder, torch.float32), tmp_path / "ours"), DOCUMENTS)
    assert relative_error(packed_logits(model, DOCUMENTS), theirs_TV) <= TOLERANCE
    again = read_for(tmp_path / "ours", model)
    assert again.settings == settings
    assert all(torch.equal(again.weights[key], weights[key]) for key in weights)


def test_the_file_decides_and_an_older_peft_named_them_otherwise(prepared: Prepared, tmp_path: Path) -> None:
    """PEFT loads the biases of a file whatever `bias` says."""
    base, cache = prepared["qwen2"]
    moved_by_peft(cache.folder, bias="lora_only").save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bias": "none"}))
    with torch.no_grad():
        theirs_TV = logits(load_adapter(load_oracle(cache.folder, torch.float32), tmp_path / "adapter"), DOCUMENTS)
    tensors = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    for renamed in (False, True):
        if renamed:
            tensors = {name.replace(".base_layer.bias", ".bias"): own for name, own in tensors.items()}
            save_file(tensors, tmp_path / "adapter" / WEIGHTS_FILE)
        model = load_for_training(base, cache)
        adapter = read_for(tmp_path / "adapter", model)
        attach_adapters(model, adapter.settings, adapter.weights, dtype=torch.float32)
        assert relative_error(packed_logits(model, DOCUMENTS), theirs_TV) <= TOLERANCE


def test_a_whole_head_with_a_bias_is_written_three_times(prepared: Prepared, tmp_path: Path) -> None:
    """By PEFT: the table's own bias, its wrapper's copy, and the base's, with which nothing is computed."""
    base, cache = prepared["phi"]
    whole = {"modules_to_save": ["lm_head"], "bias": "all", "target_modules": ["q_proj"]}
    moved_by_peft(cache.folder, **whole).save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    assert len([name for name in tensors if "lm_head" in name and name.endswith("bias")]) == 3
    with torch.no_grad():
        theirs_TV = logits(load_adapter(load_oracle(cache.folder, torch.float32), tmp_path / "adapter"), DOCUMENTS)
    model = load_for_training(base, cache)
    adapter = read_for(tmp_path / "adapter", model)
    attach_adapters(model, adapter.settings, adapter.weights, dtype=torch.float32)
    assert relative_error(packed_logits(model, DOCUMENTS), theirs_TV) <= TOLERANCE
    copy = next(name for name in tensors if name.endswith("modules_to_save.bias"))
    save_file(tensors | {copy: tensors[copy] + 1}, tmp_path / "adapter" / WEIGHTS_FILE)
    with pytest.raises(ConfigError, match=r"lm_head\.bias and lm_head\.modules_to_save\.bias, which differ"):
        read_for(tmp_path / "adapter", model)


@pytest.mark.parametrize("name_of_base", ["qwen2", "phi"])
def test_each_adapter_of_a_set_has_its_own(name_of_base: str, prepared: Prepared) -> None:
    base, cache = prepared[name_of_base]
    plain = LoraSettings(rank=2, alpha=4.0, dropout=0.0, targets=("model.layers.0.self_attn.q_proj",))
    biased = biased_modules(load_for_training(base, cache))
    settings = {
        "plain": plain,
        "biases": replace(plain, biases=biased[1:]),
        "others": replace(plain, biases=biased[2:]),
    }
    require_fresh_after_swaps(base, cache, settings, DOCUMENTS)


def test_a_bias_of_what_has_none_here_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    base, cache = prepared["qwen2"]
    moved_by_peft(cache.folder).save_pretrained(tmp_path / "other")
    path = tmp_path / "other" / WEIGHTS_FILE
    extra = {"base_model.model.model.layers.0.mlp.up_proj.bias": torch.ones(96)}
    save_file(load_file(path) | extra, path)
    model = load_for_training(base, cache)
    adapter = read_for(tmp_path / "other", model)
    with pytest.raises(ConfigError, match=r"1 weights .*up_proj\.bias: adapter \(96,\), base has none"):
        attach_adapters(model, adapter.settings, adapter.weights, dtype=torch.float32)
    twice = {
        f"base_model.model.model.layers.0.self_attn.q_proj{own}.bias": torch.ones(64) for own in ("", ".base_layer")
    }
    save_file(load_file(path) | twice, path)
    with pytest.raises(ConfigError, match=r"q_proj\.bias twice"):
        read_for(tmp_path / "other", model)


def test_only_what_has_one_can_be_asked_for() -> None:
    assert asked_biases("none", targets=["a"], biased=()) == ()
    assert asked_biases("lora_only", targets=["a", "c"], biased=("a", "b")) == ("a",)
    assert asked_biases("all", targets=["c"], biased=("a", "b")) == ("a", "b")
    with pytest.raises(ConfigError, match=r"lora\.bias: found lora_only, and no linear of lora\.target_modules with a"):
        asked_biases("lora_only", targets=["c"], biased=("a",))
    with pytest.raises(ConfigError, match="all, and no module of this base with a bias"):
        asked_biases("all", targets=["c"], biased=())


@pytest.mark.parametrize("name, targets", [("llama-biases", "up_proj"), ("phi", "fc1"), ("phi", None)])
def test_tiles_add_their_gradients_up(name: str, targets: str | None, prepared: Prepared) -> None:
    """Of layers with and without an adapter; of the last norm, which the loss takes in tiles, and of biases alone."""
    base, cache = prepared[name]
    found = {}
    for tile_tokens in (0, 16):
        model = load_for_training(base, cache)
        chosen = LoraSettings(rank=2, alpha=4.0, dropout=0.0, targets=())
        chosen = replace(chosen, biases=biased_modules(model))
        if targets is not None:
            chosen = replace(chosen, targets=(f"model.layers.1.mlp.{targets}",))
        weights = random_adapter(model, chosen, b_size=0.1)
        tile_layers(model, tile_tokens)
        found[tile_tokens] = our_step(model, chosen, weights, DOCUMENTS).gradients
    assert found[0].keys() == found[16].keys()
    assert ("model.final_layernorm.bias" in found[0]) == (name == "phi")
    assert all(relative_error(found[16][name], found[0][name]) <= TOLERANCE for name in found[0])


def test_a_bias_of_a_norm_is_added_in_the_dtype_that_is_normed(prepared: Prepared) -> None:
    """In fp32 while it is trained, also where 16 bits are computed in: torch's LayerNorm takes one dtype only."""
    base, cache = prepared["phi"]
    model = load_for_training(base, cache, torch.bfloat16)
    settings = LoraSettings(rank=2, alpha=4.0, dropout=0.0, targets=(), biases=biased_modules(model))
    before_TV = packed_logits(model, DOCUMENTS)
    gradients = our_step(model, settings, vector_weights(model, settings) | head_bias(model), DOCUMENTS).gradients
    norms = [name for name in gradients if "layernorm" in name]
    assert len(norms) == 3
    assert all(gradients[name].dtype == torch.float32 and gradients[name].any() for name in norms)
    assert torch.equal(packed_logits(model, DOCUMENTS), before_TV)


def head_bias(model: QuantizedModel) -> dict[str, Tensor]:
    assert model.head.bias is not None
    return {"lm_head.bias": model.head.bias.detach()}


class Gate(nn.Module):
    """Computes with a bias in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4))


def test_a_set_refuses_a_bias_of_neither_linear_nor_norm_by_name(prepared: Prepared, tmp_path: Path) -> None:
    base, cache = prepared["phi"]
    moved_by_peft(cache.folder, bias="all").save_pretrained(tmp_path / "adapter")
    model = load_for_training(base, cache)
    adapter = read_for(tmp_path / "adapter", model)
    model.module.get_submodule("model.layers.0.input_layernorm").__class__ = Gate
    with pytest.raises(ConfigError, match=r"^adapter own: found that of model\.layers\.0\.input_layernorm, a Gate; "):
        AdapterSet(model).add("own", adapter)


def test_a_module_that_computes_with_its_bias_in_its_own_way_is_refused() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), Gate(), nn.LayerNorm(4))
    settings = LoraSettings(rank=2, alpha=4.0, dropout=0.0, targets=(), biases=("0", "1"))
    with pytest.raises(ConfigError, match=r"that of 1, a Gate; .*lora\.bias at none or lora_only"):
        require_trainable_biases(model, settings)
    require_trainable_biases(model, replace(settings, biases=("0", "2", "3")))

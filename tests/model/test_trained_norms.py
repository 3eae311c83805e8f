"""Norms that an adapter has trained whole, PEFT's `modules_to_save`: its gradients and logits, in both directions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import NemotronConfig, StableLmConfig

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.activation_policy import tile_layers
from qlora_trainer.model.adapter_folder import WEIGHTS_FILE
from qlora_trainer.model.adapters import attach_adapters
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.model.table_names import asked_norms, asked_tables
from qlora_trainer.model.trained_tables import base_tables_of
from qlora_trainer.model.trained_vectors import vector_weights
from qlora_trainer.run.export import export_adapter
from tests.model.adapters_in_use import Prepared, prepared_apart, read_for, require_fresh_after_swaps
from tests.model.peft_oracle import PEFT_PREFIX, load_adapter, load_oracle, logits, moved_by_peft, oracle_step
from tests.model.tiny_models import (
    load_for_training,
    our_step,
    packed_logits,
    prepare_apart,
    random_adapter,
    relative_error,
    tiny_documents,
)

DOCUMENTS = tiny_documents(33, 21)
TOLERANCE = 1e-5
OF_LAYERS = ["input_layernorm", "post_attention_layernorm"]
_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
NEMOTRON = NemotronConfig(**_SIZES)  # norms with a bias, which add one to their weight
# Each head has a norm of its own, which PEFT copies in one module.
STABLELM = StableLmConfig(**_SIZES, qk_layernorm=True)
OTHERS = {"nemotron": NEMOTRON, "stablelm": STABLELM}
# Fused halves, with norms of heads and with an offset; layers that are not fused; norms with a bias.
BASES = ("llama", "qwen3", "gemma", "gemma2", "phi", "persimmon", "olmo3")
# Base, what PEFT is asked for, and how many norms that means.
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("llama", {"modules_to_save": [*OF_LAYERS, "model.norm"]}, 5),
    ("llama", {"modules_to_save": ["layers.1.input_layernorm"], "layers_to_transform": [0], "use_dora": True}, 1),
    ("llama", {"modules_to_save": ["norm"], "target_modules": "dummy-target-modules"}, 5),
    ("llama", {"modules_to_save": ["norm", "lm_head", "embed_tokens"], "use_rslora": True}, 5),
    ("qwen3", {"modules_to_save": ["norm"]}, 9),  # which is the end of q_norm, too
    ("qwen3", {"modules_to_save": ["k_norm"], "target_modules": ["down_proj"]}, 2),
    ("gemma", {"modules_to_save": OF_LAYERS}, 4),
    ("gemma2", {"modules_to_save": ["norm"], "target_modules": "all-linear"}, 9),
    ("phi", {"modules_to_save": ["layernorm"], "bias": "all"}, 3),
    ("phi", {"modules_to_save": ["final_layernorm"]}, 1),
    ("persimmon", {"modules_to_save": ["layernorm"], "target_modules": ["dense"], "bias": "lora_only"}, 9),
    ("olmo3", {"modules_to_save": ["norm"]}, 9),
    ("nemotron", {"modules_to_save": ["norm"], "bias": "none"}, 5),
    ("nemotron", {"bias": "all"}, 0),
    ("stablelm", {"modules_to_save": ["norm"]}, 17),  # of two layers, and of six heads in each
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    others = {name: prepare_apart(tmp_path_factory.mktemp(name), config) for name, config in OTHERS.items()}
    return {**prepared_apart(tmp_path_factory, BASES), **others}


def vector_gradients(wrapped: Any) -> dict[str, Tensor]:
    """Of norms that PEFT has copied, and of biases that it has not."""
    found = {}
    for name, parameter in wrapped.named_parameters():
        if parameter.grad is not None and ".original_module." not in name:
            ours = name.removeprefix(PEFT_PREFIX).replace(".modules_to_save.default", "").replace(".base_layer.", ".")
            found[ours] = parameter.grad
    return {name: own for name, own in found.items() if ".lora_" not in name}


def norms_of(model: QuantizedModel, *entries: str) -> LoraSettings:
    norms = asked_norms(entries, base_tables_of(model))
    return LoraSettings(rank=2, alpha=4.0, dropout=0.0, targets=("model.layers.0.self_attn.q_proj",), norms=norms)


@pytest.mark.parametrize("name, fields, num_norms", CASES, ids=str)
def test_logits_and_gradients_are_those_of_peft(
    name: str, fields: dict[str, Any], num_norms: int, prepared: Prepared, tmp_path: Path
) -> None:
    """Mutations tried: no gradient where the layer's input needs none; that of the first document only."""
    base, cache = prepared[name]
    documents = DOCUMENTS if base.can_pack else DOCUMENTS[:1]
    wrapped = moved_by_peft(cache.folder, **fields)
    wrapped.save_pretrained(tmp_path / "adapter")
    model = load_for_training(base, cache)
    without_TV = packed_logits(model, documents)
    adapter = read_for(tmp_path / "adapter", model)
    assert len(adapter.settings.norms) == num_norms
    expected = oracle_step(wrapped, documents).gradients | vector_gradients(wrapped)
    found = our_step(model, adapter.settings, adapter.weights, documents)
    assert found.gradients.keys() == expected.keys()
    for key, gradient in expected.items():
        assert relative_error(found.gradients[key], gradient) <= TOLERANCE, key
    with torch.no_grad():
        theirs_TV = logits(load_adapter(load_oracle(cache.folder, torch.float32), tmp_path / "adapter"), documents)
    assert relative_error(packed_logits(model, documents), theirs_TV) <= TOLERANCE
    assert relative_error(without_TV, theirs_TV) > 1e-3


@pytest.mark.parametrize("name, fields, num_norms", [CASES[0], CASES[3], CASES[4], CASES[8], CASES[10]], ids=str)
def test_peft_reads_ours_and_gives_our_logits(
    name: str, fields: dict[str, Any], num_norms: int, prepared: Prepared, tmp_path: Path
) -> None:
    """By full names: "norm" alone would be the end of others."""
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
    with torch.no_grad():
        theirs_TV = logits(load_adapter(load_oracle(cache.folder, torch.float32), tmp_path / "ours"), DOCUMENTS)
    assert relative_error(packed_logits(model, DOCUMENTS), theirs_TV) <= TOLERANCE
    again = read_for(tmp_path / "ours", model)
    assert again.settings == settings
    assert all(torch.equal(again.weights[key], weights[key]) for key in weights)
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["modules_to_save"]
    assert len([entry for entry in written if entry.endswith("norm")]) == num_norms
    assert not [name for name in load_file(tmp_path / "ours" / WEIGHTS_FILE) if "modules_to_save" in name]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi"])
@pytest.mark.parametrize("is_last_alone", [False, True])
def test_tiles_add_their_gradients_up(name: str, is_last_alone: bool, prepared: Prepared) -> None:
    """Of the last norm, too, which the loss takes in tiles, and which alone leaves all layers without a gradient."""
    base, cache = prepared[name]
    found = {}
    for tile_tokens in (0, 16):
        model = load_for_training(base, cache)
        norms = base_tables_of(model).norms
        settings = LoraSettings(rank=2, alpha=4.0, dropout=0.0, targets=(), norms=norms[-is_last_alone:])
        tile_layers(model, tile_tokens)
        found[tile_tokens] = our_step(model, settings, random_adapter(model, settings, b_size=0.1), DOCUMENTS).gradients
    assert found[0].keys() == found[16].keys()
    assert all(relative_error(found[16][own], found[0][own]) <= TOLERANCE for own in found[0])
    assert all(gradient.any() for gradient in found[0].values())


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi", "persimmon"])
def test_in_16_bits_they_are_fp32_and_rounded_where_they_are_used(name: str, prepared: Prepared) -> None:
    base, cache = prepared[name]
    model = load_for_training(base, cache, torch.bfloat16)
    settings = replace(norms_of(model), targets=(), norms=base_tables_of(model).norms)
    before_TV = packed_logits(model, DOCUMENTS)
    gradients = our_step(model, settings, vector_weights(model, settings), DOCUMENTS).gradients
    assert {own.rpartition(".")[0] for own in gradients} == set(settings.norms)
    assert all(own.dtype == torch.float32 and own.any() for own in gradients.values())
    assert torch.equal(packed_logits(model, DOCUMENTS), before_TV)
    exact = load_for_training(base, cache)
    expected = our_step(exact, settings, vector_weights(exact, settings), DOCUMENTS).gradients
    assert all(relative_error(gradients[own], expected[own]) < 0.1 for own in expected)


@pytest.mark.parametrize("name_of_base", ["qwen3", "phi"])
def test_each_adapter_of_a_set_has_its_own(name_of_base: str, prepared: Prepared) -> None:
    base, cache = prepared[name_of_base]
    model = load_for_training(base, cache)
    asked = {"plain": (), "norms": ("input_layernorm",), "others": ("norm", "final_layernorm", "input_layernorm")}
    settings = {name: norms_of(model, *entries) for name, entries in asked.items()}
    require_fresh_after_swaps(base, cache, settings, DOCUMENTS)


def test_a_config_names_them_by_their_ends_after_a_dot(prepared: Prepared) -> None:
    """Where PEFT takes any end."""
    tables = base_tables_of(load_for_training(*prepared["llama"]))
    assert asked_norms(["norm"], tables) == ("model.norm",)
    assert asked_norms(["input_layernorm", "lm_head"], tables) == tuple(
        f"model.layers.{index}.input_layernorm" for index in range(2)
    )
    assert asked_tables(["norm", "lm_head"], tables) == (("lm_head",), None)
    with pytest.raises(ConfigError, match=r"'layernorm', which names no embedding.* lm_head, input_layernorm, post_at"):
        asked_tables(["layernorm"], tables)


@pytest.mark.parametrize("entry", ["mlp", "q_proj", ""])
def test_what_else_peft_may_train_whole_is_refused(entry: str, prepared: Prepared, tmp_path: Path) -> None:
    base, cache = prepared["llama"]
    moved_by_peft(cache.folder).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": [entry]}))
    with pytest.raises(ConfigError, match="modules_to_save"):
        read_for(tmp_path / "adapter", load_for_training(base, cache))

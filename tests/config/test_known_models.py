"""The bases that are known by heart have the shapes of the published ones."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qlora_trainer.config.known_models import hub_ids, known_config, known_names, suggest
from qlora_trainer.model.acceptance import require_accepted
from qlora_trainer.model.packaged_base import PACKAGED_BASES

# Of the safetensors metadata on the hub (an embedding that is also the head counts once).
NUM_PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "mistral-7b-v0.2": 7_241_732_096,
    "mistral-7b-v0.1": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "phi-3-mini": 3_821_079_552,
    "tinyllama": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


def config_of(name: str) -> dict[str, Any]:
    config = known_config(name)
    assert config is not None
    return config


def built_config(name: str) -> PreTrainedConfig:
    built: PreTrainedConfig = AutoConfig.for_model(**config_of(name))
    return built


@cache
def model_of(name: str) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(built_config(name))
    return model


def num_lora_parameters(name: str, rank: int, targets: tuple[str, ...] | None) -> int:
    """With adapters on the linears called `targets`, or on all but the head."""
    linears = [
        (path.rpartition(".")[2], part) for path, part in model_of(name).named_modules() if isinstance(part, nn.Linear)
    ]
    return sum(
        rank * (part.in_features + part.out_features)
        for leaf, part in linears
        if (leaf in targets if targets else leaf != "lm_head")
    )


def test_every_known_base_is_counted() -> None:
    assert set(known_names()) == set(NUM_PARAMETERS)


@pytest.mark.parametrize("name", known_names())
def test_a_known_base_has_as_many_parameters_as_the_published_one(name: str) -> None:
    model = model_of(name)
    config = config_of(name)

    assert sum(parameter.numel() for parameter in model.parameters()) == NUM_PARAMETERS[name]
    assert [type(model).__name__] == config["architectures"]


@pytest.mark.slow
@pytest.mark.parametrize("name", known_names())
def test_a_known_base_is_one_that_packs(name: str) -> None:
    """So that a plan need not ask it: `read_model_config` takes it for granted."""
    assert require_accepted(built_config(name))


@pytest.mark.parametrize("name", known_names())
def test_transformers_takes_every_field_as_it_is_written(name: str) -> None:
    """A misspelt field would be kept as an attribute that nothing reads."""
    built = built_config(name)
    declared = set(type(built)().to_dict()) | {"rope_theta", "rope_scaling", "torch_dtype", "architectures"}

    assert set(config_of(name)) <= declared
    assert built.rope_parameters["rope_theta"] == config_of(name)["rope_theta"]
    assert str(built.dtype) == f"torch.{config_of(name)['torch_dtype']}"


@pytest.mark.parametrize(
    "name, rank, targets, expected",
    [
        ("llama-2-7b", 8, None, 19_988_480),  # as PEFT's print_trainable_parameters gives them
        ("llama-3.1-8b", 16, ("q_proj", "v_proj"), 6_815_744),
    ],
)
def test_adapters_have_the_published_size(name: str, rank: int, targets: tuple[str, ...] | None, expected: int) -> None:
    assert num_lora_parameters(name, rank, targets) == expected


def test_windows_and_stretched_positions_are_kept() -> None:
    assert built_config("mistral-7b").sliding_window is None
    assert built_config("mistral-7b-v0.1").sliding_window == 4096
    assert built_config("qwen2.5-7b").sliding_window is None
    assert set(built_config("qwen3-8b").layer_types) == {"full_attention"}
    assert built_config("gemma-2-9b").layer_types[:2] == ["sliding_attention", "full_attention"]
    assert built_config("llama-3.1-8b").rope_parameters["rope_type"] == "llama3"
    assert built_config("llama-3.2-1b").rope_parameters["factor"] == 32.0


@pytest.mark.slow
def test_the_packaged_base_is_the_one_that_is_known() -> None:
    base = PACKAGED_BASES["smollm2-135m"]
    package = find_spec(base.package)
    assert package is not None
    assert package.origin is not None
    packaged = AutoConfig.from_pretrained(Path(package.origin).parent, gguf_file=base.file_name)
    known = built_config("smollm2-135m")

    for field in ("model_type", "vocab_size", "max_position_embeddings", "rope_parameters", "tie_word_embeddings"):
        assert getattr(packaged, field) == getattr(known, field)
    for field in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"):
        assert getattr(packaged, field) == getattr(known, field)


@pytest.mark.parametrize("name", known_names())
def test_hub_ids_in_any_case_find_the_entry(name: str) -> None:
    positions = "max_position_embeddings"
    assert hub_ids(name)
    assert known_config(hub_ids(name)[0]) == known_config(name)
    for hub_id in hub_ids(name):
        assert known_config(hub_id.upper()) == known_config(hub_id)
        assert config_of(hub_id) | {positions: None} == config_of(name) | {positions: None}


def test_a_hub_id_belongs_to_one_entry() -> None:
    every = [hub_id.lower() for name in known_names() for hub_id in hub_ids(name)]
    assert len(every) == len(set(every))
    assert not set(every) & set(known_names())


@pytest.mark.parametrize(
    "hub_id, positions",
    [
        ("Qwen/Qwen2.5-7B", 131072),
        ("qwen/qwen2.5-7b-instruct", 32768),
        ("Qwen/Qwen3-8B", 40960),
        ("Qwen/Qwen3-8B-Base", 32768),
        ("meta-llama/Llama-3.1-8B-Instruct", 131072),
    ],
)
def test_versions_built_for_other_lengths_keep_their_own(hub_id: str, positions: int) -> None:
    assert config_of(hub_id)["max_position_embeddings"] == positions


@pytest.mark.parametrize("name", ["", "llama", "someone/llama-3.1-8b", "meta-llama/", "llama-3.1-8b/", "./llama-2-7b"])
def test_what_is_not_known_is_none(name: str) -> None:
    assert known_config(name) is None


def test_a_config_is_the_callers_own() -> None:
    first = config_of("llama-3.1-8b")
    first["rope_scaling"]["factor"] = 1.0
    first["architectures"].append("Other")
    first["hidden_size"] = 1

    assert config_of("llama-3.1-8b") == config_of("meta-llama/Llama-3.1-8B")
    assert config_of("llama-3.1-8b")["rope_scaling"]["factor"] == 8.0
    assert config_of("llama-3.1-8b")["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("llama3.1-8b", "llama-3.1-8b"),
        ("Llama-2-7B-hf", "llama-2-7b"),
        ("gemma-9b", "gemma-2-9b"),
        ("mistral", "mistral-7b"),
        ("meta-llama/Llama-3.1-8b-hf", "meta-llama/Llama-3.1-8B"),
        ("qwen/qwen25-7b", "Qwen/Qwen2.5-7B"),
        ("zzzz", None),
        ("", None),
        ("someone/my-finetune", None),
        ("meta-llama/Llama-3.1-8B", None),
        ("LLAMA-3.1-8B", None),
    ],
)
def test_suggestions(name: str, expected: str | None) -> None:
    assert suggest(name) == expected

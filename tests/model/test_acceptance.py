"""Which architectures are accepted, which are refused, and that a wrong computation is seen."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig

from qlora_trainer.errors import ConfigError
from qlora_trainer.hardware.causal_attention import AttentionShape
from qlora_trainer.hardware.memory import process_peak_bytes
from qlora_trainer.model import acceptance, attention, linear, quantized
from qlora_trainer.model.acceptance import SMALL_VOCABULARY, SMALL_WINDOW, require_accepted, shrink
from qlora_trainer.model.frozen import FrozenEmbedding
from qlora_trainer.model.quantized import LogitShape, QuantizedModel
from tests.model.tiny_bases import CONFIGS, small_config

FULL_SIZE = [
    transformers.LlamaConfig,
    transformers.MistralConfig,
    transformers.Ministral3Config,
    transformers.Qwen2Config,
    transformers.Qwen3Config,
    transformers.Gemma2Config,
    transformers.Gemma3TextConfig,
    transformers.Phi3Config,
    transformers.SmolLM3Config,
    transformers.Olmo3Config,
]
REFUSED = [
    (transformers.MixtralConfig, "mixtral", "outside any linear layer"),
    (transformers.Qwen3MoeConfig, "qwen3_moe", "experts"),
    (transformers.Llama4TextConfig, "llama4_text", "experts"),
    (transformers.DeepseekV3Config, "deepseek_v3", "experts"),
    (transformers.GPT2Config, "gpt2", "c_attn.weight"),  # its Conv1D is a linear layer lying the other way round
    (transformers.MambaConfig, "mamba", "outside any linear layer"),
    (transformers.Gemma3Config, "gemma3", "more than a text decoder"),
    (transformers.ViTConfig, "vit", "no causal language model"),
    (transformers.BertConfig, "bert", "losses differ"),  # attends to what comes after
    (transformers.BloomConfig, "bloom", "losses differ"),  # its positions come from a mask over the whole row
    (transformers.BloomConfig, "bloom", "losses differ"),  # keeps our document lengths from its attention
    (transformers.ReformerConfig, "reformer", "no causal language model"),
    (transformers.xLSTMConfig, "xlstm", ""),
    (transformers.OPTConfig, "opt", "does not run"),
]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_small_configs_are_accepted_and_nothing_is_left_of_the_copy(
    config: PreTrainedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers in a circle would wait for Python's collector, beside the base that is loaded next."""
    tried: list[weakref.ref[torch.nn.Module]] = []

    def noted(*args: Any, **options: Any) -> QuantizedModel:
        model = quantized.assemble(*args, **options)
        tried.extend(weakref.ref(module) for module in model.module.modules())
        return model

    monkeypatch.setattr(acceptance, "assemble", noted)
    gc.disable()
    try:
        require_accepted(config)
        assert tried
        assert not [module() for module in tried if module() is not None]
    finally:
        gc.enable()


@pytest.mark.parametrize("config_class", FULL_SIZE)
def test_architectures_at_their_full_size_are_accepted(config_class: type[PreTrainedConfig]) -> None:
    require_accepted(config_class())


@pytest.mark.parametrize("config_class,model_type,reason", REFUSED)
def test_refused_by_name_without_allocating_weights(
    config_class: type[PreTrainedConfig], model_type: str, reason: str
) -> None:
    config = config_class()
    before_bytes = _reset_peak()
    start = time.monotonic()
    with pytest.raises(ConfigError) as refusal:
        require_accepted(config)
    assert time.monotonic() - start < 10.0  # DeepSeek-V3 has 671e9 weights; the skeleton takes under one second
    assert process_peak_bytes() - before_bytes < 2**29
    assert f"'{model_type}'" in str(refusal.value)
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM back to what is resident now
    return process_peak_bytes()


def test_the_config_of_the_caller_is_left_alone() -> None:
    config = small_config("gemma2")
    before = config.to_dict()
    implementation = config._attn_implementation
    require_accepted(config)
    assert config.to_dict() == before
    assert config._attn_implementation == implementation


def test_random_numbers_of_the_caller_are_left_alone() -> None:
    before = torch.random.get_rng_state()
    require_accepted(CONFIGS["llama"])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_weights_that_are_named_otherwise_on_disk_are_refused() -> None:
    """GPT-NeoX's head is `embed_out` in its files and `lm_head` in transformers' model."""
    with pytest.raises(ConfigError, match=r"'gpt_neox': found weights whose files name them otherwise \(\^embed_out"):
        require_accepted(transformers.GPTNeoXConfig())


def _no_window(scale: float, _window: int, softcap: float) -> AttentionShape:
    return AttentionShape(scale, 0, softcap)


def _no_softcap(scale: float, window: int, _softcap: float) -> AttentionShape:
    return AttentionShape(scale, window, 0.0)


def _default_scale(_scale: float, window: int, softcap: float) -> AttentionShape:
    return AttentionShape(1.0, window, softcap)


@pytest.mark.parametrize(
    "config_class,wrong_shape",
    [
        (transformers.Gemma2Config, _no_window),
        (transformers.Gemma2Config, _no_softcap),
        (transformers.Gemma2Config, _default_scale),
        (transformers.MistralConfig, _no_window),
        (transformers.Gemma3TextConfig, _no_window),
        (transformers.Olmo3Config, _no_window),
        (transformers.LlamaConfig, _default_scale),
    ],
)
def test_wrong_attention_is_refused(
    config_class: type[PreTrainedConfig],
    wrong_shape: Callable[[float, int, float], AttentionShape],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_class()
    if wrong_shape is _no_window:
        assert config.sliding_window is not None
    monkeypatch.setattr(attention, "AttentionShape", wrong_shape)
    with pytest.raises(ConfigError, match="losses differ"):
        require_accepted(config)


def test_an_architecture_whose_documents_see_each_other_takes_one_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert require_accepted(transformers.LlamaConfig()) is True
    documents = attention._documents
    monkeypatch.setattr(attention, "_documents", lambda lengths: documents([sum(lengths)]))
    assert require_accepted(transformers.LlamaConfig()) is False


def test_a_missing_logit_cap_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized.LogitShape, "of", classmethod(lambda _cls, _config: LogitShape(1.0, 0.0)))
    with pytest.raises(ConfigError, match="losses differ"):
        require_accepted(transformers.Gemma2Config())


def test_a_missing_embedding_scale_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def unscaled(table: FrozenEmbedding, input_ids: Tensor) -> Tensor:
        return torch.nn.functional.embedding(input_ids, table.weight)

    monkeypatch.setattr(FrozenEmbedding, "forward", unscaled)
    with pytest.raises(ConfigError, match="losses differ"):
        require_accepted(transformers.Gemma3TextConfig())


def test_a_missing_bias_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = linear.NF4Linear.__init__
    monkeypatch.setattr(
        linear.NF4Linear, "__init__", lambda layer, weight, _bias_O, limit: original(layer, weight, None, limit)
    )
    with pytest.raises(ConfigError, match="losses differ"):
        require_accepted(transformers.Qwen2Config())


@pytest.mark.parametrize("config_class", FULL_SIZE)
def test_shrunk_configs_are_small_and_keep_the_head_size(config_class: type[PreTrainedConfig]) -> None:
    config = config_class()
    small = shrink(config)
    assert type(small) is config_class
    assert (small.num_hidden_layers, small.vocab_size, small.intermediate_size) == (2, SMALL_VOCABULARY, 128)
    assert small.num_attention_heads % small.num_key_value_heads == 0
    assert small.num_attention_heads <= 4
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert (getattr(small, "head_dim", None) or small.hidden_size // small.num_attention_heads) == head_dim
    assert getattr(small, "sliding_window", None) in (None, SMALL_WINDOW)


def test_shrinking_keeps_grouped_heads_grouped() -> None:
    grouped = shrink(transformers.LlamaConfig(num_attention_heads=32, num_key_value_heads=8))
    assert (grouped.num_attention_heads, grouped.num_key_value_heads) == (4, 2)
    one_key_head = shrink(transformers.LlamaConfig(num_attention_heads=32, num_key_value_heads=1))
    assert (one_key_head.num_attention_heads, one_key_head.num_key_value_heads) == (2, 1)
    ungrouped = shrink(transformers.LlamaConfig(num_attention_heads=32, num_key_value_heads=32))
    assert (ungrouped.num_attention_heads, ungrouped.num_key_value_heads) == (2, 2)


@pytest.mark.parametrize(
    "config,kinds",
    [
        (transformers.Gemma2Config(), {"layer_types": ["sliding_attention", "full_attention"]}),
        (transformers.Gemma3TextConfig(), {"layer_types": ["sliding_attention", "full_attention"]}),
        (transformers.Olmo3Config(), {"layer_types": ["sliding_attention", "full_attention"]}),
        (transformers.SmolLM3Config(), {"no_rope_layers": [1, 0]}),
        (transformers.Qwen3Config(), {"layer_types": ["full_attention", "full_attention"]}),
    ],
)
def test_shrinking_keeps_one_layer_of_each_kind(config: PreTrainedConfig, kinds: dict[str, list[object]]) -> None:
    small = shrink(config)
    assert {name: list(getattr(small, name)) for name in kinds} == kinds


def test_shrinking_leaves_the_original_alone() -> None:
    config = transformers.Gemma2Config()
    before = config.to_dict()
    shrink(config)
    assert config.to_dict() == before

"""Random bases of every supported architecture, a few thousand weights each, saved as transformers saves them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    Olmo3Config,
    PersimmonConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

VOCABULARY = 128
WINDOW = 12  # shorter than the documents of the tests
# Every out_features is a multiple of 32: other widths take another path in bitsandbytes' CPU kernels.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ONE_OF_EACH = ["sliding_attention", "full_attention"]
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,  # positions beyond it also scale Ministral 3's queries
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SIZES, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "llama-biases": LlamaConfig(**_SIZES, tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**_SIZES, tie_word_embeddings=False, sliding_window=WINDOW),
    "ministral3": Ministral3Config(
        **_SIZES | {"max_position_embeddings": 64}, tie_word_embeddings=True, head_dim=16, rope_parameters=_YARN
    ),
    "qwen2": Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "qwen2-window": Qwen2Config(
        **_SIZES, tie_word_embeddings=False, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**_SIZES, tie_word_embeddings=True, head_dim=32),
    "gemma": GemmaConfig(**_SIZES, head_dim=32, hidden_act="gelu_pytorch_tanh"),
    "gemma2": Gemma2Config(
        **_SIZES,
        head_dim=48,  # queries are as wide as nothing else
        query_pre_attn_scalar=24,  # not the head size, so that a wrong scale shows
        sliding_window=WINDOW,
        layer_types=_ONE_OF_EACH,
        # Low enough that logits and scores of a random model are bent by them.
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": Gemma3TextConfig(
        **_SIZES, head_dim=32, query_pre_attn_scalar=24, sliding_window=WINDOW, layer_types=_ONE_OF_EACH
    ),
    "phi3": Phi3Config(**_SIZES, tie_word_embeddings=False, sliding_window=WINDOW),
    "smollm3": SmolLM3Config(**_SIZES, tie_word_embeddings=True, no_rope_layers=[1, 0]),
    # Their last norm has another name, and their layers are put together otherwise.
    "phi": PhiConfig(**_SIZES, tie_word_embeddings=False),
    "persimmon": PersimmonConfig(**_SIZES, tie_word_embeddings=False),
    "olmo3": Olmo3Config(**_SIZES, tie_word_embeddings=False, sliding_window=WINDOW, layer_types=_ONE_OF_EACH),
}


def small_config(name: str, **changes: Any) -> PreTrainedConfig:
    """A copy of `CONFIGS[name]` with some fields changed."""
    config = copy.deepcopy(CONFIGS[name])
    for field, value in changes.items():
        setattr(config, field, value)
    return config


def write_base(
    folder: Path,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    max_shard_size: str = "60KB",
    change: Callable[[torch.nn.Module], None] | None = None,
) -> Path:
    """Save a random model of `config`, in several shards; returns `folder`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            # Weights start so small that every token gets nearly the same logits, norms at one and biases at zero.
            parameter.data += 0.1 * torch.randn_like(parameter)
    if change is not None:
        change(model)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder

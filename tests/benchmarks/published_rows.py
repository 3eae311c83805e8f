"""A published row of a small model, for the tests of the benchmark against published memory."""

from __future__ import annotations

from typing import Any

CONFIG: dict[str, Any] = {
    "model_type": "mistral",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "tie_word_embeddings": False,
    "sliding_window": 4096,
}
ROW: dict[str, Any] = {
    "id": "small",
    "path": "refs/a100_80gb.csv",
    "config": CONFIG,
    "gpu": "A100-80GB",
    "quant": "nf4",
    "double_quant": True,
    "lora_rank": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "lora_dtype": "float32",
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "kbit_fp32_upcast": False,
    "loss": "transformers_fp32",
    "micro_batch": 2,
    "seq_len": 512,
    "activation_checkpointing": True,
    "optimizer": "adamw_torch",
    "attention": "flash_attention_2",
    "peer_kernels": "stock",
    "static_allocated_gib": 0.02,
    "peak_allocated_gib": 0.04,
    "tokens_per_second": 1000.0,
}

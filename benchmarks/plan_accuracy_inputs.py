"""What `benchmarks.plan_accuracy` trains: configurations, random bases of six architectures, documents of a length."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Fields of transformers' own config classes. Sizes differ on purpose: nothing below was looked at to write the planner.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
        "tie_word_embeddings": False,
    },
    "mistral": {
        "model_type": "mistral",
        "hidden_size": 320,
        "intermediate_size": 896,
        "num_hidden_layers": 4,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "head_dim": 64,
        "sliding_window": 200,
        "vocab_size": 3000,
        "tie_word_embeddings": False,
    },
    "qwen2": {
        "model_type": "qwen2",
        "hidden_size": 448,
        "intermediate_size": 1216,
        "num_hidden_layers": 4,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "vocab_size": 8192,
        "tie_word_embeddings": True,
    },
    "qwen3": {
        "model_type": "qwen3",
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": 5000,
        "tie_word_embeddings": True,
    },
    "gemma2": {
        "model_type": "gemma2",
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "query_pre_attn_scalar": 128,
        "sliding_window": 300,
        "vocab_size": 8000,
        "tie_word_embeddings": True,
    },
    "phi3": {
        "model_type": "phi3",
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 2048,
        "tie_word_embeddings": False,
    },
    "llama-53m": {
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 16384,
        "tie_word_embeddings": False,
    },
    # SmolLM2-135M's sizes, for what a base with one table cannot have.
    "smollm2-untied": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": False,
    },
}
MAX_POSITIONS = 8192
SMOLLM2 = "smollm2-135m"
PROBLEM = (
    "A farmer sells {0} baskets of {1} apples on Monday and {2} fewer on Tuesday. On Monday he sells {0} x {1} apples. "
    "On Tuesday it is {2} fewer than that, so he adds both days and finds the number of apples that were sold. "
)


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration, everything pinned; a micro-batch is `documents` documents of `seq_len` tokens."""

    architecture: str
    seq_len: int
    documents: int
    rank: int
    recompute: bool
    bits: int
    dtype: str
    loss_chunk: int = 256
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        policy = "recompute" if self.recompute else "keep"
        words = (self.architecture, f"{self.documents}x{self.seq_len}", f"r{self.rank}", policy, f"{self.bits}bit")
        told = (option for option in self.options if option not in NO_LEVER.values())
        return " ".join((*words, "fp32" if self.dtype == "float32" else "bf16", *told))

    @property
    def is_mapped(self) -> bool:
        """Whether pages of the mapped base are given back while it runs, which an allocator does not show."""
        return bool({"memory.embedding_residency=host", "memory.base_residency=streamed"} & set(self.options))


def _case(text: str, *options: str) -> Case:
    """Of "llama 4x512 r16 keep 32bit fp32 c128"."""
    architecture, size, rank, policy, bits, dtype, chunk = text.split()
    documents, seq_len = map(int, size.split("x"))
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    number = int(rank.removeprefix("r"))
    return Case(
        architecture, seq_len, documents, number, policy == "recompute", int(bits[:-3]), dtype, int(chunk[1:]), options
    )


# Pinned where a case is about another one: the planner would pull what is faster.
NO_LEVER = {
    key: f"{key}={value}"
    for key, value in (
        ("memory.activation_offload", "false"),
        ("memory.tile_tokens", "0"),
        ("memory.embedding_residency", "device"),
        ("memory.base_residency", "device"),
    )
}


def _lever_case(architecture: str, options: tuple[str, ...]) -> Case:
    """Two documents of 1,024 tokens, all layers recomputed; a head in NF4 on a base that has one of its own."""
    if architecture == SMOLLM2 and "quantization.head=nf4" in options:
        architecture = "smollm2-untied"
    keys = {option.partition("=")[0] for option in options}
    pinned = (option for key, option in NO_LEVER.items() if key not in keys)
    return _case(f"{architecture} 2x1024 r16 recompute 32bit fp32 c256", *pinned, *options)


CASES = (
    _case("llama 4x128 r4 keep 32bit fp32 c64"),
    _case("llama 2x512 r16 recompute 8bit bf16 c256"),
    _case("llama 8x384 r64 keep 8bit fp32 c512"),
    _case("llama 1x4096 r8 recompute 32bit fp32 c1024"),
    _case("llama 3x1000 r32 keep 32bit bf16 c100"),
    _case("mistral 1x128 r16 keep 32bit fp32 c128"),
    _case("mistral 2x1024 r8 keep 8bit bf16 c256"),
    _case("mistral 4x700 r64 recompute 32bit fp32 c512"),
    _case("mistral 1x3000 r4 recompute 8bit fp32 c333"),
    _case("mistral 8x256 r32 keep 32bit fp32 c2048"),
    _case("qwen2 8x128 r8 recompute 32bit fp32 c256"),
    _case("qwen2 1x2048 r16 keep 32bit fp32 c512"),
    _case("qwen2 2x900 r64 keep 8bit bf16 c128"),
    _case("qwen2 1x4096 r4 recompute 8bit fp32 c64"),
    _case("qwen2 5x320 r32 recompute 32bit fp32 c1600"),
    _case("qwen3 1x512 r64 keep 8bit fp32 c512"),
    _case("qwen3 4x640 r16 recompute 32bit bf16 c256"),
    _case("qwen3 2x1536 r8 keep 32bit fp32 c128"),
    _case("qwen3 8x200 r4 keep 8bit fp32 c1024"),
    _case("qwen3 1x4096 r32 recompute 32bit fp32 c256"),
    _case("gemma2 2x256 r16 keep 32bit fp32 c256"),
    _case("gemma2 1x1024 r8 recompute 8bit fp32 c128"),
    _case("gemma2 4x512 r64 recompute 32bit fp32 c512"),
    _case("gemma2 1x2500 r4 recompute 32bit fp32 c512"),
    _case("gemma2 8x128 r32 keep 8bit fp32 c64"),
    _case("phi3 1x256 r32 keep 32bit bf16 c256"),
    _case("phi3 4x400 r8 keep 8bit fp32 c512"),
    _case("phi3 2x2048 r16 recompute 32bit fp32 c512"),
    _case("phi3 8x600 r64 recompute 8bit fp32 c256"),
    _case("phi3 1x3333 r4 keep 32bit fp32 c1000"),
    _case("llama 4x512 r16 recompute 32bit fp32 c256", "data.packing=false"),
    _case("qwen3 2x512 r16 keep 32bit fp32 c256", "quantization.double_quant=false"),
    _case("phi3 2x512 r16 keep 32bit bf16 c256", "lora.dtype=float32"),
    _case("mistral 2x512 r16 keep 8bit fp32 c256", "lora.dropout=0.1"),
    _case(f"{SMOLLM2} 4x512 r16 recompute 32bit fp32 c256"),
    _case(f"{SMOLLM2} 1x2048 r8 recompute 8bit bf16 c512"),
    _case(f"{SMOLLM2} 1x512 r64 keep 32bit fp32 c128"),
    _case("llama 2x1024 r16 recompute 32bit fp32 c256", "memory.activation_offload=true"),
    _case("qwen3 1x4096 r8 recompute 32bit fp32 c256", "memory.activation_offload=3"),
    _case(f"{SMOLLM2} 4x512 r16 recompute 32bit fp32 c256", "memory.activation_offload=true"),
)
# Each lever at three sizes; an optimizer on the host is none on a CPU, where that is the device.
LEVERS = (
    ("memory.activation_offload=true",),
    ("memory.tile_tokens=128",),
    ("memory.embedding_residency=host",),
    ("memory.base_residency=streamed",),
    ("quantization.head=nf4",),
    ("training.optimizer=paged_adamw_32bit",),
    (
        "memory.activation_offload=true",
        "memory.tile_tokens=128",
        "memory.embedding_residency=host",
        "memory.base_residency=streamed",
    ),
)
LEVER_CASES = (
    *(_lever_case(architecture, options) for options in LEVERS for architecture in ("llama", "llama-53m", SMOLLM2)),
)
QUICK = (CASES[0], CASES[12], CASES[21])


def write_base(folder: Path, architecture: str) -> Path:
    """A random base in bf16, with a tokenizer whose tokens are single bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    names = ["<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(names[:2])
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=names[0], eos_token=names[1], pad_token=names[1]
    )
    tokenizer.save_pretrained(folder)
    fields = ARCHITECTURES[architecture] | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = AutoConfig.for_model(**fields, max_position_embeddings=MAX_POSITIONS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def write_documents(path: Path, tokenizer: Any, *, num_tokens: int, count: int) -> list[int]:
    """Texts of that length, or a few tokens less where the tokenizer's tokens are longer than a character.

    Texts and not conversations: a plan is made for documents that are supervised from end to end.

    Returns:
        Their lengths, as the run's own tokenization gives them.
    """
    low, high = 1, 8 * num_tokens
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _lengths(path, tokenizer, middle, 1)[0] <= num_tokens else (low, middle - 1)
    return _lengths(path, tokenizer, low, count)


def _lengths(path: Path, tokenizer: Any, num_characters: int, count: int) -> list[int]:
    from qlora_trainer.data.chat import RowTokenizer
    from qlora_trainer.data.rows import read_rows

    problems = (PROBLEM.format(n % 90 + 10, n * 7 % 90 + 10, n * 3 % 9 + 1) for n in range(num_characters))
    text = ""
    while len(text) < num_characters:
        text += next(problems)
    with path.open("w") as file:
        for number in range(count):
            file.write(json.dumps({"text": f"{number % 10} {text}"[:num_characters]}) + "\n")
    return [row.document.num_tokens for row in RowTokenizer(tokenizer)(read_rows(path))]

"""What a self test trains: a random base of four layers, as large as a device notices, and texts of one length."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

_SPECIAL = ("<|im_start|>", "<|im_end|>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of the base and of a micro-batch.

    Attributes:
        hidden, intermediate, heads, kv_heads, layers, vocabulary: of a Llama.
        seq_len: tokens of each document.
        documents: of a micro-batch.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int
    seq_len: int
    documents: int


def sizes_for(device: torch.device) -> Sizes:
    """Large enough that 2 % of the peak are megabytes, small enough for seconds and for a card of 2 GiB."""
    if device.type == "cuda":
        return Sizes(
            hidden=1024, intermediate=2816, heads=16, kv_heads=4, layers=4, vocabulary=32000, seq_len=512, documents=4
        )
    return Sizes(hidden=256, intermediate=704, heads=8, kv_heads=2, layers=4, vocabulary=4096, seq_len=128, documents=4)


def write_base(folder: Path, sizes: Sizes) -> Path:
    """Random weights in bf16, and a tokenizer whose tokens are single bytes."""
    names = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(_SPECIAL))
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=_SPECIAL[0], eos_token=_SPECIAL[1], pad_token=_SPECIAL[1]
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=4 * sizes.seq_len,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=False,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})  # without a progress bar
    return folder


def write_rows(path: Path, sizes: Sizes) -> Path:
    """Texts that are `seq_len` tokens long between BOS and EOS, as many as two micro-batches hold."""
    with path.open("w") as file:
        for number in range(2 * sizes.documents):
            text = f"{number} " + "the quick brown fox " * sizes.seq_len
            file.write(json.dumps({"text": text[: sizes.seq_len - 2]}) + "\n")
    return path

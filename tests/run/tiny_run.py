"""A whole run in seconds: a random two-layer Llama with a chat tokenizer, sums as data, and configs over them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from qlora_trainer.config.load import load_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.run.loop import train
from qlora_trainer.run.records import Record, StepDone

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
TIMING_KEYS = ("seconds", "tokens_per_second", "peak_bytes")


def write_base(
    folder: Path, *, chat_template: str | None = CHATML, is_tied: bool = True, has_biases: bool = False
) -> Path:
    """A random Llama of 2 layers and hidden size 64, with a tokenizer trained on the data below.

    With biases, those of attention's linears.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([json.dumps(row) for row in rows(20)], trainer)
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(**SIZES, vocab_size=len(tokenizer), tie_word_embeddings=is_tied, attention_bias=has_biases)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)  # else all tokens get nearly the same logits
        model.save_pretrained(folder)
    return folder


def rows(count: int) -> list[dict[str, Any]]:
    """Conversations of different lengths."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {number} + {number}?{' Please.' * (number % 4)}"},
                {"role": "assistant", "content": f"It is {2 * number}."},
            ]
        }
        for number in range(count)
    ]


def write_rows(path: Path, count: int) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows(count)))
    return path


def tiny_config(folder: Path, base: Path, *overrides: str) -> RunConfig:
    """Six steps of eight documents in fp32, saved every second step, in `folder/run`; no question is answered."""
    data = folder / "rows.jsonl"
    if not data.exists():
        write_rows(data, 60)
    return load_config(
        None,
        [
            f"model.base={base}",
            f"data.train={data}",
            "data.eval_fraction=0.2",
            "quantization.compute_dtype=float32",
            "lora.rank=4",
            "training.global_batch_size=8",
            "training.max_steps=6",
            "training.learning_rate=5e-3",
            "training.save_every=2",
            "training.eval_every=3",
            "output.sample_questions=0",
            f"output.dir={folder / 'run'}",
            *overrides,
        ],
    )


def run_to_end(config: RunConfig, *, resume: str | None = None) -> list[Record]:
    return list(train(config, resume=resume))


def run_until_step(config: RunConfig, step: int, *, resume: str | None = None) -> None:
    """Stop in the middle without a word, as a crash would: nothing after the yield of that step runs."""
    records: Iterator[Record] = train(config, resume=resume)
    with closing(records):  # type: ignore[type-var]
        for record in records:
            if isinstance(record, StepDone) and record.step == step:
                return


def course(run: Path) -> dict[str, Any]:
    """All that must be the same for two runs to be the same run: log lines without timings, and bytes of tensors."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evals = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    last = run / "checkpoints" / "last"
    return {
        "metrics": [{key: line[key] for key in line if key not in TIMING_KEYS} for line in metrics],
        "evals": [{key: line[key] for key in line if key != "seconds"} for line in evals],
        "adapter": _digest(run / "adapter" / "adapter_model.safetensors"),
        "last adapter": _digest(last / "adapter.safetensors"),
        "last optimizer": _digest(last / "optimizer.safetensors"),
    }


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()

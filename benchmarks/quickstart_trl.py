"""TRL + PEFT + bitsandbytes on the documents, order and hyper-parameters of a quickstart run; scored by our evaluation.

    python -m benchmarks.quickstart_trl --run RUN --to FOLDER

The base is the run's own NF4 cache, loaded by transformers; one padded forward pass a step, nothing recomputed: little
is dequantized and no memory is saved, so that it ends soon. Compare the losses, not the times.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.versus_peer import compute_in
from qlora_trainer.config.load import load_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.micro_batches import cut
from qlora_trainer.data.named import iter_named
from qlora_trainer.data.order import Order
from qlora_trainer.data.rows import collect
from qlora_trainer.data.tokenized import TokenizedData
from qlora_trainer.hardware.device import DTYPES, choose_device
from qlora_trainer.hardware.memory import process_peak_bytes
from qlora_trainer.model.adapter_folder import read_adapter_folder
from qlora_trainer.model.adapters import attach_adapters
from qlora_trainer.model.base import Base, read_tokenizer, resolve_base
from qlora_trainer.model.load import load_quantized
from qlora_trainer.model.nf4_cache import NF4Cache, prepare_nf4_cache
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.report.reading import watched
from qlora_trainer.report.screen import stderr_console
from qlora_trainer.run.answer import answer_all
from qlora_trainer.run.inputs import read_inputs
from qlora_trainer.step.batch import make_micro_batch
from qlora_trainer.step.train_step import evaluate


@dataclass(frozen=True, slots=True)
class Parts:
    """What a finished run was made of."""

    config: RunConfig
    base: Base
    cache: NF4Cache
    tokenizer: Any
    train_data: TokenizedData
    eval_data: TokenizedData


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    arguments = parser.parse_args()
    parts = _parts(arguments.run)
    _train_with_trl(parts, arguments.to)
    peak_mib = process_peak_bytes() / 2**20
    eval_loss = _eval_loss(parts, arguments.to / "adapter")
    (arguments.to / "outcome.json").write_text(json.dumps({"eval_loss": eval_loss, "peak_mib": peak_mib}))


def answer_held_out(run: Path, count: int) -> dict[str, list[tuple[str, str]]]:
    """(answer, reference) of `count` held-out questions, by the base alone and with the run's adapter."""
    parts = _parts(run)
    rows = collect(iter_named(parts.config.data, "eval")).rows
    chosen = [rows[index * len(rows) // count] for index in range(count)]
    model = _model(parts)
    answers = {}
    for name in ("before", "after"):
        if name == "after":
            _attach(model, run / "adapter")
        texts = answer_all(model, parts.tokenizer, parts.base, [row.messages[:-1] for row in chosen], max_new_tokens=64)
        answers[name] = [(text, row.messages[-1].content) for text, row in zip(texts, chosen, strict=True)]
    return answers


def _parts(run: Path) -> Parts:
    config = load_config(run / "config.yaml")
    base = resolve_base(config.model.base, config.model.revision)
    tokenizer = read_tokenizer(base.folder)
    data = watched(read_inputs(config), stderr_console()).data
    cache = prepare_nf4_cache(base, double_quant=config.quantization.double_quant)
    return Parts(config, base, cache, tokenizer, data.train, data.evaluation)


def _train_with_trl(parts: Parts, folder: Path) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    training, lora = parts.config.training, parts.config.lora
    rank_and_alpha: dict[str, Any] = {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
    }  # PEFT takes a fraction, its type says int
    dtype = DTYPES[parts.config.quantization.compute_dtype]
    model = AutoModelForCausalLM.from_pretrained(parts.cache.folder, dtype=dtype, device_map={"": "cpu"})
    compute_in(model, dtype)
    order = Order.of(training, len(parts.train_data.documents))
    rows = collect(iter_named(parts.config.data, "train")).rows
    documents = [
        parts.train_data.documents[position] for step in range(order.num_steps) for position in order.batch(step)
    ]
    ordered = [
        {
            "prompt": [{"role": turn.role, "content": turn.content} for turn in rows[document.index].messages[:-1]],
            "completion": [{"role": "assistant", "content": rows[document.index].messages[-1].content}],
        }
        for document in documents
    ]
    trainer = SFTTrainer(
        model=model,
        train_dataset=Dataset.from_list(ordered),
        processing_class=parts.tokenizer,
        peft_config=LoraConfig(
            **rank_and_alpha,
            lora_dropout=lora.dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        args=SFTConfig(
            output_dir=str(folder),
            per_device_train_batch_size=training.global_batch_size,
            gradient_accumulation_steps=1,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            learning_rate=training.learning_rate,
            lr_scheduler_type=training.schedule,
            warmup_steps=math.ceil(order.num_steps * training.warmup_ratio),
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm or 0.0,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            bf16=dtype == torch.bfloat16,
            use_cpu=True,
            max_length=int(parts.config.data.seq_len),
            seed=training.seed,
        ),
    )
    trainer.train()
    model_with_adapter: Any = trainer.model
    model_with_adapter.save_pretrained(folder / "adapter")


def _model(parts: Parts) -> QuantizedModel:
    dtype = DTYPES[parts.config.quantization.compute_dtype]
    return load_quantized(parts.base, parts.cache, compute_dtype=dtype, device=choose_device())


def _attach(model: QuantizedModel, folder: Path) -> None:
    adapter = read_adapter_folder(folder, linear_names=list(model.linears))
    attach_adapters(model, adapter.settings, adapter.weights, dtype=torch.bfloat16)


def _eval_loss(parts: Parts, folder: Path) -> float:
    model = _model(parts)
    _attach(model, folder)
    documents = parts.eval_data.documents
    batches = cut([document.num_tokens for document in documents], 2048)
    micro_batches = (
        make_micro_batch([documents[position] for position in batch], seed=0, step=0, packing=True) for batch in batches
    )
    total = evaluate(model, micro_batches, loss_chunk_tokens=512)
    return float(total) / parts.eval_data.num_supervised_tokens


if __name__ == "__main__":
    main()

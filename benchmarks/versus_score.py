"""Held-out loss of adapters by our own evaluation, for both sides of `versus_trl.py`, in a process of its own.

    python -m benchmarks.versus_score SPEC.json RESULT.json

SPEC: {"model": base, "held_out": a file of conversations, "adapters": PEFT folders}. Computed in fp32, adapters as they
were saved; the base alone comes first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

MICRO_BATCH_TOKENS, LOSS_CHUNK_TOKENS = 2048, 512


def scores(model: str, held_out: str, adapters: list[str]) -> list[float]:
    """Mean cross-entropy of the supervised tokens, in nats: of the base, then with each adapter."""
    import torch

    from qlora_trainer.data.chat import RowTokenizer
    from qlora_trainer.data.micro_batches import cut
    from qlora_trainer.data.rows import read_rows
    from qlora_trainer.model.adapter_folder import read_adapter_folder
    from qlora_trainer.model.adapters import attach_adapters
    from qlora_trainer.model.base import read_tokenizer, resolve_base
    from qlora_trainer.model.load import load_quantized
    from qlora_trainer.model.nf4_cache import prepare_nf4_cache
    from qlora_trainer.step.batch import make_micro_batch
    from qlora_trainer.step.train_step import evaluate

    base = resolve_base(model)
    cache = prepare_nf4_cache(base, double_quant=True)
    documents = [row.document for row in RowTokenizer(read_tokenizer(base.folder))(read_rows(held_out))]
    num_supervised_tokens = sum(document.num_supervised_tokens for document in documents)
    micro_batches = [
        make_micro_batch([documents[position] for position in batch], seed=0, step=0, packing=True)
        for batch in cut([document.num_tokens for document in documents], MICRO_BATCH_TOKENS)
    ]
    quantized = load_quantized(base, cache, compute_dtype=torch.float32, device=torch.device("cpu"))
    losses = []
    for folder in (None, *adapters):
        if folder is not None:
            adapter = read_adapter_folder(Path(folder), linear_names=list(quantized.linears))
            attach_adapters(quantized, adapter.settings, adapter.weights, dtype=torch.float32)
        total = evaluate(quantized, micro_batches, loss_chunk_tokens=LOSS_CHUNK_TOKENS)
        losses.append(float(total) / num_supervised_tokens)
    return losses


def main() -> None:
    spec_path, result = map(Path, sys.argv[1:])
    base_loss, *losses = scores(**json.loads(spec_path.read_text()))
    result.write_text(json.dumps({"base_eval_loss": base_loss, "eval_losses": losses}))


if __name__ == "__main__":
    main()

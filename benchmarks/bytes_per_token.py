"""What one more token in a micro-batch takes, by trace: the slope of the peak between two sizes of it.

    python -m benchmarks.bytes_per_token [--model NAME] [--gpu NAME | --cpu] [--rank 16] [--tokens 4096 8192]

All tokens are in one document and all are supervised. Two slopes: every layer recomputed, and every layer kept.
`benchmarks.scaling` measures the same in real runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from qlora_trainer.config.load import load_config
from qlora_trainer.planning.budget import Budget, cpu_budget, gpu_budget
from qlora_trainer.planning.document_lengths import DocumentLengths
from qlora_trainer.planning.full_trace import without_collector
from qlora_trainer.planning.model_config import read_model_config
from qlora_trainer.planning.planner import Planner
from qlora_trainer.planning.search import layout_of

LOSS_CHUNK = 256


def slopes(model: str, budget: Budget, rank: int, tokens: Sequence[int]) -> dict[str, float]:
    """Policy -> bytes a token."""
    config = load_config(None, [f"model.base={model}", "data.train=none.jsonl", f"lora.rank={rank}"])
    model_config, can_pack = read_model_config(config.model.base, None)
    documents = DocumentLengths.of_full_length(max(tokens), global_batch_size=1)
    with without_collector():
        planner = Planner.of(config, budget, model_config, documents, packing=can_pack)
        space = planner.space(rank, max(tokens))
        found = {}
        for policy, num_recomputed in (("recompute", planner.dry.num_layers), ("keep", 0)):
            low, high = (
                planner.price(layout_of(space, size, LOSS_CHUNK, num_recomputed), space.optimizer).peak_bytes
                for size in sorted(tokens)
            )
            found[policy] = (high - low) / (max(tokens) - min(tokens))
    return found


def main() -> None:
    """Print a line for each policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--gpu", default="a100-80gb")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, nargs=2, default=(4096, 8192))
    chosen = parser.parse_args()
    budget = cpu_budget(None) if chosen.cpu else gpu_budget(chosen.gpu, None)
    for policy, num_bytes in slopes(chosen.model, budget, chosen.rank, chosen.tokens).items():
        print(
            f"{chosen.model}, rank {chosen.rank}, {budget.compute_dtype}, {policy}: {num_bytes / 1000:,.1f} kB a token"
        )


if __name__ == "__main__":
    main()

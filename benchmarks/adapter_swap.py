"""Memory and swap time of many adapters over one SmolLM2-135M; asked: base + N x adapter bytes to 5 %, under 10 ms.

    python -m benchmarks.adapter_swap [--adapters 50] [--rank 16]

Every linear has an adapter, in bf16. Each is written as a PEFT folder, read, and added, as a user's would be. Memory is
the growth of this process's resident set from the base, run once, to base and adapters, each run once: file pages of
the base are in both. The logits of the first are compared with those before the others came.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from qlora_trainer.hardware.heap import release_free_memory, return_freed_blocks
from qlora_trainer.hardware.memory import resident_bytes
from qlora_trainer.model.adapter_folder import read_adapter_folder
from qlora_trainer.model.adapter_set import AdapterSet
from qlora_trainer.model.adapters import adapter_shapes
from qlora_trainer.model.base import resolve_base
from qlora_trainer.model.load import load_quantized
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.nf4_cache import prepare_nf4_cache
from qlora_trainer.model.quantized import QuantizedModel, hidden_states
from qlora_trainer.run.export import export_adapter

NUM_TOKENS = 64


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapter_swap")
    parser.add_argument("--adapters", type=int, default=50)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args(arguments)
    return_freed_blocks()
    base = resolve_base("smollm2-135m")
    cache = prepare_nf4_cache(base, double_quant=True)
    model = load_quantized(base, cache, compute_dtype=torch.float32, device=torch.device("cpu"))
    model.module.eval()
    names = tuple(model.linears)
    settings = LoraSettings(rank=options.rank, alpha=2.0 * options.rank, dropout=0.0, targets=names)
    adapters = AdapterSet(model)
    with tempfile.TemporaryDirectory() as folder:
        _add(adapters, Path(folder), settings, seed=0)  # what reading and writing leave behind once is no adapter's
        adapters.activate("a0")
        first_TV = _logits(model)
        adapters.activate(None)
        _logits(model)
        before_bytes = _settled_bytes()
        for seed in range(1, options.adapters + 1):
            _add(adapters, Path(folder), settings, seed=seed)
        grown_bytes = _settled_bytes() - before_bytes
    adapter_bytes = 2 * sum(rows * columns for rows, columns in adapter_shapes(model, settings).values())
    seconds = []
    for name in adapters.names * 4:
        start = time.perf_counter()
        adapters.activate(name)
        seconds.append(time.perf_counter() - start)
    adapters.activate("a0")
    print(
        json.dumps(
            {
                "adapters": options.adapters,
                "linears": len(names),
                "adapter_bytes": adapter_bytes,
                "base_bytes": before_bytes,
                "grown_bytes": grown_bytes,
                "grown_of_adapters": round(grown_bytes / (options.adapters * adapter_bytes), 4),
                "swap_ms_median": round(1e3 * median(seconds), 2),
                "swap_ms_worst": round(1e3 * max(seconds), 2),
                "same_logits": torch.equal(first_TV, _logits(model)),
            }
        )
    )


def _add(adapters: AdapterSet, folder: Path, settings: LoraSettings, *, seed: int) -> None:
    """Random weights, through a folder on the disk, as number `seed`."""
    model = adapters.model
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: (0.02 * torch.randn(shape, generator=generator)).bfloat16()
        for name, shape in adapter_shapes(model, settings).items()
    }
    names: dict[str, Any] = {"linear_names": list(model.linears)}
    export_adapter(folder / "adapter", weights, settings, base_name="smollm2-135m", revision=None, **names)
    adapters.add(f"a{seed}", read_adapter_folder(folder / "adapter", **names))


@torch.no_grad()
def _logits(model: QuantizedModel) -> Tensor:
    ids_BT = torch.arange(NUM_TOKENS).unsqueeze(0)
    hidden_BTH = hidden_states(model, ids_BT, ids_BT, [NUM_TOKENS])
    return model.logit_shape.apply(model.head(hidden_BTH))[0]


def _settled_bytes() -> int:
    gc.collect()
    release_free_memory()
    return resident_bytes()


if __name__ == "__main__":
    main()

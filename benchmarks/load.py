"""How much memory and time loading a base takes: quantized for the first time, and from the cache.

    python -m benchmarks.load [--size 1.1b|7b|tiny] [--folder DIR] [--json]

A sharded checkpoint of random bf16 weights is written into a temporary folder, tensor by tensor, and removed at the
end. Two fresh processes then load it, one after the other: the first quantizes and writes the cache, the second finds
it. Each reads its own VmHWM (the most resident memory it ever had, mapped file pages included) after the imports and at
the end, when every weight has been touched. Allowed is what the issue promises: the quantized size, 1 GiB, and what
the interpreter took by itself. Exit code 1 if a peak is above that.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ALLOWANCE_BYTES = 2**30
# config.json fields of LlamaConfig that give TinyLlama-1.1B's and Llama-2-7B's shapes.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    },
    "1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
}
SHARD_BYTES = {"tiny": 2**20, "1.1b": 2**30, "7b": 5 * 2**30}
REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Loading:
    """What one process took to load the base.

    Attributes:
        cache: "cold" (quantized now) or "warm" (found).
        interpreter_bytes: VmHWM after the imports.
        quantized_bytes: size of the cache's weight files.
        peak_bytes: VmHWM at the end.
        resolve_seconds: reading the config, accepting the architecture.
        prepare_seconds: quantizing, or verifying what was found.
        load_seconds: building the model and touching every weight.
    """

    cache: str
    interpreter_bytes: int
    quantized_bytes: int
    peak_bytes: int
    resolve_seconds: float
    prepare_seconds: float
    load_seconds: float

    @property
    def margin_bytes(self) -> int:
        """What is left of the allowed peak; negative if the promise is broken."""
        return self.interpreter_bytes + self.quantized_bytes + ALLOWANCE_BYTES - self.peak_bytes


def write_checkpoint(folder: Path, size: str) -> None:
    """A transformers folder with random bf16 weights in several shards; one tensor is in memory at a time."""
    import torch
    from transformers import LlamaConfig

    from qlora_trainer.model.skeleton import build_skeleton

    config = LlamaConfig(**SIZES[size], architectures=["LlamaForCausalLM"], dtype="bfloat16")  # type: ignore[arg-type]
    config.save_pretrained(folder)
    shapes = {
        name: tuple(tensor.shape) for name, tensor in build_skeleton(config, with_buffers=False).named_parameters()
    }
    generator = torch.Generator().manual_seed(0)
    shards = list(_cut_into_shards(shapes, SHARD_BYTES[size]))
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, first = {}, 0
        for name in names:
            end = first + 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [first, end]}
            weight_map[name], first = file_name, end
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)  # the format aligns tensors by padding the header
        with (folder / file_name).open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for name in names:
                tensor = torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
                file.write(tensor.view(torch.int16).numpy().data)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _cut_into_shards(shapes: dict[str, tuple[int, ...]], shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    num_bytes = 0
    for name, shape in shapes.items():
        if names and num_bytes + 2 * math.prod(shape) > shard_bytes:
            yield names
            names, num_bytes = [], 0
        names.append(name)
        num_bytes += 2 * math.prod(shape)
    yield names


def load_and_measure(folder: Path) -> Loading:
    """Load the base in `folder` in this process, which should have done nothing else."""
    import torch

    from qlora_trainer.hardware.device import DTYPES, choose_compute_dtype, choose_device
    from qlora_trainer.hardware.memory import process_peak_bytes
    from qlora_trainer.model.base import resolve_base
    from qlora_trainer.model.load import load_quantized
    from qlora_trainer.model.nf4_cache import prepare_nf4_cache

    device = choose_device()
    compute_dtype = DTYPES[choose_compute_dtype(device)]
    interpreter_bytes = process_peak_bytes()
    times = [time.perf_counter()]
    base = resolve_base(str(folder))
    times.append(time.perf_counter())
    cache = prepare_nf4_cache(base, double_quant=True)
    times.append(time.perf_counter())
    model = load_quantized(base, cache, compute_dtype=compute_dtype, device=device)
    touched = torch.stack([tensor.max().float().cpu() for tensor in model.module.buffers() if tensor.numel()])
    times.append(time.perf_counter())
    if not bool(touched.isfinite().all()):
        raise RuntimeError(f"{folder} was not loaded right: a weight is not finite")
    seconds = [after - before for before, after in itertools.pairwise(times)]
    return Loading(
        cache="cold" if cache.was_built else "warm",
        interpreter_bytes=interpreter_bytes,
        quantized_bytes=sum(path.stat().st_size for path in cache.folder.glob("*.safetensors")),
        peak_bytes=process_peak_bytes(),
        resolve_seconds=seconds[0],
        prepare_seconds=seconds[1],
        load_seconds=seconds[2],
    )


def measure_in_child(folder: Path, cache_home: Path) -> Loading:
    """`load_and_measure` in a fresh process, with its cache under `cache_home`."""
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.load", "--measure", str(folder)],
        cwd=REPOSITORY,
        env=os.environ | {"XDG_CACHE_HOME": str(cache_home)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Loading(**json.loads(child.stdout.splitlines()[-1]))


def print_table(loadings: Sequence[Loading], size: str) -> None:
    """The figures, a column a process."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", *(loading.cache for loading in loadings), title=f"Loading a {size} base", box=None)
    mib = 2**20
    rows: dict[str, list[str]] = {
        "interpreter (MiB)": [f"{loading.interpreter_bytes / mib:,.0f}" for loading in loadings],
        "quantized (MiB)": [f"{loading.quantized_bytes / mib:,.0f}" for loading in loadings],
        "peak (MiB)": [f"{loading.peak_bytes / mib:,.0f}" for loading in loadings],
        "left of the allowed peak (MiB)": [f"{loading.margin_bytes / mib:,.0f}" for loading in loadings],
        "accept the architecture (s)": [f"{loading.resolve_seconds:.1f}" for loading in loadings],
        "quantize, or verify (s)": [f"{loading.prepare_seconds:.1f}" for loading in loadings],
        "build, touch every weight (s)": [f"{loading.load_seconds:.1f}" for loading in loadings],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description="Memory and time of loading a base.")
    parser.add_argument("--size", choices=tuple(SIZES), default="1.1b", help="shape of the generated base")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (1.1b: 3 GiB, 7b: 17 GiB)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.measure is not None:
        print(json.dumps(asdict(load_and_measure(chosen.measure))))
        return 0
    with tempfile.TemporaryDirectory(prefix="load-benchmark-", dir=chosen.folder) as temporary:
        base, cache_home = Path(temporary) / "base", Path(temporary) / "cache"
        base.mkdir()
        write_checkpoint(base, chosen.size)
        loadings = [measure_in_child(base, cache_home) for _ in ("cold", "warm")]
    if chosen.json:
        figures: list[dict[str, Any]] = [
            asdict(loading) | {"margin_bytes": loading.margin_bytes} for loading in loadings
        ]
        print(json.dumps({"size": chosen.size, "loadings": figures}, indent=2))
    else:
        print_table(loadings, chosen.size)
    return 0 if all(loading.margin_bytes >= 0 for loading in loadings) else 1


if __name__ == "__main__":
    sys.exit(main())

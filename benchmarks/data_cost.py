"""What data costs: time for a file of the usual size, and memory while training on tokens of any size.

    python -m benchmarks.data_cost --data gsm8k_train.jsonl [--base smollm2-135m] [--json OUT]

* `data check` of the file, the whole command, and in a process that has imported everything: the same check; reading,
  tokenising and ordering it, with an empty cache and again.
* A store of as many tokens as a JSON Lines file of `--large` has, beside one of `--small`: what a process takes to
  hold rows out, to select its documents and to read `--steps` global batches of them, of resident (VmHWM) and of
  anonymous memory (RssAnon), and how long. The tokens are holes in files, so nothing is written but the rows; they are
  read as any are.

`benchmarks.data_memory` measures the command over a generated file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from qlora_trainer.config.sizes import parse_size_bytes

MIB = 2**20
BYTES_A_ROW, TOKENS_A_ROW = 1086, 600  # of the rows that `benchmarks.data_memory` writes
GLOBAL_BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a file of the usual size")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--small", default="20MB")
    parser.add_argument("--large", default="10GB")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, help="where caches and stores go for a while")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=("time", "memory"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child == "time":
        print(json.dumps(timed(arguments.data, arguments.base)))
        return
    if arguments.child == "memory":
        print(json.dumps(memory_of(arguments.folder, arguments.steps)))
        return
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        if arguments.data is not None:
            found["seconds"] = times(arguments, Path(name))
        found["memory"] = {size: stored(arguments, Path(name), size) for size in (arguments.small, arguments.large)}
    print(table(found))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=2))


def times(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Seconds of everything that is timed."""
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    unpack = "import sys; from qlora_trainer.model.base import resolve_base; resolve_base(sys.argv[1])"
    subprocess.run([sys.executable, "-c", unpack, arguments.base], env=environment, check=True)
    command = [sys.executable, "-m", "qlora_trainer.cli", "data", "check", str(arguments.data)]
    start = time.perf_counter()
    subprocess.run([*command, "--model", arguments.base], env=environment, check=True, stdout=subprocess.DEVNULL)
    whole = time.perf_counter() - start
    child = [sys.executable, "-m", "benchmarks.data_cost", "--child", "time", "--data", str(arguments.data)]
    done = subprocess.run([*child, "--base", arguments.base], env=environment, check=True, stdout=subprocess.PIPE)
    return {"data check, the command": whole, **json.loads(done.stdout.splitlines()[-1])}


def timed(data: Path, base: str) -> dict[str, float]:
    """In this process, after the imports."""
    from qlora_trainer.config.load import load_config
    from qlora_trainer.data.order import Order
    from qlora_trainer.run.data_check import check_data
    from qlora_trainer.run.inputs import read_inputs

    config = load_config(None, [f"model.base={base}", f"data.train={data}"])
    found = {}
    start = time.perf_counter()
    for _ in check_data(config, num_samples=3):
        pass
    found["data check, after the imports"] = time.perf_counter() - start
    for what in ("read, tokenised and ordered", "found again and ordered"):
        start = time.perf_counter()
        reading = read_inputs(config)
        while True:
            try:
                next(reading)
            except StopIteration as end:
                inputs = end.value
                break
        documents = inputs.data.train.documents
        order = Order.of(config.training, len(documents))
        for position in order.batch(0):
            documents[position]
        found[what] = time.perf_counter() - start
    return found


def stored(arguments: argparse.Namespace, folder: Path, size: str) -> dict[str, float]:
    """What the process says that trains on a store of that size."""
    store = folder / size
    num_rows = write_store(store, parse_size_bytes(size))
    child = [sys.executable, "-m", "benchmarks.data_cost", "--child", "memory", "--folder", str(store)]
    done = subprocess.run([*child, "--steps", str(arguments.steps)], check=True, stdout=subprocess.PIPE)
    return {"rows": num_rows, "tokens": num_rows * TOKENS_A_ROW, **json.loads(done.stdout)}


def write_store(folder: Path, file_bytes: int) -> int:
    """The store of a file of so many bytes, its tokens holes; returns its rows."""
    from qlora_trainer.data.document_store import ROW

    folder.mkdir()
    num_rows = file_bytes // BYTES_A_ROW
    for name, width in (("tokens.bin", 4), ("learned.bin", 1)):
        with (folder / name).open("wb") as file:
            file.truncate(width * num_rows * TOKENS_A_ROW)
    with (folder / "rows.bin").open("wb") as file:
        for first in range(0, num_rows, 2**16):
            rows_N = np.zeros(min(2**16, num_rows - first), dtype=ROW)
            rows_N["end"] = TOKENS_A_ROW * (first + 1 + np.arange(rows_N.size))
            rows_N["content"] = first + np.arange(rows_N.size)
            rows_N["num_supervised"] = TOKENS_A_ROW // 2
            file.write(rows_N.tobytes())
    entry = {"path": "train.jsonl", "format_name": "messages", "num_rows": num_rows, "num_bad": 0, "reasons": []}
    (folder / "files.json").write_text(json.dumps([entry]))
    return num_rows


def memory_of(folder: Path, num_steps: int) -> dict[str, float]:
    """MiB that training on a store adds to what the imports took, the most of it, and seconds."""
    from qlora_trainer.data.document_store import DocumentStore
    from qlora_trainer.data.order import Order
    from qlora_trainer.data.split import hold_out
    from qlora_trainer.data.tokenized import fit_documents, length_percentiles, select

    before = status()
    begun = time.perf_counter()
    store = DocumentStore(folder)
    rows, held_out = hold_out(store.num_rows, 0.05, 0)
    held_out_at = time.perf_counter()
    evaluation = select(store, held_out, bos_token_id=None)
    whole = select(store, rows, bos_token_id=None)
    data = fit_documents(whole, 2048, overlong="drop", max_dropped_share=0.05)
    del whole
    length_percentiles(data.documents.lengths)
    _ = store.num_repeated, store.content_hash, data.num_stopping_rows, evaluation.num_supervised_tokens
    order = Order(
        num_documents=len(data.documents), global_batch_size=GLOBAL_BATCH, seed=0, epochs=1.0, max_steps=num_steps
    )
    at_start, ordered_at = status(), time.perf_counter()
    for step in range(num_steps):
        for position in order.batch(step):
            data.documents[position]
    after = status()
    return {
        "most resident above the imports": (after["VmHWM"] - before["VmRSS"]) / MIB,
        "anonymous at the first step": (at_start["RssAnon"] - before["RssAnon"]) / MIB,
        "anonymous at the last step": (after["RssAnon"] - before["RssAnon"]) / MIB,
        "of files at the last step": (after["RssFile"] - before["RssFile"]) / MIB,
        "seconds to hold rows out": held_out_at - begun,
        "seconds to select and count documents": ordered_at - held_out_at,
        "milliseconds to order and read a global batch": 1000 * (time.perf_counter() - ordered_at) / num_steps,
    }


def status() -> dict[str, int]:
    """Bytes of this process's memory, by the kernel's names."""
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":") for line in lines if line.startswith(("Rss", "VmHWM", "VmRSS")))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def table(found: dict[str, Any]) -> str:
    """For the log."""
    lines = ["| | seconds |", "|---|---:|"] if "seconds" in found else []
    lines += [f"| {what} | {seconds:.2f} |" for what, seconds in found.get("seconds", {}).items()]
    sizes = list(found["memory"])
    lines += ["", f"| | {' | '.join(sizes)} |", f"|---|{'---:|' * len(sizes)}"]
    for what in found["memory"][sizes[0]]:
        lines.append(" | ".join([f"| {what}", *(f"{found['memory'][size][what]:,.1f}" for size in sizes)]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

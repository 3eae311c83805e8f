"""What both sides of `versus_trl.py` are given: rows, their order for each seed, held-out rows, the NF4 base.

    python -m benchmarks.versus_inputs SPEC.json RESULT.json

In a process of its own, which quantizes the base if it must. Written beside RESULT: `train.jsonl` (ours, as
conversations), `ordered-SEED.jsonl` (the peer's: the same in the order in which ours takes them, as prompts and
completions), `held_out.jsonl`, and `initial-SEED`, the new adapter that both begin with: after few steps, losses differ
by 0.1 % from one draw to the next.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_trainer.model.base import Base
    from qlora_trainer.model.nf4_cache import NF4Cache

SPARE_TOKENS = 8  # the peer's template may add a few; none of its rows is to be truncated


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """What is asked for.

    Attributes:
        data: a file of conversations, in any form that we read.
        model: a base, as `model.base` takes it.
        num_rows: to train on.
        documents_per_step: the effective batch.
        num_steps: of an optimizer.
        rank: of new adapters on all linears; alpha is twice that.
        seeds: of orders and new adapters.
        num_held_out: rows to evaluate on.
        max_length: longer rows are passed over, on both sides.
        is_equal_length: take the rows whose lengths are nearest to the median: nothing to pad.
    """

    data: str
    model: str
    num_rows: int
    documents_per_step: int
    num_steps: int
    rank: int
    seeds: tuple[int, ...]
    num_held_out: int
    max_length: int
    is_equal_length: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What there is now.

    Attributes:
        base_folder, cache_folder: of the tokenizer, and of the NF4 weights that transformers loads itself.
        num_rows, num_held_out: as asked, or what the file has.
        mean_tokens, longest_tokens: of a row trained on.
        num_tokens: of all steps of the first seed, as we tokenise.
    """

    base_folder: str
    cache_folder: str
    num_rows: int
    num_held_out: int
    mean_tokens: float
    longest_tokens: int
    num_tokens: int

    @classmethod
    def nothing(cls) -> Inputs:
        """Before there is anything."""
        return cls(
            base_folder="",
            cache_folder="",
            num_rows=0,
            num_held_out=0,
            mean_tokens=0.0,
            longest_tokens=0,
            num_tokens=0,
        )


def choose_rows(
    lengths: Sequence[int], num_rows: int, num_held_out: int, *, is_equal_length: bool
) -> tuple[list[int], list[int]]:
    """Positions to train on and positions held out, both ascending.

    Args:
        lengths: tokens of every row that is not too long.
        num_rows, num_held_out: how many; fewer are held out where the file has no more.
        is_equal_length: train on those nearest to the median.
    """
    positions = list(range(len(lengths)))
    if is_equal_length:
        middle = statistics.median(lengths)
        positions.sort(key=lambda position: (abs(lengths[position] - middle), position))
    chosen, rest = sorted(positions[:num_rows]), sorted(positions[num_rows:])
    return chosen, rest[len(rest) - min(num_held_out, len(rest)) :]


def prepare(spec: InputSpec, folder: Path) -> Inputs:
    """Write everything into `folder`."""
    from qlora_trainer.data.chat import RowTokenizer
    from qlora_trainer.data.order import Order
    from qlora_trainer.data.rows import read_rows
    from qlora_trainer.model.base import read_tokenizer, resolve_base
    from qlora_trainer.model.nf4_cache import prepare_nf4_cache

    base = resolve_base(spec.model)
    cache = prepare_nf4_cache(base, double_quant=True)
    tokenized = RowTokenizer(read_tokenizer(base.folder))(read_rows(spec.data))
    fitting = [
        (row.row.messages, row.document)
        for row in tokenized
        if row.row.messages
        and row.document.num_tokens <= spec.max_length - SPARE_TOKENS
        and row.document.num_supervised_tokens
    ]
    lengths = [document.num_tokens for _, document in fitting]
    chosen, held_out = choose_rows(lengths, spec.num_rows, spec.num_held_out, is_equal_length=spec.is_equal_length)
    if len(chosen) < spec.documents_per_step:
        raise SystemExit(f"{spec.data}: {len(chosen)} usable rows, expected at least {spec.documents_per_step}")

    def turns(position: int) -> list[dict[str, str]]:
        return [{"role": turn.role, "content": turn.content} for turn in fitting[position][0]]

    _write_rows(folder / "train.jsonl", [{"messages": turns(position)} for position in chosen])
    _write_rows(folder / "held_out.jsonl", [{"messages": turns(position)} for position in held_out])
    num_tokens = 0
    for seed in reversed(spec.seeds):  # the first one is what is counted
        order = Order(
            num_documents=len(chosen),
            global_batch_size=spec.documents_per_step,
            seed=seed,
            epochs=1,
            max_steps=spec.num_steps,
        )
        ordered = [chosen[place] for step in range(order.num_steps) for place in order.batch(step)]
        num_tokens = sum(lengths[position] for position in ordered)
        peer_rows = [{"prompt": turns(position)[:-1], "completion": turns(position)[-1:]} for position in ordered]
        _write_rows(folder / f"ordered-{seed}.jsonl", peer_rows)
    _write_new_adapters(spec, base, cache, folder)
    return Inputs(
        base_folder=str(base.folder),
        cache_folder=str(cache.folder),
        num_rows=len(chosen),
        num_held_out=len(held_out),
        mean_tokens=statistics.fmean(lengths[position] for position in chosen),
        longest_tokens=max(lengths[position] for position in chosen),
        num_tokens=num_tokens,
    )


def initial_adapter(folder: Path, seed: int) -> Path:
    """Where the adapter lies with which the runs of a seed begin."""
    return folder / f"initial-{seed}"


def _write_new_adapters(spec: InputSpec, base: Base, cache: NF4Cache, folder: Path) -> None:
    """A PEFT folder for each seed, in the dtype in which both sides train."""
    import torch
    from safetensors.torch import save_file

    from qlora_trainer.config.bases import ADAPTER_CONFIG_FILE
    from qlora_trainer.model.adapter_config import adapter_config
    from qlora_trainer.model.adapter_folder import WEIGHTS_FILE, adapter_tensors
    from qlora_trainer.model.adapters import initial_weights
    from qlora_trainer.model.load import load_quantized
    from qlora_trainer.model.lora_settings import LoraSettings, select_targets

    model = load_quantized(base, cache, compute_dtype=torch.float32, device=torch.device("cpu"))
    linear_names = list(model.linears)
    settings = LoraSettings(
        rank=spec.rank, alpha=2.0 * spec.rank, dropout=0.0, targets=select_targets(linear_names, "all-linear")
    )
    fields = adapter_config(settings, linear_names=linear_names, base_name=base.name, revision=None)
    for seed in spec.seeds:
        weights = {name: weight.bfloat16() for name, weight in initial_weights(model, settings, seed=seed).items()}
        new = initial_adapter(folder, seed)
        new.mkdir(exist_ok=True)
        (new / ADAPTER_CONFIG_FILE).write_bytes(fields)
        save_file(adapter_tensors(weights, settings), new / WEIGHTS_FILE)


def _write_rows(path: Path, rows: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    spec_path, result = map(Path, sys.argv[1:])
    spec = InputSpec(**json.loads(spec_path.read_text()))
    result.write_text(json.dumps(asdict(prepare(spec, result.parent))))


if __name__ == "__main__":
    main()

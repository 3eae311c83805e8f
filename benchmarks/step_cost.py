"""What a training step costs on a GPU, ours beside PEFT + TRL's, counted without one: the same on every machine.

    python -m benchmarks.step_cost [--model llama-3.1-8b] [--tokens 4096] [--documents N] [--rank 16] [--layers N]
                                   [--by-operation] [--json FILE] [--update-golden]

Both steps run on fake tensors of a device that exists in Python only (`step_ledger.py`): ours as `run/attempts.py`
takes it (`step_ours.py`), the peer's as `SFTTrainer.train()` takes it by its defaults (`step_peer.py`). Alike for both:
one row that is one document, every token but the first supervised, bf16, double-quantized NF4, adapters on all linears
without dropout, gradients clipped, AdamW's update (TRL's fused one over many tensors, ours over one flat buffer), with
all layers recomputed and with none. `--documents N` cuts our row into documents that do not see each other; the peer's
stays one, as torch's attention sees a packed row. Both are steps in which nothing is logged. Ours logs each one:
between two steps the host reads loss and gradient norm, together, which is one wait when all of the step is queued.

*Ideal FLOPs* are those of the products that a LoRA step over a frozen base cannot do without, 2 a multiply-add, for T
tokens, a linear of I inputs and O outputs, rank R, N supervised positions, hidden size H and vocabulary V:
    base            2 T I O  forward, 2 T I O  gradient of its input
    LoRA            2 T R (I + O)  forward;  2 T R (I + O)  gradients of A and B;  2 T R O  gradient between the two;
                    2 T R I  its part of the input's gradient
    head            2 N H V  forward, 2 N H V  gradient of its input
    recomputation   the forward of all linears once more, where layers are recomputed
No gradient is needed for the input of the first layer's q, k and v. Attention is a row of its own: 2 products forward,
5 backward (which forms the scores again, since none are kept), 2 more recomputed, half of each T x T being seen.

*Bytes* are read and written by operations that are neither products nor attention kernels. *Launches* are operations
that start a kernel; lists of tensors are cut as ATen cuts them. *Waits* are calls in which the host stops until the
device is done: a value that is asked for, a result whose size is a value, a blocking copy. Exit code 1 if a bound of
ours is missed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.step_totals import Case
from benchmarks.step_trace import Side, traced

GOLDEN = Path(__file__).parents[1] / "tests" / "benchmarks" / "step_cost_golden.json"
GOLDEN_CASE = Case(
    model="llama-3.1-8b", num_layers=2, num_tokens=4096, rank=16, is_recomputed=True, loss_chunk_tokens=1024
)
# Ours alone: norms of each head and a tied head; norms behind the halves, a soft cap and windows.
OTHER_MODELS = ("qwen3-0.6b", "gemma-2-2b")
# The bounds are those of a whole model. What the third layer adds is what each of its layers costs: so its
# figures are known again without tracing all of them.
WHOLE_CASE, THREE_LAYERS_CASE = replace(GOLDEN_CASE, num_layers=32), replace(GOLDEN_CASE, num_layers=3)
# Ours alone: packed documents, each attended to by itself.
PACKED_CASE = replace(GOLDEN_CASE, num_documents=16)
# With each of `step_ours.LEVERS`; three layers, so that a streamed base does not fit its two buffers.
LEVER_CASE = replace(GOLDEN_CASE, model="qwen3-0.6b", num_layers=3, loss_chunk_tokens=2048)
LEVERS = ("layer inputs offloaded, tiles", "base streamed", "tables on the host", "optimizer on the host")
PEER_PACKAGES = ("accelerate", "bitsandbytes", "peft", "torch", "transformers", "trl")
SIDES: tuple[Side, ...] = ("ours", "peer")
POLICIES = ("recompute", "keep")
# Issue bounds: of the ideal's FLOPs, of the peer's bytes and launches, and a linear's dequantizations by policy.
MOST_FLOPS, MOST_BYTES, MOST_LAUNCHES = 1.05, 1 / 2, 2 / 3
MOST_DEQUANTIZATIONS = {"recompute": 3, "keep": 2}


@dataclass(frozen=True, slots=True)
class Ideal:
    """FLOPs that a step cannot do without; see the module."""

    gemm_flops: int
    attention_flops: int


def ideal(config: Any, case: Case) -> Ideal:
    """Of a model whose layers are Llama's."""
    tokens, rank, hidden = case.num_tokens, case.rank, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    q_size, kv_size = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    qkv = [(hidden, q_size), (hidden, kv_size), (hidden, kv_size)]
    others = [(q_size, hidden), *(2 * [(hidden, config.intermediate_size)]), (config.intermediate_size, hidden)]
    forward = sum(inputs * outputs + rank * (inputs + outputs) for inputs, outputs in qkv + others)
    for_input = sum(inputs * outputs + rank * inputs for inputs, outputs in qkv + others)
    for_adapters = sum(rank * (inputs + 2 * outputs) for inputs, outputs in qkv + others)
    not_needed = sum(inputs * outputs + rank * inputs for inputs, outputs in qkv)
    passes = 2 if case.is_recomputed else 1
    per_token = case.num_layers * (passes * forward + for_input + for_adapters) - not_needed
    head = 2 * (tokens - case.num_documents) * hidden * config.vocab_size
    attention = case.num_layers * (2 * passes + 5) * (tokens * tokens // case.num_documents) * q_size
    return Ideal(gemm_flops=2 * (tokens * per_token + head), attention_flops=attention)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of the table.

    Attributes:
        name: what is counted.
        form: of a figure.
        bound: most that ours, or where `is_relative` its ratio to the peer's, may be; None for none.
    """

    name: str
    ours: float
    peer: float
    form: str = ",.0f"
    bound: float | None = None
    is_relative: bool = False

    @property
    def ratio(self) -> float | None:
        return self.ours / self.peer if self.peer else None

    @property
    def is_met(self) -> bool:
        judged = self.ratio if self.is_relative else self.ours
        return self.bound is None or judged is None or judged <= self.bound


def rows(policy: str, ours: Mapping[str, Any], peer: Mapping[str, Any], least: Ideal, num_linears: int) -> list[Row]:
    """The table of one policy.

    Args:
        policy: of `POLICIES`.
        ours, peer: `Totals` as JSON.
        least: the ideal.
        num_linears: of the model, without the head.
    """

    def unpacked(*phases: str) -> Callable[[Mapping[str, Any]], float]:
        return lambda side: sum(side["dequantizations"][phase] for phase in phases) / num_linears

    def row(name: str, figure: Callable[[Mapping[str, Any]], float], **options: Any) -> Row:
        return Row(name=name, ours=figure(ours), peer=figure(peer), **options)

    both, both_ideal = ("gemm_flops", "attention_flops"), least.gemm_flops + least.attention_flops
    phases = tuple(ours["dequantizations"])
    decimals = {"form": ",.2f"}
    of_ideal = {"form": ".3f", "bound": MOST_FLOPS}
    return [
        row("GEMM TFLOP", lambda side: side["gemm_flops"] / 1e12, **decimals),
        row("attention TFLOP", lambda side: side["attention_flops"] / 1e12, **decimals),
        row("GEMM FLOPs / ideal", lambda side: side["gemm_flops"] / least.gemm_flops, **of_ideal),
        row("attention FLOPs / ideal", lambda side: side["attention_flops"] / least.attention_flops, form=".3f"),
        row("both / ideal", lambda side: sum(side[key] for key in both) / both_ideal, **of_ideal),
        row(
            "dequantizations a linear",
            unpacked(*phases),
            bound=MOST_DEQUANTIZATIONS[policy],
            **decimals,
        ),
        *(row(f"  {phase}", unpacked(phase), **decimals) for phase in phases),
        row(
            "GB outside of GEMMs",
            lambda side: side["moved_bytes"] / 1e9,
            bound=MOST_BYTES,
            is_relative=True,
            **decimals,
        ),
        row("  of them dequantization", lambda side: side["dequantization_bytes"] / 1e9, **decimals),
        row("  of them clip, update, bookkeeping", lambda side: side["outside_bytes"] / 1e9, **decimals),
        row("kernel launches", lambda side: side["launches"], bound=MOST_LAUNCHES, is_relative=True),
        row("  of them clip, update, bookkeeping", lambda side: side["outside_launches"]),
        row("copies host to device", lambda side: side["copies_to_device"]),
        row("copies device to host", lambda side: side["copies_to_host"]),
        row("calls that wait for the device", lambda side: side["waits"], bound=0),
    ]


def measure(case: Case) -> dict[str, Any]:
    """Both sides under both policies: `{policy: {side: {"totals", "breakdown"}}}`, and `{"modelled": {side: what}}`."""
    cases = [replace(case, is_recomputed=policy == "recompute") for policy in POLICIES]
    found = {side: traced(side, cases) for side in SIDES}
    measured: dict[str, Any] = {"modelled": {side: found[side]["modelled"] for side in SIDES}}
    for place, policy in enumerate(POLICIES):
        measured[policy] = {side: found[side]["steps"][place] for side in SIDES}
    return measured


def golden_of(measured: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    """What the golden file holds of `measure` in `GOLDEN_CASE` and in `WHOLE_CASE`."""

    def totals(of: Mapping[str, Any], side: Side) -> dict[str, Any]:
        return {policy: of[policy][side]["totals"] for policy in POLICIES}

    ours = our_steps(OTHER_MODELS)
    return {
        "peer_packages": package_versions(),
        **{side: totals(measured, side) for side in SIDES},
        "whole": {side: totals(whole, side) for side in SIDES},
        "three layers": ours.three_layers,
        "packed": ours.packed,
        "others": ours.models,
        "levers": ours.levers,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class OurSteps:
    """Totals as JSON.

    Attributes:
        models: model -> policy -> totals, in the golden case.
        three_layers, packed: policy -> totals.
        levers: lever -> those of `LEVER_CASE`, and where the host waits ("waits_in": place -> number).
    """

    models: dict[str, dict[str, Any]]
    three_layers: dict[str, Any]
    packed: dict[str, Any]
    levers: dict[str, dict[str, Any]]


def our_steps(models: Sequence[str]) -> OurSteps:
    """Of our step alone, all in one child process."""
    of_policies = [*(replace(GOLDEN_CASE, model=model) for model in models), THREE_LAYERS_CASE, PACKED_CASE]
    cases = [replace(case, is_recomputed=policy == "recompute") for case in of_policies for policy in POLICIES]
    steps = iter(traced("ours", cases + [replace(LEVER_CASE, lever=lever) for lever in LEVERS])["steps"])
    *found, three_layers, packed = [{policy: next(steps)["totals"] for policy in POLICIES} for _ in of_policies]
    levers = {
        lever: step["totals"] | {"waits_in": step["breakdown"]["waits"]}
        for lever, step in zip(LEVERS, steps, strict=True)
    }
    return OurSteps(
        models=dict(zip(models, found, strict=True)), three_layers=three_layers, packed=packed, levers=levers
    )


def package_versions() -> dict[str, str]:
    """What the peer's numbers depend on."""
    return {name: importlib.metadata.version(name).partition("+")[0] for name in PEER_PACKAGES}


def print_table(policy: str, table_rows: Sequence[Row]) -> None:
    """Ours beside the peer's."""
    from rich.console import Console
    from rich.table import Table

    layers = "all layers recomputed" if policy == "recompute" else "all activations kept"
    table = Table("", title=f"One step, {layers}", box=None)
    for heading in ("ours", "PEFT + TRL", "ours / theirs", "bound"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for row in table_rows:
        bound = "" if row.bound is None else f"{row.bound:.2f} x" if row.is_relative else f"{row.bound:g}"
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        verdict = "" if row.bound is None else "met" if row.is_met else "MISSED"
        table.add_row(row.name, format(row.ours, row.form), format(row.peer, row.form), ratio, bound, verdict)
    Console(width=120).print(table)


def print_breakdown(policy: str, side: str, breakdown: Mapping[str, Any], number: int) -> None:
    """The largest shares."""
    print(f"\n{side}, {policy}: GB outside of GEMMs and launches, by operation and by the function they come from")
    for key in ("operations", "places"):
        for share in breakdown[key][:number]:
            print(f"{share['moved_bytes'] / 1e9:10.3f} {share['launches']:6d}  {share['name']}")
        print()
    for place, count in breakdown["waits"].items():
        print(f"{count:17d} waits in {place}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="step_cost.py", description="What a training step costs on a GPU.")
    parser.add_argument("--model", default="llama-3.1-8b", help="a well-known model with Llama's layers")
    parser.add_argument("--tokens", type=int, default=4096, help="of the one row; bitsandbytes fuses 1536 and fewer")
    parser.add_argument("--documents", type=int, default=1, help="of equal lengths, into which our row is cut")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--loss-chunk", type=int, default=1024, help="positions in a chunk of our loss")
    parser.add_argument("--by-operation", type=int, nargs="?", const=30, help="also the so many largest shares")
    parser.add_argument("--json", type=Path, help="write everything there, too")
    parser.add_argument("--update-golden", action="store_true", help=f"write {GOLDEN.name} for the tests, no more")
    chosen = parser.parse_args(arguments)
    if chosen.update_golden:
        GOLDEN.write_text(json.dumps(golden_of(measure(GOLDEN_CASE), measure(WHOLE_CASE)), indent=1) + "\n")
        return 0
    if chosen.documents < 1 or chosen.tokens % chosen.documents:
        parser.error(f"--documents {chosen.documents}: expected a divisor of {chosen.tokens} tokens")
    from qlora_trainer.planning.model_config import read_model_config

    config: Any = read_model_config(chosen.model)[0]
    case = Case(
        model=chosen.model,
        num_layers=chosen.layers or config.num_hidden_layers,
        num_tokens=chosen.tokens,
        rank=chosen.rank,
        is_recomputed=True,
        loss_chunk_tokens=chosen.loss_chunk,
        num_documents=chosen.documents,
    )
    measured, is_met = measure(case), True
    report: dict[str, Any] = {"peer_packages": package_versions(), **measured}
    for policy in POLICIES:
        least = ideal(config, replace(case, is_recomputed=policy == "recompute"))
        sides = measured[policy]
        table_rows = rows(policy, sides["ours"]["totals"], sides["peer"]["totals"], least, 7 * case.num_layers)
        is_met = is_met and all(row.is_met for row in table_rows)
        report[policy] = {
            **sides,
            "ideal": asdict(least),
            "rows": [asdict(row) | {"ratio": row.ratio, "is_met": row.is_met} for row in table_rows],
        }
        print_table(policy, table_rows)
        for side in SIDES if chosen.by_operation else ():
            print_breakdown(policy, side, sides[side]["breakdown"], chosen.by_operation)
    for side in SIDES:
        print(f"Modelled ({side}): {'; '.join(measured['modelled'][side])}.")
    print("Between two steps of ours the host reads loss and gradient norm for the log, together: one wait.")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())

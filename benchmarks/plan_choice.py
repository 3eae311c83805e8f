"""Is what the planner chooses the fastest that fits? Against a grid, measured.

    python -m benchmarks.plan_choice [--base smollm2-135m] [--seq-len 128] [--rounds 5] [--folder DIR] [--json FILE]

At three budgets between the smallest and the largest plan, the planner chooses. The grid: micro-batches of 1, 2, 4 and
8 documents, x 0, half or all layers kept, x two loss chunks. One process holds the model; in each round every layout of
the grid and every choice takes one step of 8 documents, in another order, with its own limit of resident memory, as in
a run. A layout fits a budget if its plan does. Medians over the rounds. Exit code 1 if a choice is slower than 90 % of
the fastest that fits.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.hard_limit import between, small_run
from benchmarks.plan_accuracy_inputs import SMOLLM2
from qlora_trainer.config.load import load_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.micro_batches import cut
from qlora_trainer.hardware.device_memory import INTERPRETER_BYTES
from qlora_trainer.hardware.heap import UNASKED_BYTES, release_free_memory
from qlora_trainer.hardware.memory import forget_peak, process_peak_bytes, resident_bytes
from qlora_trainer.model.activation_policy import recompute_layers
from qlora_trainer.model.base import Base, resolve_base
from qlora_trainer.planning.budget import cpu_budget
from qlora_trainer.planning.document_lengths import DocumentLengths
from qlora_trainer.planning.make_plan import make_plan
from qlora_trainer.planning.plan import Plan
from qlora_trainer.run.folder import open_run_folder
from qlora_trainer.run.prepare import prepare
from qlora_trainer.run.session import Session
from qlora_trainer.step.batch import make_micro_batch
from qlora_trainer.step.train_step import accumulate_gradients

BATCH = 8
LEAST_SHARE = 0.9
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Layout:
    """What a step may look like: tokens of a micro-batch, layers recomputed, positions in a chunk of the loss."""

    micro_batch_tokens: int
    num_recomputed: int
    loss_chunk: int


def plan_for(overrides: Sequence[str], base: Base, lengths: Sequence[int], budget_bytes: int) -> Plan:
    """A plan for this machine's CPU, with the interpreter's usual bytes, so that plans can be compared."""
    config = load_config(None, list(overrides))
    documents = DocumentLengths.of(lengths, seq_len=max(lengths), global_batch_size=BATCH)
    return make_plan(config, cpu_budget(budget_bytes), model_config=base.config, documents=documents)


def pinned(layout: Layout) -> list[str]:
    """Overrides that leave a plan no choice."""
    return [
        f"memory.micro_batch_tokens={layout.micro_batch_tokens}",
        f"memory.activation_checkpointing={layout.num_recomputed}",
        f"memory.loss_chunk_tokens={layout.loss_chunk}",
    ]


def layout_of(plan: Plan) -> Layout:
    """What a plan has chosen."""
    knobs = plan.knobs
    return Layout(knobs.micro_batch_tokens, knobs.activation_recompute_layers, knobs.loss_chunk)


def open_session(config: RunConfig, folder: Path) -> Session:
    """A run that is ready for its first step."""
    with open_run_folder(folder, resume=False) as run_folder:
        preparing = prepare(config, run_folder, resume=None)
        while True:
            try:
                next(preparing)
            except StopIteration as stop:
                session: Session = stop.value
                return session


def time_step(session: Session, layout: Layout, predicted_bytes: int) -> tuple[float, int]:
    """Seconds of one step over a global batch and its peak of resident memory in bytes, of predicted ones."""
    recompute_layers(session.model, layout.num_recomputed)
    session.model.resident_limit.limit_bytes = predicted_bytes - UNASKED_BYTES
    session.model.resident_limit.patience_bytes = 0
    session.model.resident_limit.make_room(predicted_bytes)
    forget_peak(session.device)
    documents = session.train_data.documents[:BATCH]
    positions = cut([document.num_tokens for document in documents], layout.micro_batch_tokens)
    micro_batches = [
        make_micro_batch([documents[position] for position in chosen], seed=0, step=0, packing=True)
        for chosen in positions
    ]
    supervised = sum(document.num_supervised_tokens for document in documents)
    accumulate = functools.partial(
        accumulate_gradients,
        session.model,
        num_supervised_tokens=supervised,
        loss_chunk_tokens=layout.loss_chunk,
    )
    accumulate(micro_batches[:1])  # what a layout takes is mapped already in all but a run's first micro-batch
    session.optimizer.zero_gradients()
    start = time.perf_counter()
    accumulate(micro_batches)
    session.optimizer.clip_gradients(1.0)
    session.optimizer.update(1e-6)
    return time.perf_counter() - start, process_peak_bytes()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_choice", description="The planner's choice.")
    parser.add_argument("--base", default=SMOLLM2)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="plan-choice-", dir=chosen.folder) as temporary:
        folder = Path(temporary)
        overrides = small_run(folder, chosen.base, seq_len=chosen.seq_len, batch=BATCH)
        config = load_config(None, [*overrides, f"output.dir={folder / 'run'}"])
        lengths = [int(config.data.seq_len)] * BATCH
        base = resolve_base(config.model.base)
        smallest, fastest = (plan_for(overrides, base, lengths, size) for size in (INTERPRETER_BYTES, 2**34))
        most = fastest.predicted.process_peak_bytes
        budgets = between(smallest.predicted.process_peak_bytes, most, 5)[1:4]
        choices = {budget: plan_for(overrides, base, lengths, budget) for budget in budgets}
        num_layers = fastest.knobs.activation_keep_layers + fastest.knobs.activation_recompute_layers
        grid = [
            Layout(documents * max(lengths), recomputed, chunk)
            for documents, recomputed, chunk in itertools.product(
                (1, 2, 4, 8), (0, num_layers // 2, num_layers), (64, 512)
            )
        ]
        needed = {
            layout: plan_for([*overrides, *pinned(layout)], base, lengths, 2**34).predicted.process_peak_bytes
            for layout in grid
        }
        needed |= {layout_of(plan): plan.predicted.process_peak_bytes for plan in choices.values()}
        # The plans count on a process that has done nothing else; this one has made thirty plans.
        gc.collect()
        release_free_memory()
        excess_bytes = resident_bytes() - INTERPRETER_BYTES
        session = open_session(config, folder / "run")
        limits = {layout: num_bytes + excess_bytes for layout, num_bytes in needed.items()}
        times = _measure(session, limits, chosen.rounds)
    speeds = {layout: sum(lengths) / statistics.median(taken) for layout, taken in times.items()}
    _print_layouts(needed, times, speeds)
    shares = [_print_choice(plan, budget, needed, speeds, grid) for budget, plan in choices.items()]
    if chosen.json:
        rows = [asdict(layout) | {"needed_bytes": needed[layout], "seconds": times[layout]} for layout in needed]
        chosen.json.write_text(json.dumps({"layouts": rows, "shares": shares}, indent=1))
    return 0 if all(share >= LEAST_SHARE for share in shares) else 1


def _measure(session: Session, limits: Mapping[Layout, int], rounds: int) -> dict[Layout, list[float]]:
    times: dict[Layout, list[float]] = {layout: [] for layout in limits}
    order = list(limits)
    for number in range(rounds):
        random.Random(number).shuffle(order)
        for layout in order:
            seconds, peak = time_step(session, layout, limits[layout])
            times[layout].append(seconds)
            print(f"{number} {layout}: {seconds:.2f} s, {peak / MIB:,.0f} MiB", file=sys.stderr, flush=True)
    return times


def _print_layouts(
    needed: Mapping[Layout, int], times: Mapping[Layout, Sequence[float]], speeds: Mapping[Layout, float]
) -> None:
    print("| micro-batch tokens | recomputed | loss chunk | planned MiB | tokens/s | from | to |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for layout in sorted(needed, key=lambda layout: needed[layout]):
        tokens = speeds[layout] * statistics.median(times[layout])
        print(
            f"| {layout.micro_batch_tokens:,} | {layout.num_recomputed} | {layout.loss_chunk} | "
            f"{needed[layout] / MIB:,.0f} | {speeds[layout]:.1f} | {tokens / max(times[layout]):.1f} | "
            f"{tokens / min(times[layout]):.1f} |"
        )


def _print_choice(
    plan: Plan, budget: int, needed: Mapping[Layout, int], speeds: Mapping[Layout, float], grid: Sequence[Layout]
) -> float:
    """The choice's speed as a share of the fastest of the grid that fits."""
    best = max((layout for layout in grid if needed[layout] <= budget), key=lambda layout: speeds[layout])
    share = speeds[layout_of(plan)] / speeds[best]
    print(f"{budget / MIB:,.0f} MiB: {layout_of(plan)}, planned {plan.predicted.tokens_per_second:.1f} tokens/s")
    print(f"    measured {speeds[layout_of(plan)]:.1f}; of the grid {best}: {speeds[best]:.1f}; {share:.1%}")
    return share


if __name__ == "__main__":
    sys.exit(main())

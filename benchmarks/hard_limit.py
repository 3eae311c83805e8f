"""Runs in a control group whose memory limit is the budget: no kill, and the budget is used.

    python -m benchmarks.hard_limit [--base smollm2-135m] [--seq-len 256] [--budgets 10] [--with-levers] [--json FILE]

The smallest budget is what the smallest plan needs, as `train` itself says; the largest is a little above what the
fastest plan needs; the others lie between, in equal ratios. Each run, in a process of its own, has an evaluation before
and after, four steps in fp32 (the first at a learning rate of 0) and a checkpoint. Must be run by a user who may make
control groups (root, as a rule).

Each run measures the machine's speed for itself, so their estimates of time differ. Here one speed is measured, and
with it every layout is estimated (each multiple of 64 tokens, each chunk, each number of kept layers, far more than a
search tries): the table has the chosen one's speed, and that of the fastest that fits the budget. `--with-levers`
leaves the levers to the plan, too; then layouts are those of each set of levers that a search tries.

Exit code 1 if a run does not end well, if the kernel ended a process of the group (its own counter says so), or if a
plan leaves more than 15 % of its budget although a layout that is more than 2 % faster would fit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.plan_accuracy_inputs import ARCHITECTURES, SMOLLM2, write_base, write_documents
from qlora_trainer.config.sizes import parse_size_bytes
from qlora_trainer.planning.price import Layout
from tests.hardware.memory_group import memory_group

REPOSITORY = Path(__file__).parents[1]
MIB = 2**20
LEAST_USED_SHARE = 0.85
LEAST_OF_FASTEST = 0.98  # of the fastest that fits: what two measurements of the machine's speed may differ by
RANK = 16  # the default
IN_FP32 = "quantization.compute_dtype=float32"  # losses of different cuts are compared
NO_LEVERS = (
    "memory.activation_offload=false",
    "memory.tile_tokens=0",
    "memory.embedding_residency=device",
    "memory.base_residency=device",
)
# The plan asks what its own process takes, and `train` imports a little more than what plans here.
SPARE_BYTES = 12 * MIB
_PLAN = """
import json, sys
from qlora_trainer.config.load import load_config
from qlora_trainer.run.dry_run import dry_run
*_, plan = dry_run(load_config(None, json.loads(sys.argv[1])))
print(json.dumps(plan.as_json()))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One run under a limit.

    Attributes:
        budget_bytes: the limit of the group, and `memory.budget`.
        exit_code: of the process; negative, the signal that ended it.
        num_kills: processes of the group that the kernel ended for want of memory.
        planned_bytes, measured_bytes: resident peak by plan and by kernel; 0 for a run that did not end well.
        knobs: the plan's choice, as in `Estimated`.
        losses: of the steps.
        eval_losses: of held-out rows, before and after.
    """

    budget_bytes: int
    exit_code: int
    num_kills: int
    planned_bytes: int = 0
    measured_bytes: int = 0
    knobs: Knobs | None = None
    losses: tuple[float, ...] = ()
    eval_losses: tuple[float, ...] = ()

    @property
    def is_used(self) -> bool:
        return self.planned_bytes >= LEAST_USED_SHARE * self.budget_bytes

    def is_right(self, layouts: Sequence[Estimated]) -> bool:
        """It ended well, and used its budget if anything faster fits."""
        is_fastest = self.tokens_per_second(layouts) >= LEAST_OF_FASTEST * self.fastest(layouts)
        return self.exit_code == 0 and self.num_kills == 0 and (self.is_used or is_fastest)

    def tokens_per_second(self, layouts: Sequence[Estimated]) -> float:
        """Of its layout, at the one speed of `layouts`; 0 for a run that did not end well."""
        own = self._own(layouts)
        return 0.0 if own is None else own.tokens_per_second

    def fastest(self, layouts: Sequence[Estimated]) -> float:
        """Tokens a second of the fastest of `layouts` that fits the budget, where its own takes what was planned."""
        own = self._own(layouts)
        interpreter_bytes = 0 if own is None else self.planned_bytes - own.process_bytes  # more, or less, than here
        fitting = (one for one in layouts if one.process_bytes + interpreter_bytes <= self.budget_bytes)
        return max((one.tokens_per_second for one in fitting), default=0.0)

    def _own(self, layouts: Sequence[Estimated]) -> Estimated | None:
        return next((one for one in layouts if one.knobs == self.knobs), None)


class Knobs(NamedTuple):
    """What a plan decides."""

    micro_batch_tokens: int
    kept_layers: int
    offloaded_layers: int
    loss_chunk: int
    tile_tokens: int
    embedding_residency: str
    base_residency: str

    @property
    def levers(self) -> str:
        """What is pulled, in words."""
        words = {
            f"{self.offloaded_layers} offloaded": self.offloaded_layers,
            "tiles": self.tile_tokens,
            "tables": self.embedding_residency == "host",
            "streamed": self.base_residency == "streamed",
        }
        return ", ".join(word for word, is_pulled in words.items() if is_pulled)


@dataclass(frozen=True, slots=True)
class Estimated:
    """A layout, what a process with it takes, and its speed."""

    knobs: Knobs
    process_bytes: int
    tokens_per_second: float


def estimate_all(overrides: Sequence[str]) -> list[Estimated]:
    """Every layout, at one speed of this machine."""
    from qlora_trainer.config.load import load_config
    from qlora_trainer.hardware.device import choose_device
    from qlora_trainer.planning.planner import Planner
    from qlora_trainer.planning.rungs import tried
    from qlora_trainer.planning.search import layout_of
    from qlora_trainer.run.inputs import read_inputs
    from qlora_trainer.run.knobs import decide_machine_knobs
    from qlora_trainer.run.planned import budget_of, documents_of
    from qlora_trainer.step.batch import ROW_MULTIPLE
    from tests.returned import returned

    config = load_config(None, overrides)
    machine = decide_machine_knobs(config, choose_device())
    inputs = returned(read_inputs(config))
    documents = documents_of(inputs, config.training.global_batch_size)
    planner = Planner.of(
        config, budget_of(config, machine), inputs.base.config, documents, packing=inputs.base.can_pack
    )
    space = planner.space(config.lora.rank if isinstance(config.lora.rank, int) else 16, documents.seq_len)
    found = []
    ranges = (range(space.tokens[0], space.tokens[-1] + 1, ROW_MULTIPLE), space.loss_chunks)
    for own in tried(space, planner.levers()):
        for tokens, chunk, policy in itertools.product(*ranges, range(own.num_policies)):
            layout = layout_of(own, tokens, chunk, *own.policy(policy))
            used = planner.price(layout, own.optimizer)
            process_bytes = planner.budget.memory.process_bytes(used.peak_bytes, used.paged_bytes)
            found.append(Estimated(_knobs(layout, planner.dry.num_layers), process_bytes, planner.estimate(layout)))
    return found


def _knobs(layout: Layout, num_layers: int) -> Knobs:
    return Knobs(
        micro_batch_tokens=layout.tokens,
        kept_layers=num_layers - layout.num_recomputed,
        offloaded_layers=layout.num_offloaded,
        loss_chunk=layout.loss_chunk,
        tile_tokens=layout.levers.tile_tokens,
        embedding_residency=layout.levers.embedding_residency,
        base_residency=layout.levers.base_residency,
    )


def smallest_and_fastest(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The plans, as JSON, of a budget that nothing fits and of one that everything does."""
    smallest = _planned((*overrides, "memory.budget=64MiB"))
    return smallest, _planned((*overrides, "memory.budget=16GiB"))


def _planned(overrides: Sequence[str]) -> dict[str, Any]:
    printed = subprocess.run(
        [sys.executable, "-c", _PLAN, json.dumps(overrides)], cwd=REPOSITORY, check=True, stdout=subprocess.PIPE
    ).stdout
    plan: dict[str, Any] = json.loads(printed)
    return plan


def run_limited(overrides: Sequence[str], budget_bytes: int, folder: Path) -> Outcome:
    """`train` with these overrides, in a group of `budget_bytes`."""
    options = [*overrides, f"memory.budget={budget_bytes}B", f"output.dir={folder}"]
    command = [sys.executable, "-m", "qlora_trainer.cli", "train"]
    command += [part for text in options for part in ("--set", text)]
    with memory_group(budget_bytes) as group:
        # The shell waits until it is in the group, then becomes the run.
        child = subprocess.Popen(
            ["sh", "-c", 'read -r go && exec "$@"', "sh", *command],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
        )
        group.add(child.pid)
        child.communicate(b"go\n")
        num_kills = group.num_kills()
    if child.returncode != 0:
        return Outcome(budget_bytes=budget_bytes, exit_code=child.returncode, num_kills=num_kills)
    summary = json.loads((folder / "summary.json").read_text())
    plan = json.loads((folder / "plan.json").read_text())
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return Outcome(
        budget_bytes=budget_bytes,
        exit_code=0,
        num_kills=num_kills,
        planned_bytes=plan["predicted"]["process_peak_bytes"],
        measured_bytes=summary["measured_peak_bytes"],
        knobs=Knobs(
            micro_batch_tokens=plan["knobs"]["micro_batch_tokens"],
            kept_layers=plan["knobs"]["activation_keep_layers"],
            offloaded_layers=plan["knobs"]["activation_offload_layers"],
            loss_chunk=plan["knobs"]["loss_chunk"],
            tile_tokens=plan["knobs"]["tile_tokens"],
            embedding_residency=plan["knobs"]["embedding_residency"],
            base_residency=plan["knobs"]["base_residency"],
        ),
        losses=tuple(line["loss"] for line in lines if "loss" in line),
        eval_losses=(summary["eval_loss_before"], summary["eval_loss_after"]),
    )


def between(smallest: int, largest: int, count: int) -> list[int]:
    """`count` numbers from one to the other, in equal ratios."""
    return [round(smallest * (largest / smallest) ** (index / max(1, count - 1))) for index in range(count)]


def _row(outcome: Outcome, layouts: Sequence[Estimated]) -> str:
    knobs = outcome.knobs or Knobs(0, 0, 0, 0, 0, "", "")
    ending = "ended well" if outcome.exit_code == 0 else f"exit code {outcome.exit_code}"
    if outcome.exit_code == -signal.SIGKILL or outcome.num_kills:
        ending = "KILLED"
    cells = (
        f"{outcome.budget_bytes / MIB:,.0f}",
        f"{outcome.planned_bytes / MIB:,.0f} ({outcome.planned_bytes / outcome.budget_bytes:.0%})",
        f"{outcome.measured_bytes / MIB:,.0f} ({outcome.measured_bytes / outcome.budget_bytes:.0%})",
        f"{knobs.micro_batch_tokens:,}",
        str(knobs.kept_layers),
        f"{knobs.loss_chunk:,}",
        knobs.levers,
        f"{outcome.tokens_per_second(layouts):,.0f}",
        f"{outcome.fastest(layouts):,.0f}",
        " ".join(f"{loss:.5f}" for loss in outcome.losses),
        ending,
    )
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hard_limit", description="Budgets as hard limits.")
    parser.add_argument("--base", default=SMOLLM2, help=f"an alias, a folder, or one of {', '.join(ARCHITECTURES)}")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="documents in a global batch")
    parser.add_argument("--budgets", type=int, default=10)
    parser.add_argument("--with-levers", action="store_true", help="leave them to the plan")
    parser.add_argument("--largest", help="the largest budget, such as 1GiB, in place of the fastest plan's")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="hard-limit-", dir=chosen.folder) as temporary:
        folder = Path(temporary)
        size = {"seq_len": chosen.seq_len, "batch": chosen.batch}
        overrides = [*small_run(folder, chosen.base, **size, with_levers=chosen.with_levers), IN_FP32]
        run_limited(overrides, 16 * 2**30, folder / "warm")  # the NF4 cache is made
        smallest, fastest = smallest_and_fastest(overrides)
        layouts = estimate_all(overrides)
        least, most = (plan["predicted"]["process_peak_bytes"] + SPARE_BYTES for plan in (smallest, fastest))
        largest = round(1.05 * most) if chosen.largest is None else parse_size_bytes(chosen.largest)
        titles = ("budget, MiB", "plan", "measured", "micro-batch tokens", "layers kept", "chunk", "levers")
        print(f"| {' | '.join((*titles, 'tokens/s', 'best', 'losses'))} | |")
        print("|---:|---:|---:|---:|---:|---:|---|---:|---:|---|---|")
        for number, budget in enumerate(between(least, largest, chosen.budgets)):
            outcomes.append(run_limited(overrides, budget, folder / f"run-{number}"))
            print(_row(outcomes[-1], layouts), flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes]))
    return 0 if all(outcome.is_right(layouts) for outcome in outcomes) else 1


def small_run(folder: Path, base: str, *, seq_len: int, batch: int, with_levers: bool = False) -> list[str]:
    """Overrides of a run of four steps, of `batch` documents of `seq_len` tokens each; its data are written.

    Without levers, none is pulled.
    """
    from qlora_trainer.model.base import read_tokenizer, resolve_base

    if base in ARCHITECTURES:
        base = str(write_base(folder / base, base))
    tokenizer = read_tokenizer(resolve_base(base).folder)
    train, held_out = folder / "train.jsonl", folder / "eval.jsonl"
    lengths = write_documents(train, tokenizer, num_tokens=seq_len, count=4 * batch)
    write_documents(held_out, tokenizer, num_tokens=seq_len, count=batch)
    return [
        f"model.base={base}",
        f"data.train={train}",
        f"data.eval={held_out}",
        f"data.seq_len={max(lengths)}",
        f"training.global_batch_size={batch}",
        "training.max_steps=4",
        "training.learning_rate=1e-3",
        "output.sample_questions=1",
        *(() if with_levers else NO_LEVERS),
    ]


if __name__ == "__main__":
    sys.exit(main())

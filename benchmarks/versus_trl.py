"""Ours beside TRL + PEFT + bitsandbytes at its fastest and at its smallest: tokens a second, memory, held-out loss.

    python -m benchmarks.versus_trl --data FILE [--rows 64] [--repeats 3] [--steps N] [--json FILE]

First TRL's forms compete on few rows (`versus_forms.py`; about half an hour on two cores), unless they are named
(`--forms`) or FILE of `--json` has a choice for the same model, rows, machine and versions. Then, in rounds of
processes of their own, one after the other: TRL's fastest form, ours, TRL's smallest form, ours with `memory.budget`
such that half of TRL's smallest is left above the imports, ours at the smallest budget that the planner accepts. Where
losses are scored, one of TRL's forms takes the rows in our order: 1-plain is added if no other one does.

Both sides have the same NF4 weights, new adapter, rows, order (where grouping or packing does not change it),
effective batch, steps, rank, learning rate, warm-up, schedule, weight decay, clip and thread settings; each round has
another seed. The environment, MALLOC_* included, is the same, too, but not what malloc does by it: ours calls
`mallopt` itself for M_MMAP_MAX, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD (`hardware/heap.py`), whatever the environment
says of the first and the last, and unless MALLOC_MMAP_THRESHOLD_ is set. Time runs from the beginning of training to
the end of the last step (TRL: `on_train_begin` to the last `on_step_end`; ours: `Prepared` to the last `StepDone`,
with no evaluation and no save between); ours has rehearsed a step by then, as TRL has not, so the figures without the
first step are told, too. Memory, `peak_rss_bytes`, is the process's VmHWM minus what was resident after its imports;
of ours the planning and loading are part. Losses are scored by our evaluation in fp32. Packed rows are as many a step
as hold the tokens of the effective batch.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.hard_limit import SPARE_BYTES, smallest_and_fastest
from benchmarks.machine import describe, describe_in_words
from benchmarks.versus_forms import Form, parse_form, with_our_order
from benchmarks.versus_inputs import Inputs, InputSpec
from benchmarks.versus_report import PEER, Round, figures, table, taken_bytes
from benchmarks.versus_runs import DOES_NOT_FIT, FIRST_STEPS, Bench, FirstPass

RESULTS = Path(__file__).parent / "results" / "versus_trl.md"
MORE_BUDGET_BYTES, BUDGET_TRIES = 8 * 2**20, 12


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.versus_trl", description="Ours beside TRL.")
    parser.add_argument("--data", required=True, help="conversations, such as JSON Lines of question and answer")
    parser.add_argument("--rows", type=int, default=64, help="to train on")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--steps", type=int, help="of the optimizer; default: once over the rows")
    parser.add_argument("--json", type=Path, help="write every figure here; a choice of forms in it is used again")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=8, help="documents a step, the effective batch")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=200, help="rows to evaluate on")
    parser.add_argument("--equal-length", action="store_true", help="rows of nearly the same length: nothing to pad")
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument(
        "--forms",
        nargs="+",
        type=parse_form,
        metavar="FORM",
        help="TRL's, no others: the first pairs with ours at full speed; such as 1-plain-keep-fp32-nommap",
    )
    parser.add_argument("--first-pass", action="store_true", help="choose anew, whatever the JSON file says")
    parser.add_argument("--first-pass-minutes", type=float, default=30.0)
    parser.add_argument("--ours-malloc", choices=("same", "none"), default="same", help="as TRL's, or no variable set")
    parser.add_argument("--ours-set", nargs="*", default=[], metavar="KEY=VALUE", help="further overrides of ours")
    parser.add_argument("--table", type=Path, default=RESULTS)
    parser.add_argument("--folder", type=Path, help="work here and leave everything, with all logs")
    chosen = parser.parse_args(arguments)
    with ExitStack() as stack:
        folder = chosen.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="versus-trl-")))
        folder.mkdir(parents=True, exist_ok=True)
        bench = _bench(chosen, folder.resolve())
        print(f"{bench.inputs.num_rows} rows, {bench.inputs.num_tokens} tokens", file=sys.stderr)
        forms, choice = _forms(chosen, bench)
        if bench.spec.num_held_out:
            forms = with_our_order(forms)
        if chosen.json and choice["trials"]:
            chosen.json.write_text(json.dumps({"choice": choice}, indent=1) + "\n")  # whatever becomes of the rounds
        report: dict[str, Any] = {}
        rounds: list[dict[str, dict[str, Any]]] = []
        budgets: dict[str, int] = {}
        for seed in bench.spec.seeds:
            rounds.append(_round(chosen, bench, forms, seed, budgets, is_first=not rounds))
            report = _report(chosen, bench, rounds, choice)
            _write(report, chosen)
        base_loss = _score(bench, rounds)
        report = _report(chosen, bench, rounds, choice, base_loss)
        _write(report, chosen)
        print(table(report))
    return 0


def _bench(chosen: argparse.Namespace, folder: Path) -> Bench:
    num_steps = chosen.steps or math.ceil(chosen.rows / chosen.batch)
    spec = InputSpec(
        data=str(Path(chosen.data).resolve()),
        model=chosen.model,
        num_rows=chosen.rows,
        documents_per_step=chosen.batch,
        num_steps=num_steps,
        rank=chosen.rank,
        seeds=tuple(range(chosen.seed, chosen.seed + chosen.repeats)),
        num_held_out=chosen.held_out,
        max_length=chosen.max_length,
        is_equal_length=chosen.equal_length,
    )
    empty = Bench(folder=folder, spec=spec, inputs=Inputs.nothing())
    told = empty.child("versus_inputs", asdict(spec))
    if "error" in told:
        raise SystemExit(f"no inputs: {told['error']}")
    del told["process_seconds"]
    return Bench(folder=folder, spec=spec, inputs=Inputs(**told))


def _forms(chosen: argparse.Namespace, bench: Bench) -> tuple[list[Form], dict[str, Any]]:
    """TRL's forms for the rounds, and what the JSON says of the choice."""
    conditions = _choice_conditions(chosen, bench)
    before = json.loads(chosen.json.read_text()).get("choice") if chosen.json and chosen.json.exists() else None
    if chosen.forms:
        forms = list(chosen.forms)
        impossible = [form.name for form in forms if not bench.is_possible(form)]
        if impossible:
            raise SystemExit(f"{', '.join(impossible)}: not with {chosen.batch} documents a step")
        return forms, {"forms": [form.name for form in forms], "conditions": None, "trials": [], "not_tried": []}
    if before and before["conditions"] == conditions and not chosen.first_pass:
        print(f"chosen before: {', '.join(before['forms'])}", file=sys.stderr)
        return [parse_form(name) for name in before["forms"]], before
    competition = FirstPass(bench, seconds=60 * chosen.first_pass_minutes)
    forms = list(dict.fromkeys(competition.choose()))
    trials = [*competition.trials.values(), *competition.longer.values()]
    return forms, {
        "forms": [form.name for form in forms],
        "conditions": conditions,
        "trials": [trial.as_json() for trial in trials],
        "not_tried": [form.name for form in dict.fromkeys(competition.not_tried)],
    }


def _choice_conditions(chosen: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    machine = describe()
    same = {key: machine[key] for key in ("cpu", "cores", "threads", "versions")}
    options = {key: getattr(chosen, key) for key in ("model", "batch", "rank", "max_length", "equal_length")}
    return same | options | {"data": Path(bench.spec.data).name, "first_steps": FIRST_STEPS}


def _round(
    chosen: argparse.Namespace,
    bench: Bench,
    forms: Sequence[Form],
    seed: int,
    budgets: dict[str, int],
    *,
    is_first: bool,
) -> dict[str, dict[str, Any]]:
    """Every side once; the smallest budget is found in the first round and kept in `budgets`."""
    made: dict[str, dict[str, Any]] = {}

    def peer(form: Form) -> None:
        adapter = bench.folder / f"adapter-{seed}-{form.name}"
        _, told = bench.peer(form, seed=seed, adapter=str(adapter))
        made[PEER + form.name] = told | {"adapter": str(adapter), "seed": seed}
        _tell(PEER + form.name, made)

    def ours(side: str, form: Form, *budget: str) -> dict[str, Any]:
        environment = form.environment if chosen.ours_malloc == "same" else {}
        told = bench.ours([*budget, *chosen.ours_set], seed=seed, environment=environment)
        made[side] = told | {"seed": seed}
        _tell(side, made)
        return told

    peer(forms[0])
    ours("ours", forms[0])
    for form in forms[1:]:
        peer(form)
    smallest = min(forms, key=lambda form: taken_bytes(made[PEER + form.name]))
    if "smallest" not in budgets:
        plan, _ = smallest_and_fastest([*bench.overrides(seed), *chosen.ours_set])
        budgets["smallest"] = plan["predicted"]["process_peak_bytes"] + SPARE_BYTES
    for _ in range(BUDGET_TRIES if is_first else 1):
        told = ours("ours_smallest", smallest, f"memory.budget={budgets['smallest']}B")
        if told.get("exit_code") != DOES_NOT_FIT:
            break
        budgets["smallest"] += MORE_BUDGET_BYTES
    # Of this round, as TRL's peak goes with the longest row and its neighbours. The imports take some 80 MB less where
    # malloc maps nothing: as they were in the same environment.
    allowed = taken_bytes(made[PEER + smallest.name]) / 2
    import_bytes = made["ours_smallest"].get("import_bytes", 0)
    half = int(import_bytes + allowed) if math.isfinite(allowed) else SPARE_BYTES
    ours("ours_half", smallest, f"memory.budget={half}B")
    return made


def _tell(side: str, made: Round) -> None:
    run = made[side]
    seconds, tokens = sum(run.get("seconds_of_steps", ())), sum(run.get("tokens_of_steps", ()))
    speed = tokens / seconds if seconds else 0.0
    taken = taken_bytes(run) / 2**20
    told = run.get("error") or f"{speed:.1f} tokens/s, {taken:,.0f} MiB above imports"
    print(f"{side}, seed {run['seed']}: {told}", file=sys.stderr, flush=True)


def _score(bench: Bench, rounds: Sequence[dict[str, dict[str, Any]]]) -> float | None:
    """Put "eval_loss" into the runs; returns the base's. Other budgets learn the same: they are scored once."""
    runs = [
        run
        for number, each in enumerate(rounds)
        for side, run in each.items()
        if not run.get("error") and (number == 0 or side not in ("ours_half", "ours_smallest"))
    ]
    if not bench.inputs.num_held_out or not runs:
        return None
    spec = {
        "model": bench.spec.model,
        "held_out": str(bench.folder / "held_out.jsonl"),
        "adapters": [run["adapter"] for run in runs],
    }
    told = bench.child("versus_score", spec)
    if "error" in told:
        print(f"no losses: {told['error']}", file=sys.stderr)
        return None
    for run, loss in zip(runs, told["eval_losses"], strict=True):
        run["eval_loss"] = loss
    base_loss: float = told["base_eval_loss"]
    return base_loss


def _report(
    chosen: argparse.Namespace,
    bench: Bench,
    rounds: Sequence[Round],
    choice: dict[str, Any],
    base_loss: float | None = None,
) -> dict[str, Any]:
    asked, inputs = asdict(bench.spec), asdict(bench.inputs)
    conditions = {
        **{key: asked[key] for key in ("documents_per_step", "num_steps", "max_length", "rank", "is_equal_length")},
        **{key: inputs[key] for key in ("num_rows", "num_held_out", "mean_tokens", "longest_tokens", "num_tokens")},
        "model": Path(bench.spec.model).name,  # of a folder, no more than that
        "data": Path(bench.spec.data).name,
        "base_eval_loss": base_loss,
        "ours_malloc": chosen.ours_malloc,
        "ours_set": chosen.ours_set,
    }
    return figures(rounds) | {
        "conditions": conditions,
        "choice": choice,
        "machine": describe(),
        "machine_in_words": describe_in_words(),
    }


def _write(report: dict[str, Any], chosen: argparse.Namespace) -> None:
    """After each round, since the whole takes long."""
    chosen.table.parent.mkdir(parents=True, exist_ok=True)
    chosen.table.write_text(table(report))
    if chosen.json:
        chosen.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

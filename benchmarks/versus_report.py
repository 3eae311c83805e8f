"""The figures of `versus_trl.py`, from its rounds: JSON and a table. No torch.

A round is a dict side -> run; sides are "ours", "ours_half", "ours_smallest" and "trl:FORM". A run has at least
"tokens_of_steps", "seconds_of_steps", "import_bytes", "peak_bytes", and "error" where it did not end.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.versus_forms import parse_form

MIB = 2**20
PEER = "trl:"
Run = Mapping[str, Any]
Round = Mapping[str, Run]


def speed(run: Run) -> float:
    """Real tokens a second, from the beginning of training to the end of its last step; 0 for a run that failed."""
    return _rate(run, 0)


def later_speed(run: Run) -> float:
    """The same without the first step, in which the peer warms up (and compiles); ours has rehearsed before."""
    return _rate(run, 1)


def taken_bytes(run: Run) -> float:
    """Peak above what the imports left resident; infinite for a run that failed."""
    return float(run["peak_bytes"] - run["import_bytes"]) if has_ended(run) else float("inf")


def has_ended(run: Run) -> bool:
    """Whether it trained to its end."""
    return not run.get("error") and bool(run.get("seconds_of_steps"))


def _rate(run: Run, first: int) -> float:
    if not has_ended(run):
        return 0.0
    seconds = sum(run["seconds_of_steps"][first:])
    return float(sum(run["tokens_of_steps"][first:]) / seconds) if seconds else 0.0


def median_of(rounds: Sequence[Round], side: str, figure: Callable[[Run], float]) -> float:
    """Of the rounds in which the side ran."""
    return statistics.median(figure(each[side]) for each in rounds if side in each)


def median_ratio(rounds: Sequence[Round], side: str, other: str, figure: Callable[[Run], float]) -> float:
    """The median over the rounds of one side's figure over the other's in the same round."""
    ratios = []
    for each in rounds:
        if side in each and other in each:
            mine, theirs = figure(each[side]), figure(each[other])
            ratios.append(mine / theirs if theirs else float("nan"))
    return statistics.median(ratios)


def fastest_and_smallest(rounds: Sequence[Round]) -> tuple[str, str]:
    """Sides of the peer."""
    sides = [side for side in rounds[0] if side.startswith(PEER)]
    return (
        max(sides, key=lambda side: median_of(rounds, side, speed)),
        min(sides, key=lambda side: median_of(rounds, side, taken_bytes)),
    )


def in_our_order(rounds: Sequence[Round]) -> str | None:
    """The first side of the peer that takes the rows in our order; None if none does."""
    sides = (side for side in rounds[0] if side.startswith(PEER))
    return next((side for side in sides if parse_form(side.removeprefix(PEER)).is_in_our_order), None)


def side_json(rounds: Sequence[Round], side: str) -> dict[str, Any]:
    """Medians of one side, and what they are of; the loss is the mean over the rounds, each of which has its seed."""
    runs = [each[side] for each in rounds if side in each]
    losses = [run["eval_loss"] for run in runs if run.get("eval_loss") is not None]
    taken = median_of(rounds, side, taken_bytes)
    return {
        "tokens_per_second": median_of(rounds, side, speed),
        "peak_rss_bytes": int(taken) if taken != float("inf") else None,
        "eval_loss": statistics.fmean(losses) if losses else None,
        "form": side.removeprefix(PEER) if side.startswith(PEER) else runs[0].get("knobs", {}),
        "later_tokens_per_second": median_of(rounds, side, later_speed),
        "process_seconds": statistics.median(run["process_seconds"] for run in runs),
        "import_bytes": statistics.median(run.get("import_bytes", 0) for run in runs),
        "errors": [run["error"] for run in runs if run.get("error")],
        "eval_losses": losses,
        "runs": runs,
    }


def figures(rounds: Sequence[Round]) -> dict[str, Any]:
    """Everything that the JSON says of the rounds."""
    fastest, smallest = fastest_and_smallest(rounds)
    made: dict[str, Any] = {
        "speed_ratio": median_ratio(rounds, "ours", fastest, speed),
        "memory_ratio": median_ratio(rounds, "ours", smallest, taken_bytes),
        "smallest_memory_ratio": median_ratio(rounds, "ours_smallest", smallest, taken_bytes),
        "ours": side_json(rounds, "ours"),
        "trl_fastest": side_json(rounds, fastest),
        "trl_smallest": side_json(rounds, smallest),
        "later_speed_ratio": median_ratio(rounds, "ours", fastest, later_speed),
        "half_memory_ratio": median_ratio(rounds, "ours_half", smallest, taken_bytes),
        "half_speed_ratio": median_ratio(rounds, "ours_half", fastest, speed),
        "smallest_speed_ratio": median_ratio(rounds, "ours_smallest", fastest, speed),
        "ours_half": side_json(rounds, "ours_half"),
        "ours_smallest": side_json(rounds, "ours_smallest"),
        "num_rounds": len(rounds),
    }
    same_order = in_our_order(rounds)
    made["trl_in_our_order"] = None if same_order is None else side_json(rounds, same_order)
    ours, theirs = made["ours"]["eval_loss"], same_order and made["trl_in_our_order"]["eval_loss"]
    made["loss_ratio_in_our_order"] = ours / theirs if ours and theirs else None
    finite: dict[str, Any] = without_infinities(made)
    return finite


def without_infinities(value: Any) -> Any:
    """The same with None for numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: without_infinities(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_infinities(inner) for inner in value]
    return None if isinstance(value, float) and value - value != 0 else value


def table(report: Mapping[str, Any]) -> str:
    """Markdown: what was run, and each side's medians beside TRL's fastest and smallest."""
    conditions, choice = report["conditions"], report["choice"]
    lines = [
        "# Ours beside TRL + PEFT + bitsandbytes",
        "",
        report["machine_in_words"],
        "",
        f"{conditions['model']}, {conditions['num_rows']} rows of {conditions['data']}"
        f"{' of nearly equal length' * bool(conditions['is_equal_length'])} ({conditions['mean_tokens']:.0f} tokens on "
        f"average, {conditions['longest_tokens']} at most, max_length {conditions['max_length']}), "
        f"{conditions['num_steps']} steps of {conditions['documents_per_step']} documents, rank {conditions['rank']}; "
        f"medians of {report['num_rounds']} interleaved rounds, a seed each. Tokens/s: real tokens from the beginning "
        "of training to the end of the last step. MiB: the process's peak (VmHWM) above what its imports left "
        f"resident. Loss: on {conditions['num_held_out']} held-out rows, by our evaluation; the base alone has "
        f"{_number(conditions['base_eval_loss'], '.4f')}.",
        "",
        "| | tokens/s | of TRL's fastest | without the first step | MiB | of TRL's smallest | loss | |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    fastest, smallest = report["trl_fastest"], report["trl_smallest"]
    for name in ("trl_fastest", "trl_smallest", "trl_in_our_order", "ours", "ours_half", "ours_smallest"):
        side = report[name]
        if side is None:
            continue
        form = side["form"]
        told = form if isinstance(form, str) else _knobs_in_words(form)
        cells = (
            name.replace("_", ", ", 1).replace("_", " "),
            _number(side["tokens_per_second"], ",.1f"),
            _ratio(side["tokens_per_second"], fastest["tokens_per_second"]),
            _number(side["later_tokens_per_second"], ",.1f"),
            _number(side["peak_rss_bytes"], ",.0f", MIB),
            _ratio(side["peak_rss_bytes"], smallest["peak_rss_bytes"]),
            _number(side["eval_loss"], ".4f"),
            "; ".join(filter(None, (told, *dict.fromkeys(side["errors"])))),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Speed ratio {_number(report['speed_ratio'], '.2f')}, memory ratio {_number(report['memory_ratio'], '.3f')}, "
        f"at the smallest budget {_number(report['smallest_memory_ratio'], '.3f')} "
        "(medians of the ratios of each round). "
        f"Mean loss over that of TRL's in our order {_number(report['loss_ratio_in_our_order'], '.4f')}.",
    ]
    if choice["trials"]:
        heading = "| form | tokens/s after the first step | with it | seconds of steps | MiB | |"
        lines += ["", "## TRL's forms on few rows", "", heading, "|---|---:|---:|---|---:|---|"]
        for trial in choice["trials"]:
            steps = " ".join(f"{seconds:.1f}" for seconds in trial["seconds_of_steps"])
            speeds = f"{trial['later_tokens_per_second']:.1f} | {trial['tokens_per_second']:.1f}"
            taken = trial["taken_bytes"] / MIB
            lines.append(f"| {trial['form']} | {speeds} | {steps} | {taken:,.0f} | {trial['error']} |")
        if choice["not_tried"]:
            lines += ["", f"Not tried for want of time: {', '.join(choice['not_tried'])}."]
    return "\n".join(lines) + "\n"


def _knobs_in_words(knobs: Mapping[str, Any]) -> str:
    if not knobs:
        return ""
    layers = f"{knobs['activation_recompute_layers']} layers recomputed"
    return f"micro-batch of {knobs['micro_batch_tokens']:,} tokens, {layers}, loss chunk {knobs['loss_chunk']:,}"


def _number(value: float | None, form: str, unit: int = 1) -> str:
    return "-" if value is None else format(value / unit, form)


def _ratio(value: float | None, other: float | None) -> str:
    return f"{value / other:.2f}" if value is not None and other else "-"

"""Kills a run at random moments, resumes it until it is done, and compares it with one that nobody disturbed.

    python -m tests.soak.kill --kills 30 --seed 0 --data quickstart-data            # SmolLM2-135M
    python -m tests.soak.kill --kills 3 --seed 0 --base tiny --steps 12             # a random model, in seconds

A killed run is a process of its own that dies by SIGKILL; every third gets a SIGTERM shortly before. It is forked from
this one, which has imported everything and computed nothing, so that a kill costs no imports. A run that ends before
all kills are spent is compared and begun again in another folder.

Equal means: every line of metrics.jsonl and evals.jsonl without its timings, and the bytes of adapter and optimizer.
With --resume-budget or --resume-micro-batch-tokens, which give other micro-batches, it means losses that differ by less
than 1e-5.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

TIMINGS = ("seconds", "tokens_per_second", "peak_bytes", "memory_bytes")
TENSOR_FILES = (
    "checkpoints/last/adapter.safetensors",
    "checkpoints/last/optimizer.safetensors",
    "adapter/adapter_model.safetensors",
)
LOSS_TOLERANCE = 1e-5
EXIT_INTERRUPTED = 75
_POLL_SECONDS = 0.002
_PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass(frozen=True, slots=True)
class Moment:
    """When to kill.

    Attributes:
        new_steps: after so many steps of this process; 0 kills while it loads.
        delay_seconds: waited after that.
        term_seconds: SIGTERM comes so long before SIGKILL; None for no SIGTERM.
    """

    new_steps: int
    delay_seconds: float
    term_seconds: float | None


@dataclass(frozen=True, slots=True)
class Pace:
    """What the undisturbed run took: until its first step, and a step, in seconds."""

    load_seconds: float
    step_seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 where every killed run equals the undisturbed one, else 1."""
    options = _parse(arguments)
    rng = random.Random(options.seed)
    work = Path(options.work or tempfile.mkdtemp(prefix="kill-"))
    work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    _import_everything()
    command = _command(options, work)
    start = time.monotonic()
    code = _wait(_fork(lambda: _train([*command, f"--set=output.dir={work / 'whole'}"], work / "whole.log")))
    if code != 0:
        print(f"the undisturbed run failed with exit code {code}: see {work / 'whole.log'}")
        return 1
    pace = _pace(work / "whole", time.monotonic() - start)
    plan = json.loads((work / "whole" / "plan.json").read_text())["in_force"]["plan"]
    told = f"{plan['micro_batches_per_step']} micro-batches of {plan['micro_batch_tokens']} tokens a step"
    print(
        f"undisturbed: {pace.load_seconds:.1f} s to the first step, {pace.step_seconds:.3f} s a step, {told}",
        flush=True,
    )
    num_kills, num_runs, differences = 0, 0, []
    exactly = not _other_memory(options)
    while num_kills < options.kills:
        folder = work / f"killed-{num_runs}"
        num_kills = _kill_and_finish(options, command, folder, rng, pace, num_kills)
        num_runs += 1
        found = compare(work / "whole", folder, exactly=exactly)
        print(f"{folder.name}: {'equal' if not found else '; '.join(found)}", flush=True)
        differences += found
    num_terms = sum(log.read_bytes().count(b"SIGTERM: finishing this step") for log in work.glob("killed-*.log"))
    print(f"{num_kills} kills in {num_runs} runs, {num_terms} after a SIGTERM, {len(differences)} differences")
    return 1 if differences else 0


def compare(whole: Path, killed: Path, *, exactly: bool) -> list[str]:
    """What differs between two finished runs; empty where nothing does.

    Args:
        whole: the run folder of the undisturbed run.
        killed: of the other.
        exactly: whether bytes must be equal, or losses near.
    """
    if not exactly:
        return _compare_losses(_lines(whole / "metrics.jsonl"), _lines(killed / "metrics.jsonl"))
    differences = [f"{path.name} was left over" for path in sorted(killed.rglob(".tmp-*"))]
    for name in ("metrics.jsonl", "evals.jsonl"):
        one, other = _lines(whole / name), _lines(killed / name)
        if one != other:
            place = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), "the end")
            differences.append(f"{name} differs from line {place} on ({len(one)} and {len(other)} lines)")
    for name in TENSOR_FILES:
        if _sha256(whole / name) != _sha256(killed / name):
            differences.append(f"{name} differs")
    return differences


def _compare_losses(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> list[str]:
    if [line["step"] for line in one] != [line["step"] for line in other]:
        return ["other steps"]
    largest = max(abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in zip(one, other, strict=True))
    return [f"losses differ by {largest:.1e}"] if largest > LOSS_TOLERANCE else []


def _kill_and_finish(
    options: argparse.Namespace, command: list[str], folder: Path, rng: random.Random, pace: Pace, num_kills: int
) -> int:
    """Kill a run until it is done or all kills are spent, then let it end; returns the kills so far."""
    log = folder.with_suffix(".log")
    command = [*command, f"--set=output.dir={folder}"]
    while True:
        resumed = [*command, *_other_memory(options)] if (folder / "checkpoints").is_dir() else command
        child = _fork(partial(_train, resumed, log))
        if num_kills == options.kills:
            code = _wait(child)
            if code != 0:
                raise SystemExit(f"the resumed run failed with exit code {code}: see {log}")
            return num_kills
        moment = _moment(rng, pace, with_term=num_kills % 3 == 2)
        code = _kill(child, folder / "metrics.jsonl", moment)
        if code == 0:
            return num_kills
        if code not in (-signal.SIGKILL, -signal.SIGTERM, EXIT_INTERRUPTED):  # SIGTERM: before it was watched for
            raise SystemExit(f"a run ended by itself with exit code {code}: see {log}")
        num_kills += 1
        print(f"kill {num_kills}: {moment}, exit {code}, last step {_last_step(folder)}", flush=True)


def _other_memory(options: argparse.Namespace) -> list[str]:
    """What every resume is asked otherwise."""
    arguments = [f"--set=memory.budget={options.resume_budget}"] if options.resume_budget else []
    if options.resume_micro_batch_tokens:
        key = "memory.micro_batch_tokens"
        arguments += [f"--set={key}={options.resume_micro_batch_tokens}", f"--allow-change={key}"]
    return arguments


def _moment(rng: random.Random, pace: Pace, *, with_term: bool) -> Moment:
    term_seconds = rng.uniform(0, 2 * pace.step_seconds) if with_term else None
    if rng.random() < 0.25:
        return Moment(0, rng.uniform(0, pace.load_seconds), term_seconds)
    return Moment(rng.randint(1, 3), rng.uniform(0, 2 * pace.step_seconds), term_seconds)


def _kill(child: int, metrics: Path, moment: Moment) -> int:
    """Kill at `moment`; returns the exit code, negative for a signal, of a child that may have ended before."""
    try:
        before = metrics.stat().st_ino
    except FileNotFoundError:
        before = None
    first: int | None = None
    while moment.new_steps:
        code = _poll(child)
        if code is not None:
            return code
        # A resume replaces the log by one that is cut back: only lines after that are new.
        if metrics.exists() and metrics.stat().st_ino != before:
            num_lines = metrics.read_bytes().count(b"\n")
            first = 0 if before is None else num_lines if first is None else first
            if num_lines >= first + moment.new_steps:
                break
        time.sleep(_POLL_SECONDS)
    time.sleep(moment.delay_seconds)
    if moment.term_seconds is not None and _poll_is_running(child):
        os.kill(child, signal.SIGTERM)
        time.sleep(moment.term_seconds)
    if _poll_is_running(child):
        os.kill(child, signal.SIGKILL)
    return _wait(child)


def _poll_is_running(child: int) -> bool:
    """Whether it has not ended; a child that has ended stays to be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _poll(child: int) -> int | None:
    return None if _poll_is_running(child) else _wait(child)


def _wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _fork(work: Callable[[], int]) -> int:
    """A child that does `work` and exits with what it returns."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no run outlives a test that was stopped
        code = work()
    finally:
        os._exit(code)


def _train(command: list[str], log: Path) -> int:
    """`qlora-trainer train`, in this process, with its output in a file."""
    from qlora_trainer.cli.app import main as run

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    return run(command)


def _import_everything() -> None:
    """Import what a run needs, so that a forked child has it; nothing is computed, so no thread is started yet."""
    import qlora_trainer.report.progress
    import qlora_trainer.run.loop  # noqa: F401


def _command(options: argparse.Namespace, work: Path) -> list[str]:
    base, data = options.base, options.data
    if base == "tiny":
        base, data = str(work / "base"), str(work / "rows.jsonl")
        if not Path(base).exists() and _wait(_fork(lambda: _write_tiny(work))) != 0:
            raise SystemExit("the tiny base could not be written")
        values = [
            "quantization.compute_dtype=float32",
            "data.eval_fraction=0.2",
            "lora.rank=4",
            "training.global_batch_size=8",
            "training.learning_rate=5e-3",
        ]
    else:
        folder = Path(data)
        data = str(folder / "train.jsonl")
        values = [f"data.eval={folder / 'eval.jsonl'}", "data.seq_len=192", "training.learning_rate=2e-3"]
        # What is measured, or depends on the memory that happens to be free, is pinned: until the first checkpoint a
        # killed run decides it again.
        values += ["quantization.compute_dtype=float32", "memory.loss_chunk_tokens=256"]
        values += ["memory.activation_checkpointing=true"] if options.resume_budget is None else []
    values += [
        f"model.base={base}",
        f"data.train={data}",
        f"data.packing={str(not options.padded).lower()}",
        f"lora.dropout={options.dropout}",
        f"training.max_steps={options.steps}",
        f"training.save_every={options.save_every}",
        f"training.eval_every={max(1, options.steps // 3)}",
        f"training.optimizer={options.optimizer}",
        f"memory.micro_batch_tokens={options.micro_batch_tokens}",
        "output.sample_questions=0",
        *options.set,
    ]
    return ["train", "--resume", "auto", *(f"--set={value}" for value in values)]


def _write_tiny(work: Path) -> int:
    from tests.run.tiny_run import write_base, write_rows

    write_base(work / "base")
    write_rows(work / "rows.jsonl", 60)
    return 0


def _pace(run: Path, seconds: float) -> Pace:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = sorted(line["seconds"] for line in lines)
    return Pace(max(0.1, seconds - sum(steps)), steps[len(steps) // 2])


def _lines(path: Path) -> list[dict[str, Any]]:
    """A log without its timings; a run without evaluations has no log of them."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def _last_step(folder: Path) -> str:
    link = folder / "checkpoints" / "last"
    return os.readlink(link) if link.is_symlink() else "none"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kill a run at random moments and compare it with an undisturbed one.")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", default="smollm2-135m", help="an alias, a folder, or tiny")
    parser.add_argument("--data", default="quickstart-data", help="folder of `qlora-trainer quickstart-data`")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--save-every", type=int, default=2)
    parser.add_argument("--padded", action="store_true", help="one padded row a document instead of packed rows")
    parser.add_argument("--optimizer", default="adamw_32bit")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--micro-batch-tokens", default="auto", help="fewer than a global batch has: several a step")
    parser.add_argument("--resume-budget", help="memory.budget of every resume, such as 1.5GiB: other micro-batches")
    parser.add_argument("--resume-micro-batch-tokens", help="memory.micro_batch_tokens of every resume")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other key of the config")
    parser.add_argument("--work", help="folder for the runs; a temporary one by default")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

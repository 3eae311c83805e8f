"""Runs both sides of `versus_trl.py` in child processes, and lets TRL's forms compete. No torch."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.versus_forms import (
    DTYPES,
    MEMORY_AXES,
    SPEED_AXES,
    Form,
    Trial,
    close_to_best,
    descend,
    largeness,
    packs_per_step,
    slowness,
)
from benchmarks.versus_inputs import Inputs, InputSpec, initial_adapter
from benchmarks.versus_peer import LEARNING_RATE, MAX_GRAD_NORM, SCHEDULE, WARMUP_RATIO, WEIGHT_DECAY, PeerSpec

REPOSITORY = Path(__file__).parents[1]
FIRST_STEPS, MORE_STEPS = 3, 5  # the first one is not judged
START_SECONDS = 300.0  # until training begins; then a form has so many times the best one's seconds
PATIENCE = 2.5
LEAST_PATIENCE_SECONDS = 15.0
COMPILE_SECONDS = 240.0
CLOSE_IN_SPEED, CLOSE_IN_MEMORY = 0.10, 0.05
DOES_NOT_FIT = 3  # exit code of `errors.DoesNotFitError`


@dataclass(slots=True)
class Bench:
    """Where the runs are made, and what they are given.

    Attributes:
        folder: everything is written there.
        spec, inputs: what was asked for, and what there is.
        num_runs: so far.
    """

    folder: Path
    spec: InputSpec
    inputs: Inputs
    num_runs: int = 0

    def packs_per_step(self) -> int:
        return packs_per_step(self.spec.documents_per_step, self.inputs.mean_tokens, self.spec.max_length)

    def is_possible(self, form: Form) -> bool:
        return form.is_possible(self.spec.documents_per_step, self.packs_per_step())

    def peer(
        self, form: Form, *, seed: int, num_steps: int | None = None, seconds: float | None = None, adapter: str = ""
    ) -> tuple[Trial, dict[str, Any]]:
        """Run TRL.

        Args:
            form: how.
            seed: of the order, the new adapter and the sampling.
            num_steps: only the rows of the first steps; all by default.
            seconds: kill it when it trains for longer.
            adapter: where the adapter is saved.
        """
        per_step = self.packs_per_step() if form.batching == "packed" else self.spec.documents_per_step
        rows = self.folder / f"ordered-{seed}.jsonl"
        if num_steps is not None:
            lines = rows.read_text().splitlines(keepends=True)
            rows = self.folder / f"ordered-{seed}-{num_steps}.jsonl"
            rows.write_text("".join(lines[: num_steps * self.spec.documents_per_step]))
        spec = PeerSpec(
            cache_folder=self.inputs.cache_folder,
            tokenizer_folder=self.inputs.base_folder,
            rows=str(rows),
            initial_adapter=str(initial_adapter(self.folder, seed)),
            adapter=adapter,
            seed=seed,
            max_length=self.spec.max_length,
            micro_batch=form.micro_batch,
            accumulation=math.ceil(per_step / form.micro_batch),
            batching=form.batching,
            is_recomputed=form.is_recomputed,
            dtype=DTYPES[form.dtype],
            is_compiled=form.is_compiled,
        )
        told = self.child("versus_peer", asdict(spec), environment=form.environment, seconds=seconds)
        return _trial(form, told), told

    def ours(self, overrides: list[str], *, seed: int, environment: Mapping[str, str]) -> dict[str, Any]:
        """Run ours; the result has "adapter", a folder."""
        run = self.folder / f"ours-{self.num_runs}"
        told = self.child(
            "versus_ours", [*self.overrides(seed), f"output.dir={run}", *overrides], environment=environment
        )
        if told.get("is_done") and told["num_train_documents"] != self.inputs.num_rows:
            raise SystemExit(f"ours trained on {told['num_train_documents']} rows, expected {self.inputs.num_rows}")
        plan = run / "plan.json"
        knobs = json.loads(plan.read_text())["knobs"] if plan.exists() else {}
        return told | {"adapter": str(run / "adapter"), "knobs": knobs}

    def overrides(self, seed: int) -> list[str]:
        """Of a run of ours that learns what the peer learns."""
        num_steps = self.spec.num_steps
        return [
            f"model.base={self.spec.model}",
            f"lora.init_from={initial_adapter(self.folder, seed)}",
            f"data.train={self.folder / 'train.jsonl'}",
            "data.eval_fraction=0",
            f"data.seq_len={self.spec.max_length}",
            f"training.global_batch_size={self.spec.documents_per_step}",
            f"training.max_steps={num_steps}",
            f"training.learning_rate={LEARNING_RATE}",
            f"training.schedule={SCHEDULE}",
            f"training.warmup_ratio={WARMUP_RATIO}",
            f"training.weight_decay={WEIGHT_DECAY}",
            f"training.max_grad_norm={MAX_GRAD_NORM}",
            f"training.seed={seed}",
            f"training.save_every={num_steps}",
            "output.sample_questions=0",
        ]

    def child(
        self, module: str, spec: Any, *, environment: Mapping[str, str] | None = None, seconds: float | None = None
    ) -> dict[str, Any]:
        """Run a module with SPEC and RESULT; what it wrote, with "error" where it did not end well."""
        self.num_runs += 1
        spec_path, result, log = (self.folder / f"run-{self.num_runs}.{end}" for end in ("spec", "json", "log"))
        spec_path.write_text(json.dumps(spec))
        start = time.perf_counter()
        with log.open("w") as output:
            child = subprocess.Popen(
                [sys.executable, "-m", f"benchmarks.{module}", str(spec_path), str(result)],
                cwd=REPOSITORY,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | (environment or {}),
            )
            why = _wait(child, result, seconds)
        told: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {}
        if child.returncode != 0 and not told.get("error"):
            last = log.read_text().strip().splitlines()[-1:]
            told["error"] = why or f"exit code {child.returncode}: {' '.join(last)[:200]}"
        return told | {"process_seconds": time.perf_counter() - start}


def _wait(child: subprocess.Popen[bytes], result: Path, seconds: float | None) -> str:
    """Wait for the end; why it was killed, if it was."""
    if seconds is None:
        child.wait()
        return ""
    start, begun = time.perf_counter(), None
    while child.poll() is None:
        time.sleep(0.5)
        now = time.perf_counter()
        if begun is None and result.exists():
            begun = now
        limit, since = (START_SECONDS, start) if begun is None else (seconds, begun)
        if now - since > limit:
            child.kill()
            child.wait()
            return f"stopped after {limit:.0f} s"
    return ""


def _trial(form: Form, told: Mapping[str, Any]) -> Trial:
    return Trial(
        form=form,
        tokens_of_steps=tuple(told.get("tokens_of_steps", ())),
        seconds_of_steps=tuple(told.get("seconds_of_steps", ())),
        import_bytes=told.get("import_bytes", 0),
        peak_bytes=told.get("peak_bytes", 0),
        error=told.get("error", ""),
        num_tokens=told.get("num_tokens", 0),
    )


@dataclass(slots=True)
class FirstPass:
    """Every form that was tried on few rows.

    Attributes:
        bench: runs them.
        seconds: for all of them.
        trials: form -> what it took in the first steps.
        longer: likewise in more steps.
        not_tried: forms for which no time was left.
    """

    bench: Bench
    seconds: float
    start: float = field(default_factory=time.perf_counter)
    trials: dict[Form, Trial] = field(default_factory=dict)
    longer: dict[Form, Trial] = field(default_factory=dict)
    not_tried: list[Form] = field(default_factory=list)

    def choose(self) -> tuple[Form, Form]:
        """The fastest and the smallest form."""
        bench = self.bench
        begin = Form(micro_batch=1)
        fastest = descend(begin, SPEED_AXES, measure=self.measure, is_possible=bench.is_possible, badness=slowness)
        smallest = descend(begin, MEMORY_AXES, measure=self.measure, is_possible=bench.is_possible, badness=largeness)
        if fastest is None or smallest is None:
            raise SystemExit("no form of the peer could be run; see the logs with --folder")
        for best in dict.fromkeys((fastest.form, smallest.form)):
            self.measure(replace(best, is_compiled=True))
        return self._of_longer(slowness, CLOSE_IN_SPEED), self._of_longer(largeness, CLOSE_IN_MEMORY)

    def measure(self, form: Form) -> Trial | None:
        """The form's first steps; None if no time is left."""
        if form in self.trials:
            return self.trials[form]
        left = self.seconds - (time.perf_counter() - self.start)
        if left <= 0 and self.trials:
            self.not_tried.append(form)
            return None
        ended = [sum(trial.seconds_of_steps) for trial in self.trials.values() if not trial.error]
        patience = max(LEAST_PATIENCE_SECONDS, PATIENCE * min(ended, default=START_SECONDS))
        if form.is_compiled:
            patience += COMPILE_SECONDS
        trial, _ = self.bench.peer(form, seed=self.bench.spec.seeds[0], num_steps=FIRST_STEPS, seconds=patience)
        self.trials[form] = trial
        print(in_words(trial), file=sys.stderr, flush=True)
        return trial

    def _of_longer(self, badness: Any, share: float) -> Form:
        close = close_to_best(list(self.trials.values()), badness, share)
        if len(close) == 1:
            return close[0]
        for form in close:
            if form not in self.longer:
                self.longer[form], _ = self.bench.peer(form, seed=self.bench.spec.seeds[0], num_steps=MORE_STEPS)
                print(in_words(self.longer[form]), file=sys.stderr, flush=True)
        return min(close, key=lambda form: badness(self.longer[form]))


def in_words(trial: Trial) -> str:
    """One line."""
    steps = ", ".join(f"{seconds:.1f}" for seconds in trial.seconds_of_steps)
    return (
        f"{trial.form.name}: {trial.later_tokens_per_second:.0f} tokens/s after the first step, "
        f"{trial.tokens_per_second:.0f} with it ({steps} s), "
        f"{trial.taken_bytes / 2**20:,.0f} MiB above imports{f'; {trial.error}' * bool(trial.error)}"
    )

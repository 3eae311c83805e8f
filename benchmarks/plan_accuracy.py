"""What the plan says against what real runs take on a CPU: allocated bytes by phase, and the resident set.

    python benchmarks/plan_accuracy.py [--only TEXT] [--quick | --levers] [--json FILE] [--folder DIR]

For each configuration: a run of two steps that is cut off after its checkpoint, and its resume to the third step, with
an evaluation before and after; once under torch.profiler, which counts what is allocated, and once in a fresh process
each with nobody watching, for VmHWM. The plan is the one that the run itself made. Exit code 1 if a promise is broken:
allocated peak within 2 %, never low by more than 1 %, in every phase, the resume included; for run and resume alike,
resident set within 3 % + 64 MiB.

`--levers` is every lever at three sizes of model. Where pages of the mapped base are given back (a streamed base, or
tables on the host), the profiler sees all of the file as allocated: there the base is left out on either side, which
makes the 2 % harder to keep. What of it is there is read from the kernel, of the mapped files alone, at the end of each
step, evaluation and save, and held against a run of the same without these levers: at least half of what the plan says
that they save must not be there (the kernel maps 64 KiB around a page, which is much of a tiny layer). Of a paged
optimizer the mapped state is taken off; the resident set has it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Run as a file, Python looks for modules beside it only: `benchmarks` is a folder further up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.plan_accuracy_inputs import (
    ARCHITECTURES,
    CASES,
    LEVER_CASES,
    NO_LEVER,
    QUICK,
    Case,
    write_base,
    write_documents,
)

REPOSITORY = Path(__file__).resolve().parents[1]
MIB = 2**20
MAX_OFF, MAX_LOW = 0.02, 0.01
RSS_SHARE, RSS_BYTES = 0.03, 64 * MIB
MIN_SAVED = 0.5  # of the bytes of the base that a plan says a lever saves
BASE = ("base", "quant_state", "embedding")  # of a plan's categories
TRAINED = ("step", "eval", "save", "finish")
PLANNED = ("load", "rehearsal", "eval", "step", "save", "finish", "children")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapped:
    """Bytes of a base whose pages are given back: without that and with it, as the plan says, as the kernel shows."""

    planned: tuple[int, int]
    taken: tuple[int, int]

    @property
    def is_saved(self) -> bool:
        planned, taken = (without - left for without, left in (self.planned, self.taken))
        return taken >= MIN_SAVED * planned


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Bytes, predicted and measured.

    Attributes:
        name: of the configuration.
        phases: phase -> (predicted, measured) allocated peak; the worse of run and resume.
        allocated: the same of everything.
        resident: the same of the process, for run and resume.
        kernel: "run" and "resume" -> part -> the kernel's figures.
        mapped: of the base, where its pages are given back; None where they are not.
    """

    name: str
    phases: Mapping[str, tuple[int, int]]
    allocated: tuple[int, int]
    resident: tuple[tuple[int, int], ...]
    kernel: Mapping[str, Any] = field(default_factory=dict)
    mapped: Mapped | None = None

    @property
    def worst_phase(self) -> str:
        return max(self.phases, key=lambda phase: abs(off(self.phases[phase])))

    @property
    def is_allocated_right(self) -> bool:
        return all(-MAX_LOW <= off(pair) <= MAX_OFF for pair in (*self.phases.values(), self.allocated))

    @property
    def is_resident_right(self) -> bool:
        return all(abs(predicted - taken) <= RSS_SHARE * taken + RSS_BYTES for predicted, taken in self.resident)

    @property
    def is_right(self) -> bool:
        is_saved = self.mapped is None or self.mapped.is_saved
        return self.is_allocated_right and self.is_resident_right and is_saved


def off(pair: tuple[int, int]) -> float:
    """By how much the prediction is too high (or, negative, too low), as a share of what was measured."""
    predicted, measured = pair
    return predicted / measured - 1


class Bench:
    """Bases and caches in one temporary folder, and the children over them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kept: dict[tuple[str, ...], tuple[int, int]] = {}
        self._environment = os.environ | {
            "XDG_CACHE_HOME": str(folder / "cache"),
            "OMP_WAIT_POLICY": "PASSIVE",  # on a shared machine, threads that spin take ten times as long
        }

    def measure(self, case: Case) -> Outcome:
        """Runs `case` four times and plans it."""
        from qlora_trainer.config.load import load_config
        from qlora_trainer.hardware.device import DTYPES
        from qlora_trainer.model.base import read_tokenizer, resolve_base
        from qlora_trainer.run.self_test.measured import unread_bytes

        work = Path(tempfile.mkdtemp(prefix="case-", dir=self.folder))
        base = resolve_base(self._base(case.architecture))
        tokenizer = read_tokenizer(base.folder)
        train, held_out = work / "train.jsonl", work / "eval.jsonl"
        lengths = write_documents(train, tokenizer, num_tokens=case.seq_len, count=3 * case.documents)
        write_documents(held_out, tokenizer, num_tokens=case.seq_len, count=case.documents)
        overrides = _overrides(case, self._base(case.architecture), train, held_out, seq_len=max(lengths))
        cache, item_bytes = self._cache(base, load_config(None, overrides)), DTYPES[case.dtype].itemsize
        unseen = unread_bytes(cache, item_bytes) + (base_bytes(cache, item_bytes) if case.is_mapped else 0)
        run, resume, watched = (self._child(work, overrides, part) for part in ("run", "resume", "profile"))
        predicted = without_base(run["predicted"]) if case.is_mapped else run["predicted"]
        counted = [{phase: count - unseen for phase, count in one.items()} for one in watched["measured"].values()]
        highest = max(count for phases in counted for count in phases.values())  # it may come with the resume
        kernel = run["measured"] | resume["measured"]
        # What a plan promises begins when the base is loaded: before that, it is not made yet.
        peaks = [max(parts[name]["peak"] for name in PLANNED if name in parts) for parts in kernel.values()]
        return Outcome(
            name=case.name,
            phases=_compared(predicted, counted),
            allocated=(predicted["allocated_peak_bytes"], highest),
            resident=tuple((predicted["process_peak_bytes"], peak) for peak in peaks),
            kernel=kernel,
            mapped=self._mapped(case, overrides, planned_and_taken(run["predicted"], kernel)),
        )

    def _mapped(self, case: Case, overrides: Sequence[str], found: tuple[int, int]) -> Mapped | None:
        """Beside a run that keeps the base, which is made once for each base; None where this one does, too."""
        if not case.is_mapped:
            return None
        key = (case.architecture, *(option for option in case.options if option.startswith("quantization.")))
        if key not in self._kept:
            work = Path(tempfile.mkdtemp(prefix="kept-", dir=self.folder))
            own = [option for option in overrides if option.partition("=")[0] not in NO_LEVER]
            run = self._child(work, [*own, *NO_LEVER.values()], "run")
            self._kept[key] = planned_and_taken(run["predicted"], run["measured"])
        planned, taken = zip(self._kept[key], found, strict=True)
        return Mapped(planned=planned, taken=taken)

    def _cache(self, base: Any, config: Any) -> Path:
        """The base's NF4 form, made here where it is missing: the runs find it."""
        from qlora_trainer.model.nf4_cache import prepare_nf4_cache

        os.environ["XDG_CACHE_HOME"] = self._environment["XDG_CACHE_HOME"]
        quantization = config.quantization
        is_packed = quantization.head == "nf4"
        return prepare_nf4_cache(base, double_quant=quantization.double_quant, nf4_head=is_packed).folder

    def _base(self, architecture: str) -> str:
        if architecture not in ARCHITECTURES:
            return architecture
        folder = self.folder / architecture
        if not folder.exists():
            write_base(folder, architecture)
        return str(folder)

    def _child(self, folder: Path, overrides: Sequence[str], part: str) -> dict[str, Any]:
        """Figures of a run in a fresh process."""
        spec, result = folder / "spec.json", folder / "result.json"
        output = folder / ("profiled" if part == "profile" else "run")
        spec.write_text(json.dumps({"overrides": [*overrides, f"output.dir={output}"], "stop_after_step": 2}))
        child = subprocess.run(
            [sys.executable, "-m", "benchmarks.plan_accuracy_run", str(spec), str(result), "--part", part],
            cwd=REPOSITORY,
            env=self._environment,
            check=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if child.returncode:
            raise RuntimeError(f"{part} of {' '.join(overrides)} failed:\n{child.stderr}")
        figures: dict[str, Any] = json.loads(result.read_text())
        return figures


def base_bytes(cache: Path, item_bytes: int) -> int:
    """Of the frozen base in memory, from the headers of its files: what is mapped, what is converted when it is read
    (norms and biases, where a number has `item_bytes` of more than two), and an offset for each weight and the levels
    of them all, which are numbers in fp32."""
    num_bytes = num_nested = 0
    for path in cache.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if name.endswith(("quant_map", "quant_state.bitsandbytes__nf4")):
                continue
            is_converted = entry["dtype"] == "BF16" and len(entry["shape"]) == 1
            first, last = entry["data_offsets"]
            num_bytes += (last - first) * item_bytes // 2 if is_converted else last - first
            num_nested += name.endswith(".nested_absmax")
    return num_bytes + 4 * (num_nested + 256 * (num_nested > 0))


def planned_and_taken(predicted: Mapping[str, Any], kernel: Mapping[str, Any]) -> tuple[int, int]:
    """Of the base: what the plan says, and the most that is there at the end of a part of the training."""
    taken = [figures["base"] for parts in kernel.values() for part, figures in parts.items() if part in TRAINED]
    return sum(predicted["resident"][name] for name in BASE), max(taken)


def without_base(predicted: Mapping[str, Any]) -> dict[str, Any]:
    """A prediction of everything but the frozen base."""
    base = {name: predicted["resident"][name] for name in BASE}
    num_bytes = sum(base.values())
    return dict(predicted) | {
        "allocated_peak_bytes": predicted["allocated_peak_bytes"] - num_bytes,
        "phases": {phase: peak - num_bytes for phase, peak in predicted["phases"].items()},
        "resident": dict(predicted["resident"]) | dict.fromkeys(base, 0),
    }


def _compared(predicted: Mapping[str, Any], counted: Sequence[Mapping[str, int]]) -> dict[str, tuple[int, int]]:
    """Phase -> (predicted, counted), of run and resume the one that is further off.

    Every phase must be in one of the two; only "forward" has no entry of its own, being counted with the loss.
    """
    expected: dict[str, int] = dict(predicted["phases"])
    # Where the profile's first part ends, adapters and optimizer are there too.
    expected["load"] = max(expected["load"], sum(predicted["resident"].values()))
    # The logits' rows are gathered between forward and loss; the profile sees no border there.
    expected["loss"] = max(expected.pop("forward"), expected["loss"])
    expected["rehearsal"] = max(peak for phase, peak in expected.items() if phase != "resume")
    found: dict[str, tuple[int, int]] = {}
    for name, num_bytes in expected.items():
        pairs = [(num_bytes, phases[name]) for phases in counted if name in phases]
        if name == "rehearsal":  # of a resume the checkpoint's state is read before the profile's next border
            pairs = [
                (max(num_bytes, expected["resume"]) if "resume" in phases else num_bytes, phases[name])
                for phases in counted
                if name in phases
            ]
        if not pairs:
            raise RuntimeError(f"no profile shows the phase {name}, of {sorted(expected)}: nothing is known of it")
        found[name] = max(pairs, key=lambda pair: abs(off(pair)))
    return found


def _overrides(case: Case, base: str, train: Path, held_out: Path, *, seq_len: int) -> list[str]:
    asked = {option.partition("=")[0] for option in case.options}
    return [
        f"model.base={base}",
        f"data.train={train}",
        f"data.eval={held_out}",
        f"data.seq_len={seq_len}",
        f"quantization.compute_dtype={case.dtype}",
        f"lora.rank={case.rank}",
        f"training.global_batch_size={case.documents}",
        "training.max_steps=3",
        "training.save_every=2",
        "training.eval_every=3",
        *([] if "training.optimizer" in asked else [f"training.optimizer=adamw_{case.bits}bit"]),
        f"memory.micro_batch_tokens={case.documents * seq_len}",
        f"memory.activation_checkpointing={str(case.recompute).lower()}",
        f"memory.loss_chunk_tokens={case.loss_chunk}",
        "output.sample_questions=0",
        *case.options,
    ]


def print_table(outcomes: Sequence[Outcome]) -> None:
    """A Markdown table, a row a configuration."""
    header = (
        "allocated peak: plan / run (MiB) | off | worst phase | off | resident peak: plan / run / resume (MiB) | off | "
        "of the mapped base without and with the lever: plan / run (MiB)"
    )
    print(f"| configuration | {header} |")
    print("|---|---:|---:|---|---:|---:|---:|---:|")
    for outcome in outcomes:
        print(_row(outcome))


def _row(outcome: Outcome) -> str:
    worst = outcome.worst_phase
    measured = [taken for _, taken in outcome.resident]
    cells = (
        outcome.name,
        _pair(outcome.allocated),
        f"{off(outcome.allocated):+.2%}{'' if outcome.is_allocated_right else ' **!**'}",
        worst,
        f"{off(outcome.phases[worst]):+.2%}",
        " / ".join(f"{num_bytes / MIB:,.0f}" for num_bytes in (outcome.resident[0][0], *measured)),
        ", ".join(f"{off(pair):+.1%}" for pair in outcome.resident) + ("" if outcome.is_resident_right else " **!**"),
        _stays(outcome.mapped),
    )
    return f"| {' | '.join(cells)} |"


def _stays(mapped: Mapped | None) -> str:
    if mapped is None:
        return ""
    parts = (f"{without / MIB:,.1f} - {left / MIB:,.1f}" for without, left in (mapped.planned, mapped.taken))
    return " / ".join(parts) + ("" if mapped.is_saved else " **!**")


def _pair(pair: tuple[int, int]) -> str:
    return " / ".join(f"{num_bytes / MIB:,.1f}" for num_bytes in pair)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="plan_accuracy.py", description="Plans against real runs.")
    parser.add_argument("--only", help="configurations whose name contains this")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help=f"{len(QUICK)} configurations instead of {len(CASES)}")
    which.add_argument("--levers", action="store_true", help=f"{len(LEVER_CASES)} others, of levers at three sizes")
    parser.add_argument("--json", type=Path, help="write every figure here, after each configuration")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    chosen = parser.parse_args(arguments)
    every = QUICK if chosen.quick else LEVER_CASES if chosen.levers else CASES
    cases = [case for case in every if chosen.only is None or chosen.only in case.name]
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="plan-accuracy-", dir=chosen.folder) as temporary:
        bench = Bench(Path(temporary))
        for case in cases:
            outcomes.append(bench.measure(case))
            print(_row(outcomes[-1]), file=sys.stderr, flush=True)
            if chosen.json is not None:
                chosen.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    print_table(outcomes)
    return 0 if all(outcome.is_right for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())

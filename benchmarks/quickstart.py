"""What the quickstart must show, measured: it learns, from the answers, as well as the stack people use today.

    python benchmarks/quickstart.py --folder /tmp/quickstart [--only quickstart shuffled ...] [--json FILE]

Runs the quickstart and its variations, one after the other, each in its own process, with the same data and seed:

    quickstart  configs/quickstart.yaml as it is
    shuffled    the same questions with answers shuffled among them: what is learned from the form of an answer alone
    fp32        adapters held in float32
    adamw_32bit, adamw_8bit, paged_adamw_32bit, paged_adamw_8bit
                the optimizers
    trl         TRL + PEFT + bitsandbytes on the same NF4 base, documents in the same order, and hyper-parameters

and scores 20 held-out answers (ROUGE-L F1, Lin 2004) of the base and of the quickstart's adapter. Prints one table.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "quickstart.yaml"
OPTIMIZERS = ("adamw_32bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit")
RUNS = ("quickstart", "shuffled", "fp32", *OPTIMIZERS, "trl")
NUM_SCORED_ANSWERS = 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run: its name, loss on the held-out documents, wall seconds of the whole process, VmHWM."""

    name: str
    eval_loss: float
    seconds: float
    peak_mib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, required=True, help="where data and runs go; existing runs are not run again"
    )
    parser.add_argument("--only", nargs="*", choices=RUNS, default=RUNS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rouge", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    _command("qlora_trainer.cli", "quickstart-data", str(folder / "data"))
    _command("qlora_trainer.cli", "quickstart-data", str(folder / "shuffled-data"), "--shuffle-answers")
    outcomes = [_trl(folder) if name == "trl" else _ours(folder, name) for name in arguments.only]
    scores = _rouge_l(folder) if arguments.rouge and "quickstart" in arguments.only else {}
    for outcome in outcomes:
        print(f"| {outcome.name} | {outcome.eval_loss:.4f} | {outcome.seconds:.0f} | {outcome.peak_mib:.0f} |")
    for name, score in scores.items():
        print(f"ROUGE-L {name}: {score:.4f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"runs": [asdict(outcome) for outcome in outcomes], "rouge_l": scores}))


def _ours(folder: Path, name: str) -> Outcome:
    run = folder / name
    data = folder / ("shuffled-data" if name == "shuffled" else "data")
    overrides = [f"data.train={data}/train.jsonl", f"data.eval={folder}/data/eval.jsonl", f"output.dir={run}"]
    if name == "fp32":
        overrides.append("lora.dtype=float32")
    if name in OPTIMIZERS:
        overrides.append(f"training.optimizer={name}")
    start = time.perf_counter()
    if not (run / "summary.json").exists():
        _command("qlora_trainer.cli", "train", str(CONFIG), *(part for text in overrides for part in ("--set", text)))
    summary = json.loads((run / "summary.json").read_text())
    if name == "quickstart":
        print(f"base: eval loss {summary['eval_loss_before']:.4f}")
    seconds = time.perf_counter() - start
    return Outcome(name, summary["eval_loss_after"], seconds, summary["process_peak_bytes"] / 2**20)


def _trl(folder: Path) -> Outcome:
    start = time.perf_counter()
    peer = folder / "trl"
    if not (peer / "outcome.json").exists():
        _command("benchmarks.quickstart_trl", "--run", str(folder / "quickstart"), "--to", str(peer))
    outcome = json.loads((peer / "outcome.json").read_text())
    return Outcome("trl", outcome["eval_loss"], time.perf_counter() - start, outcome["peak_mib"])


def _rouge_l(folder: Path) -> dict[str, float]:
    from benchmarks.quickstart_trl import answer_held_out

    answers = answer_held_out(folder / "quickstart", NUM_SCORED_ANSWERS)
    return {
        name: sum(rouge_l(answer, reference) for answer, reference in pairs) / len(pairs)
        for name, pairs in answers.items()
    }


def rouge_l(candidate: str, reference: str) -> float:
    """ROUGE-L F1 (Lin, 2004) over lower-case words: 0 for nothing in common, 1 for the same words in the same order."""
    candidate_words, reference_words = (re.findall(r"\w+", text.lower()) for text in (candidate, reference))
    common = _longest_common_subsequence(candidate_words, reference_words)
    if common == 0:
        return 0.0
    precision, recall = common / len(candidate_words), common / len(reference_words)
    return 2 * precision * recall / (precision + recall)


def _longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    row = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for index, other in enumerate(right, start=1):
            above = row[index]
            row[index] = diagonal + 1 if word == other else max(above, row[index - 1])
            diagonal = above
    return row[-1]


def _command(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True, cwd=ROOT)


if __name__ == "__main__":
    main()

"""A mistake is told in under a second: nothing that takes seconds to import is imported for it."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SECONDS = 1.0
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
HEAVY = ("torch", "transformers", "bitsandbytes", "datasets", "accelerate")
REPORT_IMPORTS = f"""
import sys
from qlora_trainer.cli.app import main
code = main(sys.argv[1:])
print([name for name in {HEAVY} if name in sys.modules])
sys.exit(code)
"""
ROW = '{"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}\n'


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "train.jsonl").write_text(ROW * 4)
    (tmp_path / "broken.jsonl").write_text(ROW + '{"messages": [\n')
    (tmp_path / "unanswered.jsonl").write_text('{"messages": [{"role": "user", "content": "2 + 2?"}]}\n')
    (tmp_path / "broken.json").write_text(f"[{ROW},{ROW}")
    (tmp_path / "table.csv.gz").write_bytes(gzip.compress(b"prompt,completion\nHi,Hello\nHi\n"))
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for name, file in (("pickled", "pytorch_model.bin"), ("full", "metrics.jsonl")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "run.yaml").write_text("model: {base: owner/name}\ndata: {train: train.jsonl}\n")
    (tmp_path / "typo.yaml").write_text("model: {base: owner/name}\ndata: {train: train.jsonl}\nlora:\n  lora_r: 8\n")
    return tmp_path


def run(work: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """The whole command in a child; the best of ten times, since other tests run beside it."""
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        child = subprocess.run(
            [sys.executable, "-c", REPORT_IMPORTS, *arguments],
            cwd=work,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
        )
        seconds.append(time.perf_counter() - begin)
        if seconds[-1] < SECONDS:
            break
    return child, min(seconds)


@pytest.mark.parametrize(
    "arguments,exit_code,said",
    [
        (["typo.yaml"], 2, "typo.yaml:4: found the unknown key lora.lora_r"),
        (["run.yaml", "--set", "lora.rank=0"], 2, "--set lora.rank"),
        (["none.yaml"], 2, "none.yaml: found no such file"),
        (["run.yaml", "--set", "model.base=smollm-135m"], 2, "Did you mean smollm2-135m?"),
        (["run.yaml", "--set", "model.base=./pickled"], 2, "Pickle weights are never read"),
        (["run.yaml", "--set", "output.dir=full"], 2, "a folder that is not empty"),
        (["run.yaml", "--set", "output.trackers=[tensorbored]"], 2, "Did you mean tensorboard?"),
        (["run.yaml", "--set", "data.train=none.jsonl"], 4, "no such file"),
        (["run.yaml", "--set", "data.train=empty.jsonl"], 4, "an empty file"),
        (["run.yaml", "--set", "data.train=broken.jsonl"], 4, "broken.jsonl:2"),
        (["run.yaml", "--set", "data.eval=unanswered.jsonl"], 4, "unanswered.jsonl:1"),
        (["run.yaml", "--set", "data.train=[train.jsonl, none*.csv]"], 4, "no file of this pattern"),
        (["run.yaml", "--set", "data.train=broken.json"], 4, "broken.json:3"),
        (["run.yaml", "--set", "data.train=table.csv.gz"], 4, "table.csv.gz:3"),
        (["run.yaml", "--set", "data.train=set"], 4, "expected one of train, test. Write set:train, say."),
        (["run.yaml", "--set", "data.train=set:valid"], 4, "no split valid"),
        (["run.yaml", "--set", "data.train=set:train"], 4, "no set/train/state.json"),
        (["run.yaml", "--set", "data.train=[broken.jsonl, owner/data:train]"], 4, "broken.jsonl:2"),
        (["run.yaml", "--set", "data.revision=v1"], 2, "data.revision: found v1 without a hub id"),
        (["run.yaml", "--set", "data.format=alpaca"], 4, "the form alpaca of this file"),
        (
            ["run.yaml", "--set", "data.chat_template=none.jinja"],
            2,
            "data.chat_template none.jinja: found no such file",
        ),
        (["run.yaml", "--set", "data.chat_template=empty.jsonl"], 2, "found an empty file"),
        (["run.yaml", "--set", "data.columns={prompts: query}"], 2, "a mapping from some of messages"),
        (["run.yaml", "--set", "output.dir=train.jsonl"], 5, "a file at train.jsonl"),
    ],
)
def test_mistakes_are_told_at_once(work: Path, arguments: list[str], exit_code: int, said: str) -> None:
    require_told_at_once(work, ["train", *arguments], exit_code, said)


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--model", "lama-3.1-8b", "--vram", "8GiB"], "Did you mean llama-3.1-8b?"),
        (["--model", "./none", "--vram", "8GiB"], "no folder ./none"),
        (["--model", "llama-3.1-8b", "--gpu", "rtx-4061"], "Did you mean rtx-4060"),
        (
            ["--model", "llama-3.1-8b", "--gpu", "rtx-4060", "--vram", "80GiB"],
            "at most the 8 GiB of the GeForce RTX 4060",
        ),
        (["--model", "llama-3.1-8b", "--vram", "2000GiB"], "at most 192 GiB"),
        (["--model", "llama-3.1-8b", "--vram", "0"], "a size above zero"),
        (["--model", "llama-3.1-8b", "--vram=-4GiB"], "a size above zero"),
        (["--model", "llama-3.1-8b", "--ram", "8 bananas"], '--ram: found "8 bananas"'),
        (["--model", "llama-3.1-8b", "--ram", "8GiB", "--vram", "8GiB"], "one device"),
        (["--vram", "8GiB"], "neither a CONFIG nor --model"),
    ],
)
def test_what_cannot_be_planned_is_told_at_once(work: Path, arguments: list[str], said: str) -> None:
    require_told_at_once(work, ["plan", *arguments], 2, said)


def test_a_folder_without_an_adapter_is_told_at_once(work: Path) -> None:
    (work / "unfinished" / "checkpoints").mkdir(parents=True)
    for folder, found in (("full", "no adapter_config.json"), ("unfinished", "a run that has not finished")):
        require_told_at_once(work, ["generate", folder, "--prompt", "2 + 2?"], 2, f"{folder}: found {found}")
        require_told_at_once(work, ["export", folder, "--to", "x"], 2, f"{folder}: found {found}")
        require_told_at_once(work, ["merge", folder, "--to", "x"], 2, f"{folder}: found {found}")


@pytest.mark.parametrize(
    "arguments,exit_code,said",
    [
        (["chat", "full"], 2, "full: found no adapter_config.json"),
        (["chat", "--adapter", "a/b=full"], 2, "the name of an adapter: found 'a/b'"),
        (["eval", "full"], 2, "full: found no adapter_config.json"),
        (["eval", "adapter"], 2, "adapter folders without a run, and no --data"),
        (["eval", "adapter", "--data", "none.jsonl"], 4, "none.jsonl: found no such file"),
        (
            ["eval", "adapter", "--data", "train.jsonl", "--set", "data.sequence_length=8"],
            2,
            "Did you mean data.seq_len",
        ),
    ],
)
def test_what_cannot_be_talked_with_or_judged_is_told_at_once(
    work: Path, arguments: list[str], exit_code: int, said: str
) -> None:
    (work / "adapter").mkdir()
    (work / "adapter" / "adapter_config.json").touch()
    require_told_at_once(work, arguments, exit_code, said)


@pytest.mark.parametrize("path", ["none", "full", "full/checkpoints/step-00000001"])
def test_a_checkpoint_that_is_not_there_is_told_at_once(work: Path, path: str) -> None:
    arguments = ["train", "run.yaml", "--set", "output.dir=full", "--resume", path]
    require_told_at_once(work, arguments, 2, f"--resume: found {path}")


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs here")
def test_a_paging_folder_in_memory_is_told_at_once(work: Path) -> None:
    paged = ["--set", "training.optimizer=paged_adamw_32bit", "--set", "memory.paging_dir=/dev/shm"]
    require_told_at_once(work, ["train", "run.yaml", *paged], 5, "/dev/shm: found a tmpfs")


def require_told_at_once(work: Path, arguments: list[str], exit_code: int, said: str) -> None:
    child, seconds = run(work, *arguments)
    assert child.returncode == exit_code
    assert child.stderr.startswith("qlora-trainer: error: ")
    assert said in child.stderr
    assert child.stderr.count("\n") == 1  # one line, no traceback
    assert child.stdout == "[]\n"  # nothing heavy was imported
    assert seconds < SECONDS


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["runs", "."], ["config", "--print"], ["config", "--schema"]]
)
def test_answers_that_need_no_model_come_at_once(work: Path, arguments: list[str]) -> None:
    child, seconds = run(work, *arguments)
    assert child.returncode == 0
    assert child.stdout.endswith("[]\n")
    assert child.stderr == ""
    assert seconds < SECONDS


def test_python_m_is_the_command_too(work: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-m", "qlora_trainer.cli", "frobnicate"],
        cwd=work,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 2
    assert child.stderr == "qlora-trainer: error: No such command 'frobnicate'. See `qlora-trainer --help`.\n"


@pytest.mark.slow
def test_a_plan_by_name_imports_no_more_than_it_needs(work: Path) -> None:
    """The step runs on torch, transformers (which imports accelerate itself) and bitsandbytes: no data, no plot."""
    needless = ("datasets", "matplotlib", "peft", "trl", "gguf", "tensorboard")
    child = subprocess.run(
        [
            sys.executable,
            "-c",
            REPORT_IMPORTS.replace(str(HEAVY), str(needless)),
            *("plan", "--model", "smollm2-135m", "--vram", "8GiB", "--set", "data.seq_len=256", "--json"),
        ],
        cwd=work,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0
    assert child.stdout.endswith("}\n[]\n")

"""A run on a base whose head is in NF4, too: planned, gone on from, judged, merged and exported as it was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_trainer.cli.app import main
from qlora_trainer.model import nf4
from qlora_trainer.run.adapted_base import find_adapters, load_adapters
from qlora_trainer.run.answer import answer
from qlora_trainer.run.eval_config import eval_config
from qlora_trainer.run.evaluation import evaluate_adapters
from qlora_trainer.run.self_test.levers import Lever, config_of, judged_bytes
from qlora_trainer.run.self_test.measured import measure
from qlora_trainer.run.self_test.tiny_base import sizes_for, write_base, write_rows
from tests.returned import returned
from tests.run import tiny_run
from tests.run.tiny_adapters import write_adapter
from tests.run.tiny_run import course, run_to_end, run_until_step, tiny_config
from tests.run.told import complaint, train_command

pytestmark = pytest.mark.usefixtures("plans_made_once")

PACKED = "quantization.head=nf4"


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with a head of its own."""
    return tiny_run.write_base(tmp_path_factory.mktemp("untied"), is_tied=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, untied: Path, plans_made_once: None) -> Path:
    """Finished; nobody changes it."""
    folder = tmp_path_factory.mktemp("packed")
    run_to_end(tiny_config(folder, untied, PACKED, "lora.dtype=float32"))
    return folder / "run"


def evals(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]


def test_it_learns_beside_that_head_and_a_resume_changes_nothing(run: Path, untied: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, untied, PACKED, "lora.dtype=float32", "memory.embedding_residency=host")
    run_until_step(config, 5)  # where the packed bytes live is no part of what is learned
    run_to_end(tiny_config(tmp_path, untied, PACKED, "lora.dtype=float32"), resume="auto")
    assert course(tmp_path / "run") == course(run)
    assert evals(run)[-1]["eval_loss"] < evals(run)[0]["eval_loss"]
    plan = json.loads((run / "plan.json").read_text())
    assert (plan["head"], plan["knobs"]["nf4_head"], plan["in_force"]["plan"]["nf4_head"]) == ("nf4", True, True)


def test_another_head_is_another_run(
    run: Path, untied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    plain = tiny_config(run.parent, untied, "lora.dtype=float32", f"output.dir={tmp_path / 'run'}")
    assert train_command(plain, "--resume", "auto") == 2
    assert "quantization.head at --resume: found 'bfloat16'; expected 'nf4'" in complaint(capsys)


def test_what_is_made_of_it_afterwards_has_that_head(run: Path, untied: Path, tmp_path: Path) -> None:
    """To the bit the losses of the run; an adapter that lies in no run does not tell, and gets the bf16 head."""
    targets = {"run": run, "again": run / "adapter"}
    named = find_adapters(targets, base=None)
    assert named.nf4_head
    found = returned(evaluate_adapters(eval_config(targets, []), named, targets))
    lines = evals(run)
    assert found.judged[0].loss == lines[0]["eval_loss"]
    assert found.judged[1].loss == found.judged[2].loss == min(line["eval_loss"] for line in lines[1:])
    bare = find_adapters({"bare": write_adapter(tmp_path / "bare", untied, seed=1)}, base=None)
    heads = [load_adapters(one, compute_dtype="float32").model.head.weight.dtype for one in (named, bare)]
    assert heads == [torch.uint8, torch.bfloat16]
    assert answer(run, "Name a number.", base=None, max_new_tokens=4, temperature=0.0, seed=0).text


def test_runs_that_have_other_heads_are_not_judged_beside_each_other(
    tmp_path: Path, untied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, head in (("x", "nf4"), ("y", "bfloat16")):
        (tmp_path / name).mkdir()
        write_adapter(tmp_path / name / "adapter", untied, seed=1)
        (tmp_path / name / "plan.json").write_text(json.dumps({"double_quant": True, "head": head}))
    rows = tiny_run.write_rows(tmp_path / "rows.jsonl", 4)
    assert main(["eval", str(tmp_path / "x"), str(tmp_path / "y"), "--data", str(rows)]) == 2
    assert "whose run quantized the head of its base, and" in complaint(capsys)


def test_it_is_merged_into_the_head_it_was_trained_on_and_exported_with_a_word_of_it(
    run: Path, untied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = {}
    for kind in ("dequantized", "original"):
        options = ["--base", kind, "--dtype", "fp32", "--force"]
        assert main(["merge", str(run), "--to", str(tmp_path / kind), *options]) == 0
        merged[kind] = load_file(tmp_path / kind / "model.safetensors")["lm_head.weight"]
        told = capsys.readouterr().out
        if kind == "dequantized":
            line = next(line for line in told.splitlines() if "merged (dequantized" in line)
            assert line.split()[-3:] == ["0.0000", "100.0", "%"]
    original_VH = load_file(untied / "model.safetensors")["lm_head.weight"]
    assert torch.equal(merged["original"], original_VH.float())
    assert torch.equal(
        merged["dequantized"], nf4.dequantize(nf4.quantize(original_VH, double_quant=True), torch.float32)
    )
    assert main(["export", str(run), "--to", str(tmp_path / "exported")]) == 0
    assert "NF4, double quantization, its head too" in (tmp_path / "exported" / "README.md").read_text()


@pytest.mark.parametrize(
    "options, told",
    [
        ((), "found nf4, of a base in which embedding and head are one table"),
        (("lora.modules_to_save=[lm_head]",), "found nf4, and lm_head in lora.modules_to_save"),
    ],
)
def test_it_is_refused_where_there_is_no_frozen_head(
    options: tuple[str, ...],
    told: str,
    base: Path,
    untied: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny_config(tmp_path, untied if options else base, PACKED, *options)
    assert train_command(config) == 2
    error = complaint(capsys)
    assert "quantization.head: " + told in error
    assert "Leave quantization.head at bfloat16, or" in error


def test_a_real_run_takes_what_its_plan_says(disk_folder: Path) -> None:
    """Every phase, by torch's profiler; five seconds."""
    sizes = sizes_for(torch.device("cpu"))
    base, rows = write_base(disk_folder / "base", sizes), write_rows(disk_folder / "rows.jsonl", sizes)
    packed = config_of(Lever("head in NF4", (PACKED,)), base, rows, disk_folder / "run", sizes)
    found = measure(packed, torch.device("cpu"))
    check = judged_bytes("head in NF4", found)
    assert check.verdict == "ok", check

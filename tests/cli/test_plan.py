"""`qlora-trainer plan` and `train --dry-run` as a user calls them, on tiny bases: what is printed, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.cli.app import main
from qlora_trainer.config.load import load_config
from qlora_trainer.hardware.python_accelerator import python_accelerator
from qlora_trainer.report.reading import watched
from qlora_trainer.report.screen import stderr_console
from qlora_trainer.run import plan_command
from qlora_trainer.run.inputs import read_inputs
from tests.model.tiny_bases import small_config
from tests.run.tiny_run import write_base, write_rows

GIB = 2**30
# Before any test runs: autograd's engine counts the devices once, at the first backward of the process.
python_accelerator()

SHORT = ("--set", "data.seq_len=64")
KNOBS = {
    "rank": 16,
    "alpha": 32,
    "seq_len": 64,
    "activation_offload_layers": 0,  # levers that do not run yet are never proposed
    "embedding_residency": "device",
    "optimizer": "paged_adamw_32bit",
    "optimizer_residency": "paged",
}
PREDICTED = {
    "allocated_peak_bytes",
    "process_peak_bytes",
    "worst_peak_bytes",
    "host_peak_bytes",
    "peak_phase",
    "breakdown",
    "resident",
    "phases",
    "tokens_per_second",
    "reserved_peak_bytes",
    "fragmentation",
}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config.json, and no weights."""
    folder = tmp_path_factory.mktemp("tiny")
    small_config("llama").save_pretrained(folder)
    return folder


def called(capsys: pytest.CaptureFixture[str], *arguments: str, exit_code: int = 0) -> tuple[str, str]:
    """What the command says on stdout and on stderr."""
    assert main(arguments) == exit_code
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_json_for_a_card_that_is_not_here(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = called(capsys, "plan", "--model", str(tiny), "--vram", "8GiB", *SHORT, "--json")
    plan: dict[str, Any] = json.loads(out)
    assert err == ""
    assert (plan["fits"], plan["model"], plan["budget_bytes"]) == (True, str(tiny), 8 * GIB)
    assert "missing_bytes" not in plan
    assert "would_fit" not in plan
    assert plan["host_budget_bytes"] > 0
    assert plan["trainable_parameters"] > 0
    for one in (plan, *plan["alternatives"]):
        knobs, predicted = one["knobs"], one["predicted"]
        assert {key: knobs[key] for key in KNOBS} == KNOBS
        assert knobs["micro_batch_size"] == knobs["micro_batch_tokens"] / 64
        assert knobs["activation_keep_layers"] + knobs["activation_recompute_layers"] == 2
        assert {"micro_batches_per_step", "loss_chunk"} <= knobs.keys()
        assert predicted.keys() == PREDICTED
        assert sum(predicted["breakdown"].values()) == predicted["allocated_peak_bytes"]
        assert max(predicted["phases"].values()) == predicted["allocated_peak_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("asked", [[[0, 20], [15, 30]], [[0, 31]]], ids=str)
def test_layers_of_a_known_name_are_repeated(asked: list[list[int]], capsys: pytest.CaptureFixture[str]) -> None:
    """Without data, too: 35 layers of 30; a range that the base does not have is refused."""
    fits = asked[-1][1] <= 30
    options = ("--vram", "8GiB", *SHORT, "--set", f"lora.layer_replication={asked}", "--json")
    out, err = called(capsys, "plan", "--model", "smollm2-135m", *options, exit_code=0 if fits else 2)
    if not fits:
        assert "lora.layer_replication: found [[0, 31]]; expected [first, end] of a base of 30 layers" in err
        return
    knobs = json.loads(out)["knobs"]
    assert knobs["activation_keep_layers"] + knobs["activation_recompute_layers"] == 35


def test_tables_and_a_heat_map(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "frontier.png"
    out, err = called(capsys, "plan", "--model", str(tiny), "--gpu", "rtx-4060", *SHORT, "--plot", str(plot))
    assert err == ""
    assert "fits on GeForce RTX 4060" in out
    for said in ("micro-batch", "memory at the peak", "allocated peak", "rank"):
        assert said in out
    assert plot.read_bytes().startswith(b"\x89PNG\r\n")


def test_a_wrong_place_for_a_plot_is_told_before_anything_is_planned(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails where the path is looked at when there is a plan to draw."""
    monkeypatch.setattr(plan_command, "plan_on", lambda *_, **__: pytest.fail("planned all the same"))
    plot = tmp_path / "missing" / "frontier.png"
    out, err = called(capsys, "plan", "--model", str(tiny), "--vram", "8GiB", "--plot", str(plot), exit_code=2)
    assert out == ""
    assert err.startswith(f"qlora-trainer: error: {plot}: found no folder {plot.parent}")


def test_what_does_not_fit_is_json_one_line_and_exit_code_3(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("plan", "--model", "smollm2-135m", "--vram", "480MiB", "--set", "data.seq_len=256", "--json")
    out, err = called(capsys, *arguments, exit_code=3)
    plan: dict[str, Any] = json.loads(out)
    assert plan["fits"] is False
    assert plan["missing_bytes"] == plan["predicted"]["process_peak_bytes"] - plan["budget_bytes"]
    assert all(change.keys() == {"knob", "from", "to", "allocated_peak_bytes"} for change in plan["would_fit"])
    assert [change["knob"] for change in plan["would_fit"]][-1] == "--vram"  # memory.budget does not count beside it
    assert err.startswith("qlora-trainer: error: --vram: found 0.47 GiB on GPU with 480MiB")
    assert err.count("\n") == 1
    assert f"{plan['missing_bytes'] / GIB:.2f} GiB too little" in err
    for change in plan["would_fit"]:
        assert f"{change['knob']} {change['from']} -> {change['to']}" in err


def test_a_config_with_overrides_on_this_machines_cpu(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {{base: {tiny}}}\ndata: {{train: rows.jsonl, seq_len: 64}}\nlora: {{rank: 8}}\n")
    options = ("--set", "lora.alpha=4", "--set", "memory.micro_batch_tokens=512")  # pinned: a frontier of few cells
    out, err = called(capsys, "plan", str(config), "--ram", "2GiB", *options, "--json")
    plan = json.loads(out)
    assert err == ""
    assert (plan["device"], plan["budget_bytes"], plan["host_budget_bytes"]) == ("cpu", 2 * GIB, 2 * GIB)
    assert (plan["knobs"]["rank"], plan["knobs"]["alpha"], plan["knobs"]["seq_len"]) == (8, 4, 64)
    assert plan["knobs"]["optimizer"] == "adamw_32bit"
    assert plan["predicted"]["host_peak_bytes"] == plan["predicted"]["process_peak_bytes"]


def test_a_config_is_planned_for_the_lengths_of_its_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `train --dry-run` does it; a base without a tokenizer, and one that --model names, get full documents."""
    base, rows = write_base(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", 40)
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {{base: {base}}}\ndata: {{train: {rows}}}\n")
    capsys.readouterr()
    out, err = called(capsys, "plan", str(config), "--vram", "8GiB")
    assert err == ""
    assert "38 documents, " in out
    assert f"{watched(read_inputs(load_config(config)), stderr_console()).data.seq_len} tokens at most (seq_len)" in out
    (base / "tokenizer.json").unlink()
    out, err = called(capsys, "plan", str(config), "--vram", "8GiB", "--set", "data.seq_len=200")
    reason = f"documents of 200 tokens each (no tokenizer to count the tokens of {rows}"
    assert "".join(reason.split()) in "".join(out.split())  # a terminal breaks long lines anywhere
    out, err = called(capsys, "plan", str(config), "--model", str(base), "--vram", "8GiB", "--set", "data.seq_len=200")
    assert "documents of 200 tokens each (no data)" in out


@pytest.mark.parametrize("budget, exit_code", [("auto", 0), ("10MiB", 3)])
def test_a_dry_run_counts_the_data_and_plans(
    budget: str, exit_code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, rows = write_base(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", 40)
    capsys.readouterr()
    given = (f"model.base={base}", f"data.train={rows}", f"output.dir={tmp_path / 'run'}", f"memory.budget={budget}")
    options = [part for text in given for part in ("--set", text)]
    out, err = called(capsys, "train", *options, "--dry-run", exit_code=exit_code)
    assert "38 documents" in out
    assert "0 rows dropped, 0 repeated; a stop token is learned in 38 of 38" in " ".join(out.split())
    assert ("fits on the CPU" in out) is (exit_code == 0)
    assert err.count("\n") == (exit_code != 0)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_tells_of_rows_that_it_skips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, rows = write_base(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", 40)
    with rows.open("a") as file:
        file.write("{broken\n")
    capsys.readouterr()
    given = (f"model.base={base}", f"data.train={rows}", "data.on_bad_row=skip", "memory.budget=2GiB")
    options = [part for text in (*given, f"output.dir={tmp_path / 'run'}") for part in ("--set", text)]
    out, _ = called(capsys, "train", *options, "--dry-run", exit_code=0)
    assert f"1badrowof{rows}skipped{rows}:41:" in "".join(out.split())  # a long path is broken anywhere

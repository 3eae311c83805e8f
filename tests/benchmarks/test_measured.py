"""The README's table of what users measured is what the command makes of their reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.measured import EMPTY, FOLDER, main, read_all, table
from qlora_trainer.run.self_test.report import (
    CheckEntry,
    DeviceEntry,
    LeverEntry,
    PhaseEntry,
    Report,
    to_json,
)

MIB = 2**20


def report(name: str, *, kind: str = "cuda", measured: int = 200 * MIB, verdict: str = "ok") -> Report:
    is_gpu = kind == "cuda"
    return Report.model_validate(
        {
            "schema_version": 1,
            "made_on": "2026-12-01",
            "seconds": 40.0,
            "qlora_trainer": "0.1.0",
            "python": "3.12.1",
            "system": "Linux",
            "packages": {"torch": "2.13.0"},
            "device": DeviceEntry.model_validate(
                {
                    "kind": kind,
                    "name": name,
                    "memory_bytes": 15 * 2**30,
                    "compute_capability": "7.5" if is_gpu else None,
                    "cuda": "12.8" if is_gpu else None,
                    "num_threads": 2,
                }
            ),
            "compute_dtype": "float16",
            "checks": (
                CheckEntry.model_validate({"name": "a", "verdict": verdict, "found": "", "expected": ""}),
                CheckEntry(name="b", verdict="not on this device", found="", expected=""),
            ),
            "levers": (
                LeverEntry(
                    name="layers kept",
                    phases=(
                        PhaseEntry(phase="load", predicted_bytes=100 * MIB, measured_bytes=100 * MIB),
                        PhaseEntry(phase="backward", predicted_bytes=202 * MIB, measured_bytes=measured),
                    ),
                ),
            ),
        }
    )


def test_the_readme_has_the_table_that_the_command_makes() -> None:
    assert main(["--check"]) == 0


def test_an_empty_folder_says_so(tmp_path: Path) -> None:
    assert table(read_all(tmp_path)) == EMPTY
    if not list(FOLDER.glob("*.json")):
        assert EMPTY in (FOLDER.parents[1] / "README.md").read_text()


def test_a_report_is_a_row_gpus_first() -> None:
    rows = table([report("A CPU", kind="cpu", verdict="failed"), report("Tesla T4")]).splitlines()
    assert rows[2] == (
        "| Tesla T4 (sm_75) | 15.0 GiB | float16 | 202.0 / 200.0 MiB | +1.00%: layers kept, backward "
        "| 1 ok, 0 failed, 1 not on this device | 0.1.0, 2026-12-01 |"
    )
    assert rows[3].startswith("| A CPU | ")
    assert "0 ok, 1 failed, 1 not on this device" in rows[3]


def test_a_report_that_is_sent_changes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, folder = tmp_path / "page.md", tmp_path / "measured"
    folder.mkdir()
    page.write_text(f"before\n<!-- table: measured -->\n{EMPTY}<!-- end: measured -->\nafter\n")
    options = ["--folder", str(folder), "--page", str(page)]
    assert main([*options, "--check"]) == 0
    (folder / "t4.json").write_text(to_json(report("Tesla T4")))

    assert main([*options, "--check"]) == 1
    assert "python -m benchmarks.measured" in capsys.readouterr().err
    assert main(options) == 0
    assert main([*options, "--check"]) == 0
    assert "| Tesla T4 (sm_75) |" in page.read_text()

    (folder / "bad.json").write_text("{}")
    assert main(options) == 4
    assert "bad.json" in capsys.readouterr().err

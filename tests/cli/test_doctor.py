"""`doctor --self-test`: a line a check, the report, and an exit code of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_trainer.cli.app import main
from qlora_trainer.run.self_test import command
from qlora_trainer.run.self_test.check import Check
from qlora_trainer.run.self_test.report import read_report

CHECKS = [
    Check("NF4 levels", "ok", "off by 0.0e+00", "the paper's table"),
    Check("NF4 quantize", "failed", "3 of 9 wrong", "the nearest level", "why [x]"),
    Check("managed memory", "not on this device", "a CPU", "a CUDA device"),
]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(monkeypatch: pytest.MonkeyPatch, *checks: Check) -> None:
    monkeypatch.setattr(command, "_all_checks", lambda *_: iter(checks))


def test_a_line_a_check(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found(monkeypatch, *CHECKS)

    assert main(["doctor", "--self-test", "--report", "report.json"]) == 7

    captured = capsys.readouterr()
    assert captured.out.splitlines()[:3] == [
        "ok     NF4 levels: off by 0.0e+00",
        "failed NF4 quantize: 3 of 9 wrong (expected the nearest level): why [x]",
        "-      managed memory: a CPU, not on this device: it takes a CUDA device",
    ]
    assert captured.err.startswith(
        "qlora-trainer: error: doctor --self-test: found 1 of 3 checks failed: NF4 quantize;"
    )
    assert captured.err.count("\n") == 1
    assert read_report(work / "report.json").has_failed  # a failure is what is worth sending


def test_all_is_well(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found(monkeypatch, CHECKS[0], CHECKS[2])
    assert main(["doctor", "--self-test", "--json"]) == 0
    assert [check["name"] for check in json.loads(capsys.readouterr().out)["checks"]] == [
        "NF4 levels",
        "managed memory",
    ]
    assert [path.name for path in work.iterdir()] == ["cache"]


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--report", "r.json"], "--report without --self-test"),
        (["--self-test", "--report", "old.json"], "something that is there"),
    ],
)
def test_a_mistake_is_told_before_anything_is_tested(
    arguments: list[str], told: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "old.json").write_text("kept")
    assert main(["doctor", *arguments]) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.out == ""
    assert (work / "old.json").read_text() == "kept"


@pytest.mark.slow
def test_this_machine_passes(
    work: Path, disk_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it, as a user runs it; about half a minute."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk_folder / "cache"))
    assert main(["doctor", "--self-test", "--report", "report.json"]) == 0, capsys.readouterr().out
    report = read_report(work / "report.json")
    assert report.seconds > 0.0
    assert str(work) not in (work / "report.json").read_text()

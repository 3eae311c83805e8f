"""A report is what its schema says, says nothing of whose it is, and is read with suspicion."""

from __future__ import annotations

import getpass
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from qlora_trainer.errors import DataError, SelfTestError
from qlora_trainer.run.self_test import command
from qlora_trainer.run.self_test.check import Check
from qlora_trainer.run.self_test.levers import LeverRun
from qlora_trainer.run.self_test.report import (
    Report,
    read_report,
    report_schema_text,
    to_json,
)

OK = Check("NF4 levels", "ok", "off by 0.0e+00", "the paper's table")
FAILED = Check("NF4 quantize", "failed", "RuntimeError", "to run", "no kernel in /home/somebody/lib.so")
ABSENT = Check("managed memory", "not on this device", "a CPU", "a CUDA device")


@pytest.fixture
def make_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A report as the command makes it, of checks that are given."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(*checks: Check) -> Report:
        def found(_device: torch.device, _dtype: str, folder: Path, runs: list[LeverRun]) -> Iterator[Check]:
            assert str(folder).startswith(str(tmp_path / "cache"))
            runs.append(LeverRun("layers recomputed", {"load": (1000, 990), "forward": (2000, 2001)}))
            yield from checks

        monkeypatch.setattr(command, "_all_checks", found)
        testing = command.self_test()
        seen = []
        while True:
            try:
                seen.append(next(testing))
            except StopIteration as end:
                assert seen == list(checks)
                report: Report = end.value
                return report

    return make


def test_the_shipped_schema_is_that_of_the_report() -> None:
    shipped = json.loads(report_schema_text())
    assert shipped.pop("$schema") == "https://json-schema.org/draft/2020-12/schema"
    assert shipped == Report.model_json_schema()


def test_a_report_is_valid_and_comes_back_the_same(make_report: Any, tmp_path: Path) -> None:
    report = make_report(OK, FAILED, ABSENT)
    command.write_report(report, tmp_path / "report.json")

    value = json.loads((tmp_path / "report.json").read_text())
    jsonschema.Draft202012Validator(json.loads(report_schema_text())).validate(value)
    assert read_report(tmp_path / "report.json") == report
    assert [check["verdict"] for check in value["checks"]] == ["ok", "failed", "not on this device"]
    assert value["levers"][0]["phases"][0] == {"phase": "load", "predicted_bytes": 1000, "measured_bytes": 990}


def test_a_report_does_not_say_whose_it_is(make_report: Any, tmp_path: Path) -> None:
    text = to_json(make_report(OK, FAILED, ABSENT))
    for secret in (socket.gethostname(), getpass.getuser(), str(Path.home()), str(tmp_path), "somebody", "lib.so"):
        assert secret not in text
    assert "/" not in text


def test_nothing_is_left_over(make_report: Any, tmp_path: Path) -> None:
    make_report(OK)
    assert list((tmp_path / "cache" / "qlora_trainer").iterdir()) == []


def test_a_device_whose_name_looks_like_a_path_is_told_without(
    make_report: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_processor", lambda: "RX 6700/6750 ~a\\b")
    assert make_report(OK).device.name == "RX 6700 6750  a b"


def test_what_failed_is_named(make_report: Any) -> None:
    command.require_passed(make_report(OK, ABSENT))
    with pytest.raises(SelfTestError, match=r"1 of 3 checks failed: NF4 quantize; ") as caught:
        command.require_passed(make_report(OK, FAILED, ABSENT))
    assert caught.value.exit_code == 7


@pytest.mark.parametrize(
    "change, found",
    [
        ({"made_on": "2026-11-28T10:00"}, "made_on: "),
        ({"host": "me"}, "host: "),
        ({"schema_version": 2}, "schema_version: "),
        ({"python": "/usr/bin/python3"}, "python: "),
        ({"system": "C:\\Users\\me"}, "system: "),
        ({"compute_dtype": "int8"}, "compute_dtype: "),
        ({"seconds": "3"}, "seconds: "),
        ({"checks": [{"name": "x", "verdict": "fine", "found": "", "expected": ""}]}, "checks.0.verdict: "),
    ],
)
def test_what_is_no_report_is_refused_by_both(
    change: dict[str, Any], found: str, make_report: Any, tmp_path: Path
) -> None:
    value = json.loads(to_json(make_report(OK))) | change
    path = tmp_path / "sent.json"
    path.write_text(json.dumps(value))

    with pytest.raises(DataError, match=found):
        read_report(path)
    assert not jsonschema.Draft202012Validator(json.loads(report_schema_text())).is_valid(value)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a": 1, "a": 2}', '{"seconds": NaN}', '{"x": "' + "a" * 2**21 + '"}']
)
def test_what_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "sent.json").write_text(text)
    with pytest.raises(DataError):
        read_report(tmp_path / "sent.json")

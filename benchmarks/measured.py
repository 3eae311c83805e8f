"""What users measured: the table of README.md, from the self-test reports in docs/measured.

    python -m benchmarks.measured [--check]

Each file is checked against the report's schema; one that does not fit is refused by name. Exit code 1 if `--check`
finds another table in the file, which is then left as it is; 4 for a report that is none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.marked_tables import markdown, update
from qlora_trainer.errors import DataError
from qlora_trainer.run.self_test.report import Report, read_report

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE, FOLDER, NAME = REPOSITORY / "README.md", REPOSITORY / "docs" / "measured", "measured"
EMPTY = "*Nobody has sent a report yet, so there is no table.*\n"
HEADER = (
    "device",
    "memory",
    "dtype",
    "peak of a tiny run: plan / measured",
    "plan furthest off",
    "checks",
    "version, date",
)


def table(reports: Sequence[Report]) -> str:
    """A row a report, GPUs first, by name; or that there is none."""
    if not reports:
        return EMPTY
    return markdown(HEADER, [_row(report) for report in sorted(reports, key=_order)], right=(1,))


def read_all(folder: Path) -> list[Report]:
    """All reports of a folder.

    Raises:
        DataError: a file that is none.
    """
    return [read_report(path) for path in sorted(folder.glob("*.json"))]


def _order(report: Report) -> tuple[bool, str, str]:
    return report.device.kind == "cpu", report.device.name, report.made_on


def _row(report: Report) -> tuple[str, ...]:
    phases = [(lever.name, phase) for lever in report.levers for phase in lever.phases]
    failed = sum(check.verdict == "failed" for check in report.checks)
    elsewhere = sum(check.verdict == "not on this device" for check in report.checks)
    device = report.device
    capability = f" (sm_{device.compute_capability.replace('.', '')})" if device.compute_capability else ""
    peak = off = "nothing measured"
    if phases:
        _, largest = max(phases, key=lambda pair: pair[1].measured_bytes)
        peak = f"{largest.predicted_bytes / 2**20:,.1f} / {largest.measured_bytes / 2**20:,.1f} MiB"
        name, worst = max(phases, key=lambda pair: abs(pair[1].predicted_bytes / max(1, pair[1].measured_bytes) - 1))
        share = worst.predicted_bytes / max(1, worst.measured_bytes) - 1
        off = f"{share:+.2%}: {name}, {worst.phase}"
    ok = len(report.checks) - failed - elsewhere
    checks = f"{ok} ok, {failed} failed" + (f", {elsewhere} not on this device" if elsewhere else "")
    return (
        f"{device.name}{capability}",
        f"{device.memory_bytes / 2**30:.1f} GiB",
        report.compute_dtype,
        peak,
        off,
        checks,
        f"{report.qlora_trainer}, {report.made_on}",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measured", description="What users measured.")
    parser.add_argument("--check", action="store_true", help="compare with README.md instead of writing it")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="another folder of reports")
    parser.add_argument("--page", type=Path, default=PAGE, help="another file with the marks of the table")
    chosen = parser.parse_args(arguments)
    try:
        made = table(read_all(chosen.folder))
    except DataError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if not update(chosen.page, NAME, made, is_check=chosen.check) and chosen.check:
        print(f"{chosen.page.name} is not what the command makes: run python -m benchmarks.measured", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

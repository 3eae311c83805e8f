"""The self test: tiny runs, numbers and files on this machine, each beside what it should be; and the report of it."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import torch

from qlora_trainer import __version__
from qlora_trainer.errors import SelfTestError
from qlora_trainer.hardware.cache_folder import cache_folder
from qlora_trainer.hardware.device import choose_compute_dtype, choose_device, num_cpu_threads
from qlora_trainer.hardware.memory import total_memory_bytes
from qlora_trainer.run.checkpoint.manifest import package_versions
from qlora_trainer.run.checkpoint.storage import write_atomically
from qlora_trainer.run.self_test.check import Check
from qlora_trainer.run.self_test.cuda_only import cuda_checks
from qlora_trainer.run.self_test.levers import LeverRun, lever_checks
from qlora_trainer.run.self_test.numerics import numeric_checks
from qlora_trainer.run.self_test.paging import paging_checks
from qlora_trainer.run.self_test.report import CheckEntry, DeviceEntry, LeverEntry, PhaseEntry, Report, to_json

_CPU_INFO = Path("/proc/cpuinfo")


def self_test() -> Generator[Check, None, Report]:
    """Yield each check when it is done, and return the report; nothing is left over.

    Raises:
        StorageError: there is no cache folder to work in.
    """
    start = time.perf_counter()
    device = choose_device()
    dtype = choose_compute_dtype(device)
    checks: list[Check] = []
    runs: list[LeverRun] = []
    with tempfile.TemporaryDirectory(prefix="self-test-", dir=cache_folder()) as name:
        folder = Path(name)
        with _own_cache(folder / "cache"):
            # The runs come first: what libraries allocate once, for products, is in their plans.
            for check in _all_checks(device, dtype, folder, runs):
                checks.append(check)
                yield check
    return Report(
        schema_version=1,
        made_on=date.today().isoformat(),
        seconds=round(time.perf_counter() - start, 1),
        qlora_trainer=__version__,
        python=platform.python_version(),
        system=_system(),
        packages=package_versions(),
        device=_device_entry(device),
        compute_dtype=dtype,
        checks=tuple(_check_entry(check) for check in checks),
        levers=tuple(_lever_entry(run) for run in runs),
    )


def write_report(report: Report, path: Path) -> None:
    """Write a report, whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    write_atomically(path, to_json(report).encode())


def require_passed(report: Report) -> None:
    """Say which checks failed, if any did.

    Raises:
        SelfTestError: names them.
    """
    failed = [check.name for check in report.checks if check.verdict == "failed"]
    if failed:
        raise SelfTestError(
            where="doctor --self-test",
            found=f"{len(failed)} of {len(report.checks)} checks failed: {'; '.join(failed)}",
            expected="none",
            fix="Send the report of --report FILE (docs/measured says how): what fails there is what we need to know.",
        )


def _all_checks(device: torch.device, dtype: str, folder: Path, runs: list[LeverRun]) -> Iterator[Check]:
    yield from lever_checks(device, folder, runs)
    yield from numeric_checks(device, dtype)
    yield from paging_checks(device, folder)
    yield from cuda_checks(device, folder)


@contextmanager
def _own_cache(folder: Path) -> Iterator[None]:
    """While active, what is cached goes here and not among the user's: bases that nobody asks for again."""
    before = os.environ.get("XDG_CACHE_HOME")
    folder.mkdir()
    os.environ["XDG_CACHE_HOME"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = before


def _system() -> str:
    return f"{platform.system()}{' under WSL' if 'microsoft' in platform.release().lower() else ''}"


def _device_entry(device: torch.device) -> DeviceEntry:
    is_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_gpu else _processor()
    capability = torch.cuda.get_device_capability(device) if is_gpu else None
    return DeviceEntry(
        kind="cuda" if is_gpu else "cpu",
        name=_plain(name),
        memory_bytes=total_memory_bytes(device),
        compute_capability=None if capability is None else f"{capability[0]}.{capability[1]}",
        cuda=_plain(str(torch.version.cuda)) if is_gpu else None,
        num_threads=num_cpu_threads(),
    )


def _processor() -> str:
    for line in _CPU_INFO.read_text().splitlines() if _CPU_INFO.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def _plain(text: str) -> str:
    """Without what a report does not take."""
    return "".join(" " if letter in "/\\~\r\n" else letter for letter in text)[:200]


def _check_entry(check: Check) -> CheckEntry:
    return CheckEntry(name=check.name, verdict=check.verdict, found=check.found, expected=check.expected)


def _lever_entry(run: LeverRun) -> LeverEntry:
    phases = (
        PhaseEntry(phase=phase, predicted_bytes=predicted, measured_bytes=taken)
        for phase, (predicted, taken) in run.phases.items()
    )
    return LeverEntry(name=run.name, phases=tuple(phases))

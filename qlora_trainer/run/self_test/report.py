"""The report of a self test: what a user may send, and what it is checked against. No torch.

`report.schema.json` beside this file is the JSON schema of it. Nothing in a report says whose machine it is from: no
path, no host or user name; texts with a slash or a backslash are refused.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qlora_trainer.config.strict_json import decode, read_capped
from qlora_trainer.errors import DataError

SCHEMA_FILE = "report.schema.json"
MAX_REPORT_BYTES = 2**20
Text = Annotated[str, Field(max_length=200, pattern=r"^[^/\\~\r\n]*$")]
Bytes = Annotated[int, Field(ge=0, le=2**62)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class DeviceEntry(_Part):
    """What was tested."""

    kind: Literal["cpu", "cuda"]
    name: Text = Field(description="Of the GPU, or of the processor.")
    memory_bytes: Bytes = Field(
        description="Of the device, free or not; of a CPU no more than a control group may have."
    )
    compute_capability: Annotated[str, Field(pattern=r"^[0-9]{1,2}\.[0-9]$")] | None = Field(
        description="Major and minor; null on a CPU."
    )
    cuda: Text | None = Field(description="The CUDA version that torch was built for; null on a CPU.")
    num_threads: int = Field(ge=1, description="Processors that the process may use.")


class CheckEntry(_Part):
    """One thing that was looked at."""

    name: Text
    verdict: Literal["ok", "failed", "not on this device"]
    found: Text
    expected: Text


class PhaseEntry(_Part):
    """Allocated bytes at the peak of one phase of a tiny run."""

    phase: Text
    predicted_bytes: Bytes
    measured_bytes: Bytes


class LeverEntry(_Part):
    """A tiny run with one way of trading time for memory."""

    name: Text
    phases: tuple[PhaseEntry, ...]


class Report(_Part):
    """What a self test found."""

    schema_version: Literal[1]
    made_on: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$")]
    seconds: float = Field(ge=0.0, description="Of the whole test, on the wall's clock.")
    qlora_trainer: Text = Field(description="Version of this program.")
    python: Text
    system: Text = Field(description="Linux, or Linux under WSL.")
    packages: dict[Text, Text] = Field(description="Versions of the packages that decide a run's numbers.")
    device: DeviceEntry
    compute_dtype: Literal["float32", "bfloat16", "float16"]
    checks: tuple[CheckEntry, ...]
    levers: tuple[LeverEntry, ...] = Field(description="One for each lever that this version has and that ran here.")

    @property
    def has_failed(self) -> bool:
        return any(check.verdict == "failed" for check in self.checks)


def to_json(report: Report) -> str:
    """As it is written and sent."""
    return report.model_dump_json(indent=2) + "\n"


def report_schema_text() -> str:
    """The JSON schema that is shipped."""
    return files(__package__).joinpath(SCHEMA_FILE).read_text(encoding="utf-8")


def read_report(path: Path) -> Report:
    """Read a report that somebody sent.

    Raises:
        DataError: it is none; names the first thing that is wrong.
    """
    try:
        data = read_capped(path, MAX_REPORT_BYTES)
        decode(data)  # keys that are there twice, numbers that are none
        return Report.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the report"
        raise _no_report(path, f"{where}: {first['msg']}") from error
    except ValueError as error:
        raise _no_report(path, str(error)) from error


def _no_report(path: Path, found: str) -> DataError:
    return DataError(
        where=str(path),
        found=found,
        expected="a report of `qlora-trainer doctor --self-test --report FILE`",
        fix="Make it again with this version.",
    )

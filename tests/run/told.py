"""The command in this process: its exit code, and the one line it complains with."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_trainer.cli.app import main
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.config.show import to_yaml


def train_command(config: RunConfig, *arguments: str) -> int:
    """`qlora-trainer train` with the config as a file beside the run folder; returns the exit code."""
    path = Path(config.output.dir).with_suffix(".yaml")
    path.write_text(to_yaml(config))
    return main(["train", str(path), *arguments])


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """What stderr says: one line and no traceback."""
    error = capsys.readouterr().err
    assert error.startswith("qlora-trainer: error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from accelerate import tracking
from accelerate.utils import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qlora_trainer.errors import ConfigError
from qlora_trainer.run.trackers import TRACKER_PACKAGES, check_trackers, open_trackers


def test_the_names_are_accelerates() -> None:
    assert set(TRACKER_PACKAGES) == set(tracking.LOGGER_TYPE_TO_CLASS) == {*LoggerType.list()} - {"all"}
    for name in tracking.get_available_trackers():
        check_trackers([str(name)])


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    config = {"training": {"learning_rate": 2e-4, "max_steps": None}, "output": {"trackers": ["tensorboard"]}}
    with closing(open_trackers(["tensorboard"], run_dir=tmp_path, config=config)) as trackers:
        trackers.log({"loss": 2.5, "peak_bytes": 7}, step=1)
        trackers.log({"loss": 1.5}, step=2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (2, 1.5)]
    assert [event.value for event in events.Scalars("peak_bytes")] == [7.0]
    hparams = next((tmp_path / "tensorboard").glob("*/hparams.yml")).read_text()
    assert "training.learning_rate: 0.0002" in hparams
    assert """output.trackers: '["tensorboard"]'""" in hparams


class _Remembering(tracking.GeneralTracker):  # type: ignore[misc]  # accelerate ships no types
    """Stands in for a tracker whose package is not installed here."""

    name = "remembering"
    requires_logging_directory = False

    def __init__(self, run_name: str, *more: object) -> None:
        super().__init__()
        self.calls: list[object] = [(run_name, *more)]

    @property
    def tracker(self) -> object:
        return self.calls

    def start(self) -> None:
        self.calls.append("start")

    def store_init_configuration(self, values: dict[str, object]) -> None:
        self.calls.append(values)

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.calls.append((values, step))

    def finish(self) -> None:
        self.calls.append("finish")


@pytest.mark.parametrize("needs_folder", [False, True])
def test_other_trackers_get_the_project_and_a_folder_where_they_want_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs_folder: bool
) -> None:
    opened: list[_Remembering] = []

    def open_one(*arguments: str) -> _Remembering:
        opened.append(_Remembering(*arguments))
        return opened[-1]

    open_one.requires_logging_directory = needs_folder  # type: ignore[attr-defined]  # as on a class
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", open_one)
    monkeypatch.setattr("qlora_trainer.run.trackers.TRACKER_PACKAGES", {"wandb": ("json",)})
    with closing(open_trackers(["wandb"], run_dir=tmp_path, config={"a": {"b": 1}})) as trackers:
        trackers.log({"loss": 1.0}, step=3)
    arguments = ("qlora-trainer", tmp_path) if needs_folder else ("qlora-trainer",)
    assert opened[0].calls == [arguments, "start", {"a.b": 1}, ({"loss": 1.0}, 3), "finish"]


@pytest.mark.parametrize(
    "names, problem",
    [
        (["tensorbord"], r"output\.trackers\[0\]: found 'tensorbord'; .* Did you mean tensorboard\?"),
        (["tensorboard", "xyz"], r"output\.trackers\[1\]: found 'xyz'; expected one of aim,"),
        (["tensorboard", "tensorboard"], "tensorboard twice"),
        (["clearml"], "clearml, whose package is not installed.*pip install clearml"),
    ],
)
def test_a_tracker_that_cannot_be_opened_is_refused(names: list[str], problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        check_trackers(names)
    with pytest.raises(ConfigError, match=problem):
        open_trackers(names, run_dir=tmp_path, config={})
    assert not list(tmp_path.iterdir())


def test_neither_the_check_nor_an_empty_list_imports_torch(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from qlora_trainer.run import folder, records, signals
from qlora_trainer.run.trackers import check_trackers, open_trackers
check_trackers(["tensorboard"])
trackers = open_trackers([], run_dir=Path("."), config={})
trackers.log({"loss": 1.0}, step=1)
trackers.close()
print([name for name in ("torch", "accelerate", "tensorboard") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

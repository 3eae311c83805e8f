"""Metrics sent to tensorboard, wandb, mlflow, trackio and others, through accelerate's own trackers.

Names are checked without importing accelerate (and so torch): a wrong one is told at once. accelerate is imported only
when a tracker is asked for.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_trainer.errors import ConfigError

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

# accelerate's names, and the packages of which any one is enough; a test holds this against accelerate itself.
TRACKER_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "aim": ("aim",),
    "clearml": ("clearml",),
    "comet_ml": ("comet_ml",),
    "dvclive": ("dvclive",),
    "mlflow": ("mlflow",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
_PROJECT_NAME = "qlora-trainer"


class Trackers:
    """The open trackers of one run; with none, every call does nothing."""

    __slots__ = ("_trackers",)

    def __init__(self, trackers: Sequence[GeneralTracker]) -> None:
        self._trackers = tuple(trackers)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send the numbers of one step, under the names that the run folder's logs use."""
        for tracker in self._trackers:
            tracker.log(dict(values), step=step)

    def close(self) -> None:
        """Send what is still waiting and end the run there."""
        for tracker in self._trackers:
            tracker.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that cannot be opened, without importing it.

    Args:
        names: `output.trackers`.

    Raises:
        ConfigError: a name is unknown, given twice, or its package is not installed.
    """
    for position, name in enumerate(names):
        where = f"output.trackers[{position}]"
        if name not in TRACKER_PACKAGES:
            close = difflib.get_close_matches(name, TRACKER_PACKAGES, n=1)
            hint = f"Did you mean {close[0]}?" if close else "Remove it."
            expected = f"one of {', '.join(TRACKER_PACKAGES)}"
            raise ConfigError(where=where, found=repr(name), expected=expected, fix=hint)
        if name in names[:position]:
            raise ConfigError(where=where, found=f"{name} twice", expected="each tracker once", fix="Remove one.")
        packages = TRACKER_PACKAGES[name]
        if not any(find_spec(package) for package in packages):
            raise ConfigError(
                where=where,
                found=f"{name}, whose package is not installed",
                expected="an installed tracker",
                fix=f"pip install {packages[0]}, or remove it from output.trackers.",
            )


def open_trackers(names: Sequence[str], *, run_dir: Path, config: Mapping[str, Any]) -> Trackers:
    """Start a run with each tracker; those that write files write them into the run folder.

    Args:
        names: `output.trackers`, as `check_trackers` passes them.
        run_dir: the run folder; tensorboard's files go to its `tensorboard/`.
        config: the resolved config, nested; sent flat, by dotted key.

    Returns:
        The open trackers; the caller closes them (`contextlib.closing`).

    Raises:
        ConfigError: as `check_trackers`.
    """
    check_trackers(names)
    if not names:
        return Trackers(())
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's trackers ask it whether this is the main process
    trackers = []
    for name in names:
        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        if name == "tensorboard":
            tracker = tracker_class(name, run_dir)  # its first argument names a folder below the second
        elif tracker_class.requires_logging_directory:
            tracker = tracker_class(_PROJECT_NAME, run_dir)
        else:
            tracker = tracker_class(_PROJECT_NAME)
        tracker.start()
        tracker.store_init_configuration(_flatten(config))
        trackers.append(tracker)
    return Trackers(trackers)


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Trackers take scalars only: what is none (a list, null) is sent as its JSON."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return flat

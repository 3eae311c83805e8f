"""Read a checkpoint back, and only one whose every byte is what was saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_trainer.config.strict_json import decode, read_capped
from qlora_trainer.errors import StorageError
from qlora_trainer.run.checkpoint.listing import list_steps
from qlora_trainer.run.checkpoint.manifest import ADAPTER_NAME, OPTIMIZER_NAME, STATE_NAME, read_manifest, verify
from qlora_trainer.run.checkpoint.storage import LOCAL, Storage, refusal
from qlora_trainer.run.checkpoint.tensors import read_tensors


@dataclass(frozen=True, slots=True)
class Rejected:
    """A checkpoint that was passed over, and why; each reason begins with the file's name."""

    path: Path
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.path.name} ({'; '.join(self.reasons)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A verified checkpoint.

    Attributes:
        step: optimizer steps done.
        path: the `step-…` directory.
        adapter: weights by parameter name, on the CPU; they map the file, so copy before writing to them.
        optimizer: state by parameter name, likewise.
        state: as it was saved, with `step`.
        fingerprints: of what the run was made of.
        versions: of the packages that made it.
        rejected: newer checkpoints that did not verify, newest first.
    """

    step: int
    path: Path
    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    fingerprints: Mapping[str, str]
    versions: Mapping[str, str]
    rejected: tuple[Rejected, ...] = ()


def newest_verified(folder: Path, *, storage: Storage = LOCAL) -> Loaded | None:
    """Load the checkpoint with the highest step whose files are all as its manifest says.

    Args:
        folder: the run's `checkpoints` directory.
        storage: where it is listed.

    Returns:
        The checkpoint, with the newer ones that were passed over; None where there is none at all.

    Raises:
        StorageError: checkpoints are there but none is whole (gives every reason), or one was made by a newer version
            of this program (nothing older is tried: it is not damaged).
    """
    try:
        steps = list_steps(folder, storage) if folder.exists() else []
    except OSError as error:
        raise refusal(error, where=folder, doing="looking for checkpoints") from error
    rejected: list[Rejected] = []
    for _, path in reversed(steps):
        outcome = _load(path, tuple(rejected))
        if isinstance(outcome, Loaded):
            return outcome
        rejected.append(outcome)
    if rejected:
        raise StorageError(
            where=str(folder),
            found=f"no whole checkpoint: {', '.join(map(str, rejected))}",
            expected="at least one whose files are as its manifest says",
            fix="Restore one from a copy, or start again in another folder (nothing is started over silently).",
        )
    return None


def load_checkpoint(path: Path) -> Loaded:
    """Load one named checkpoint, or fail; nothing else is tried.

    Args:
        path: a `step-…` directory; `best` and `last` are followed.

    Raises:
        StorageError: it is not whole (gives every reason), or was made by a newer version of this program.
    """
    outcome = _load(path.resolve(), ())
    if isinstance(outcome, Loaded):
        return outcome
    raise StorageError(
        where=str(path),
        found=f"a damaged checkpoint: {'; '.join(outcome.reasons)}",
        expected="files as its manifest says",
        fix="Resume with --resume auto, which takes the newest whole checkpoint.",
    )


def _load(path: Path, rejected: tuple[Rejected, ...]) -> Loaded | Rejected:
    reasons = verify(path)
    if reasons:
        return Rejected(path, tuple(reasons))
    name = ""
    try:
        manifest = read_manifest(path)
        adapter = read_tensors(path / (name := ADAPTER_NAME))
        optimizer = read_tensors(path / (name := OPTIMIZER_NAME))
        state = decode(read_capped(path / (name := STATE_NAME)))
    except (OSError, ValueError) as error:
        return Rejected(path, (f"{name}: {error}",))
    if state.get("step") != manifest.step:
        return Rejected(path, (f"{STATE_NAME}: step {state.get('step')}, the manifest says {manifest.step}",))
    return Loaded(
        step=manifest.step,
        path=path,
        adapter=adapter,
        optimizer=optimizer,
        state=state,
        fingerprints=manifest.fingerprints,
        versions=manifest.versions,
        rejected=rejected,
    )

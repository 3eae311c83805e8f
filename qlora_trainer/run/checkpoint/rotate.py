"""Remove old checkpoints, oldest step first, so that a half-removed one is never listed."""

from __future__ import annotations

from pathlib import Path

from qlora_trainer.errors import StorageError
from qlora_trainer.run.checkpoint.listing import linked_step, list_steps, point
from qlora_trainer.run.checkpoint.manifest import read_manifest
from qlora_trainer.run.checkpoint.storage import LOCAL, TEMPORARY_PREFIX, Storage, refusal, remove_tree, sweep

MIN_CHECKPOINTS = 2  # one to load and one to fall back on


def rotate(folder: Path, *, keep_checkpoints: int, run_id: str, storage: Storage = LOCAL) -> tuple[int, ...]:
    """Remove all but the newest checkpoints of one run; what `best` and `last` point at stays.

    Args:
        folder: the run's `checkpoints` directory.
        keep_checkpoints: how many of the newest stay; two at least, whatever is asked.
        run_id: checkpoints of another run are neither counted nor removed.
        storage: where they lie.

    Returns:
        The steps removed.

    Raises:
        OSError: the file system refused.
    """
    exempt_names = {linked_step(folder, "best"), linked_step(folder, "last")}
    mine = [(step, path) for step, path in list_steps(folder, storage) if _run_id(path) == run_id]
    removed = []
    for step, path in mine[: -max(keep_checkpoints, MIN_CHECKPOINTS)]:
        if path.name not in exempt_names:
            remove_step(path, storage)
            removed.append(step)
    return tuple(removed)


def discard_after(folder: Path, *, step: int, storage: Storage = LOCAL) -> tuple[int, ...]:
    """Remove the checkpoints beyond the step that a run resumes from.

    They are damaged ones that a resume fell back over, or the course that the run took before it was resumed from an
    older step; left there, the next resume would start from them. What a crash left unfinished is removed as well.

    Args:
        folder: the run's `checkpoints` directory.
        step: the step resumed from; 0 removes every checkpoint.
        storage: where they lie.

    Returns:
        The steps removed.

    Raises:
        StorageError: the file system refused.
    """
    try:
        steps = list_steps(folder, storage)
        removed = {path.name: found for found, path in steps if found > step}
        if linked_step(folder, "best") in removed:
            storage.remove(folder / "best")
        if linked_step(folder, "last") in removed:
            if len(removed) < len(steps):
                point(folder, "last", max(found for found, _ in steps if found <= step), storage)
            else:
                storage.remove(folder / "last")
        for found, path in reversed(steps):
            if found > step:
                remove_step(path, storage)
        sweep(folder, storage)  # what a crash left half-removed, where no save follows that would sweep it
    except OSError as error:
        raise refusal(error, where=folder, doing=f"removing checkpoints after step {step}") from error
    return tuple(removed.values())


def remove_step(path: Path, storage: Storage) -> None:
    """Take a step out of the listing at once, then remove it; `sweep` finishes what a crash interrupts."""
    doomed = path.with_name(f"{TEMPORARY_PREFIX}removed-{path.name}")
    storage.rename(path, doomed)
    storage.fsync_dir(path.parent)  # else a power loss could bring back the name without the files
    remove_tree(doomed, storage)


def _run_id(path: Path) -> str | None:
    """None for a checkpoint that cannot say whose it is: it is left alone."""
    if path.is_symlink():
        return None
    try:
        return read_manifest(path).run_id
    except (OSError, ValueError, StorageError):
        return None

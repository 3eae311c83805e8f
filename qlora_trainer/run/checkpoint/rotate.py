"""Which checkpoints stay, and where `last` and `best` point.

Old ones go oldest first, and each leaves the listing before its files do, so that a half-removed one is never listed.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from qlora_trainer.config.strict_json import decode, read_capped
from qlora_trainer.errors import StorageError
from qlora_trainer.run.checkpoint.listing import linked_step, list_steps, point, step_name
from qlora_trainer.run.checkpoint.manifest import STATE_NAME, read_manifest
from qlora_trainer.run.checkpoint.storage import LOCAL, TEMPORARY_PREFIX, Storage, refusal, remove_tree, sweep

MIN_CHECKPOINTS = 2  # one to load and one to fall back on


def rotate(folder: Path, *, keep_checkpoints: int, run_id: str, storage: Storage = LOCAL) -> tuple[int, ...]:
    """Remove all but the newest checkpoints of one run; what `best` and `last` point at stays.

    The best that a newest one knew of stays as well: a run that is resumed from there may still need it.

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
    mine = [(step, path) for step, path in list_steps(folder, storage) if _run_id(path) == run_id]
    num_kept = max(keep_checkpoints, MIN_CHECKPOINTS)
    exempt_names = {linked_step(folder, "best"), linked_step(folder, "last")}
    exempt_names |= {_best_name(path) for _, path in mine[-num_kept:]}
    removed = []
    for step, path in mine[:-num_kept]:
        if path.name not in exempt_names:
            remove_step(path, storage)
            removed.append(step)
    return tuple(removed)


def relink(folder: Path, *, last: int, best: int | None, storage: Storage = LOCAL) -> None:
    """Let `last` and `best` point where the state of a resumed run says.

    A crash between a commit and its links leaves them at older steps, and a step that is there is not saved again.

    Args:
        folder: the run's `checkpoints` directory.
        last: the step resumed from.
        best: the best step so far; None removes the link.
        storage: where they lie.

    Raises:
        StorageError: the file system refused.
    """
    try:
        for link_name, step in (("last", last), ("best", best)):
            linked = linked_step(folder, link_name)
            if step is None and linked is not None:
                storage.remove(folder / link_name)
            elif step is not None and linked != step_name(step):
                sweep(folder, storage)  # a crash may have left the new link unfinished
                point(folder, link_name, step, storage)
    except OSError as error:
        raise refusal(error, where=folder, doing="pointing last and best at the steps of the resumed run") from error


def discard_after(folder: Path, *, step: int, run_id: str, storage: Storage = LOCAL) -> tuple[int, ...]:
    """Remove the checkpoints beyond the step that a run resumes from; `relink` comes first, or links would dangle.

    They are damaged ones that a resume fell back over, or the course that the run took before it was resumed from an
    older step; left there, the next resume would start from them. What a crash left unfinished is removed as well.

    Args:
        folder: the run's `checkpoints` directory.
        step: the step resumed from.
        run_id: checkpoints of another run stay; one that cannot say whose it is goes, since it is damaged.
        storage: where they lie.

    Returns:
        The steps removed.

    Raises:
        StorageError: the file system refused.
    """
    try:
        beyond = [(found, path) for found, path in list_steps(folder, storage) if found > step]
        doomed = [(found, path) for found, path in beyond if _run_id(path) in (run_id, None)]
        for _, path in reversed(doomed):
            remove_step(path, storage)
        sweep(folder, storage)  # what a crash left half-removed, where no save follows that would sweep it
    except OSError as error:
        raise refusal(error, where=folder, doing=f"removing checkpoints after step {step}") from error
    return tuple(found for found, _ in doomed)


def remove_step(path: Path, storage: Storage) -> None:
    """Take a step out of the listing at once, then remove it; `sweep` finishes what a crash interrupts."""
    doomed = path.with_name(f"{TEMPORARY_PREFIX}removed-{path.name}")
    storage.rename(path, doomed)
    storage.fsync_dir(path.parent)  # else a power loss could bring back the name without the files
    remove_tree(doomed, storage)


def _run_id(path: Path) -> str | None:
    """None for a checkpoint that cannot say whose it is: rotation leaves it alone."""
    if path.is_symlink():
        return None
    try:
        return read_manifest(path).run_id
    except (OSError, ValueError, StorageError):
        return None


def _best_name(path: Path) -> str | None:
    """The best step that a checkpoint's run knew of when it was made."""
    with suppress(OSError, ValueError):
        best_step = decode(read_capped(path / STATE_NAME)).get("best_step")
        if type(best_step) is int:
            return step_name(best_step)
    return None

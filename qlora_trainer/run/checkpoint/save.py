"""Commit one checkpoint: after any crash either it or the one before it loads.

The order is the proof. Everything is written and fsynced in a directory that no reader looks at; the rename makes it
visible whole; the fsync of the parent makes the rename last. Only after that is anything older touched.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_trainer.config.strict_json import encode
from qlora_trainer.errors import StorageError
from qlora_trainer.run.checkpoint.listing import point, step_name
from qlora_trainer.run.checkpoint.manifest import (
    ADAPTER_NAME,
    MANIFEST_NAME,
    OPTIMIZER_NAME,
    STATE_NAME,
    FileEntry,
    Manifest,
    package_versions,
    read_manifest,
    verify,
)
from qlora_trainer.run.checkpoint.rotate import remove_step, rotate
from qlora_trainer.run.checkpoint.storage import (
    LOCAL,
    TEMPORARY_PREFIX,
    Storage,
    check_free_space,
    refusal,
    remove_tree,
    sweep,
    write_new,
)
from qlora_trainer.run.checkpoint.tensors import lay_out, render, require_finite
from qlora_trainer.run.records import Saved


@dataclass(frozen=True, slots=True)
class _Content:
    """A file to be: its size is known before its bytes are made."""

    name: str
    num_bytes: int
    pieces: Iterable[memoryview]


@dataclass(frozen=True, slots=True)
class _Label:
    """What the manifest tells besides the files."""

    step: int
    run_id: str
    fingerprints: Mapping[str, str]


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    adapter: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    fingerprints: Mapping[str, str],
    keep_checkpoints: int = 3,
    is_best: bool = False,
    storage: Storage = LOCAL,
) -> Saved:
    """Write `folder/step-…`, commit it, let `last` (and `best`) point at it, then rotate older ones away.

    A step that is there already, verified and with the same tensors, is not written again.

    Args:
        folder: the run's `checkpoints` directory; it exists and the caller holds the run folder's lock.
        step: optimizer steps done.
        adapter: the adapter's weights by parameter name, on any device.
        optimizer: fp32 master and moments by parameter name, in their own dtypes.
        state: all else that a resume needs, as JSON values; must hold `run_id`, and `best_step` (an earlier one, this
            one or None), which rotation leaves as long as this checkpoint. `step` is added to it.
        fingerprints: hashes of what the run was made of, kept in the manifest.
        keep_checkpoints: how many of the newest stay (two at least); `best` and `last` stay besides.
        is_best: whether the evaluation at this step was the best so far.
        storage: where to write.

    Returns:
        The record of the committed checkpoint.

    Raises:
        StorageError: something is not finite, the disk is full, or refuses. The new step is not listed then, unless
            the message says that it is committed; checkpoints before it are untouched.
    """
    started_seconds = time.monotonic()
    target = folder / step_name(step)
    contents = _prepare(target, adapter=adapter, optimizer=optimizer, state={**state, "step": step})
    run_id = str(state["run_id"])
    try:
        sweep(folder, storage)
        check_free_space(folder, sum(content.num_bytes for content in contents), storage)
        label = _Label(step, run_id, fingerprints)
        num_bytes = _write_and_commit(target, contents, label, storage)
    except (OSError, StorageError) as error:
        with suppress(OSError):  # the first refusal is the one to tell; what stays is swept at the next save
            sweep(folder, storage)
        if isinstance(error, StorageError):
            raise
        raise _name_bytes(error, target, contents, storage) from error
    try:
        point(folder, "last", step, storage)
        if is_best:
            point(folder, "best", step, storage)
        rotate(folder, keep_checkpoints=keep_checkpoints, run_id=run_id, storage=storage)
    except OSError as error:
        doing = f"tidying up; {target.name} itself is committed"
        raise refusal(error, where=folder, doing=doing) from error
    return Saved(step=step, path=target, seconds=time.monotonic() - started_seconds, num_bytes=num_bytes)


def _prepare(
    target: Path, *, adapter: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], state: Mapping[str, Any]
) -> tuple[_Content, ...]:
    """Refuse what is not finite and measure each file; no tensor is copied yet."""
    contents = []
    for name, tensors in ((ADAPTER_NAME, adapter), (OPTIMIZER_NAME, optimizer)):
        require_finite(target / name, tensors)
        layout = lay_out(tensors)
        contents.append(_Content(name, layout.num_bytes, render(tensors, layout)))
    try:
        data = encode(state)
    except ValueError as error:  # NaN or an infinity
        raise StorageError(
            where=str(target / STATE_NAME),
            found=f"a number that is not finite ({error})",
            expected="finite numbers",
            fix="Not saved; the checkpoint before is intact.",
        ) from error
    contents.append(_Content(STATE_NAME, len(data), (memoryview(data),)))
    return tuple(contents)


def _write_and_commit(target: Path, contents: tuple[_Content, ...], label: _Label, storage: Storage) -> int:
    """Returns the bytes of the committed directory."""
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
    storage.make_dir(temporary)
    files = {content.name: _write(temporary / content.name, content.pieces, storage) for content in contents}
    manifest = Manifest(
        step=label.step,
        run_id=label.run_id,
        files=files,
        fingerprints=label.fingerprints,
        versions=package_versions(),
    ).to_bytes()
    _write(temporary / MANIFEST_NAME, (memoryview(manifest),), storage)
    storage.fsync_dir(temporary)
    if target.name in storage.list_dir(target.parent):
        if _is_same(target, files):
            remove_tree(temporary, storage)
            return sum(entry.num_bytes for entry in files.values()) + len(manifest)
        remove_step(target, storage)  # it does not verify, so nothing is lost
    storage.rename(temporary, target)
    try:
        storage.fsync_dir(target.parent)
    except OSError:
        storage.rename(target, temporary)  # not committed, so not listed either
        raise
    return sum(entry.num_bytes for entry in files.values()) + len(manifest)


def _write(path: Path, pieces: Iterable[memoryview], storage: Storage) -> FileEntry:
    digest = hashlib.sha256()
    num_bytes = 0

    def counted() -> Iterator[memoryview]:
        nonlocal num_bytes
        for piece in pieces:
            digest.update(piece)
            num_bytes += piece.nbytes
            yield piece

    write_new(path, counted(), storage)
    return FileEntry(num_bytes=num_bytes, sha256=digest.hexdigest())


def _is_same(existing: Path, files: Mapping[str, FileEntry]) -> bool:
    """Whether a step that is already there is this one; False where it does not verify and may be replaced."""
    if verify(existing):
        return False
    existing_files = read_manifest(existing).files
    if all(existing_files[name] == files[name] for name in (ADAPTER_NAME, OPTIMIZER_NAME)):
        return True
    raise StorageError(
        where=str(existing),
        found="a whole checkpoint of this step with other tensors",
        expected="none, or the same one",
        fix="It belongs to another course of this run: resume from it, or move it away.",
    )


def _name_bytes(error: OSError, target: Path, contents: tuple[_Content, ...], storage: Storage) -> StorageError:
    needed_bytes = sum(content.num_bytes for content in contents)
    free = "an unknown number of"
    with suppress(OSError):
        free = f"{storage.free_bytes(target.parent):,}"
    doing = f"saving {needed_bytes:,} bytes ({free} bytes are free); it is not committed, older checkpoints are intact"
    return refusal(error, where=target, doing=doing)

"""Folders that are whole or not there: written under another name, sealed with a manifest, renamed.

The manifest holds the size and SHA-256 of every file, so a folder that was damaged later is told from a whole one. A
scratch folder is neither sealed nor renamed: it goes when it has been used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MANIFEST = "manifest.json"
_READ_BYTES = 2**22
_ABANDONED_SECONDS = 24 * 3600  # a writer writes every few seconds


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits; reads 4 MiB at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `folder`; on leaving without an error it is sealed and becomes `folder`.

    If another process finished the same folder meanwhile, that one stays. After an error nothing is left behind.

    Raises:
        OSError: it cannot be made or sealed, or something else is in the place of `folder`.
    """
    with scratch(folder) as temporary:
        yield temporary
        _seal(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if defects(folder):
                raise
            return
        _fsync(folder.parent)


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `folder`, and removes it.

    What a killed process left is removed a day later, by the next one that asks for a folder of the same name.

    Raises:
        OSError: it cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder.parent, f".tmp-{folder.name}-*")
    temporary = Path(tempfile.mkdtemp(prefix=f".tmp-{folder.name}-", dir=folder.parent))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def defects(folder: Path) -> list[str]:
    """Why `folder` cannot be trusted, one reason a file; empty when every file is as it was sealed."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{folder / MANIFEST} is missing or broken ({type(error).__name__})"]
    reasons = []
    for name, (size, sha256) in expected.items():
        path = folder / name
        if not path.is_file():
            reasons.append(f"{path} is missing")
        elif path.stat().st_size != size:
            reasons.append(f"{path} has {path.stat().st_size} bytes, expected {size}")
        elif sha256_of(path) != sha256:
            reasons.append(f"{path} has changed: its SHA-256 is not the one that was written")
    return reasons


def remove_abandoned(parent: Path, pattern: str) -> None:
    """Removes the folders of that pattern in which nothing was written for a day: their writers were killed."""
    for temporary in parent.glob(pattern):
        with suppress(FileNotFoundError):  # another process has removed it
            # The files, too: a writer of much data opens them all at its start.
            written = max(path.stat().st_mtime for path in (temporary, *temporary.iterdir()))
            if time.time() - written > _ABANDONED_SECONDS:
                shutil.rmtree(temporary, ignore_errors=True)


def _seal(folder: Path) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        _fsync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1))
    _fsync(folder / MANIFEST)
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The list that proves a checkpoint whole: size and sha256 of every file, and what the run was made of.

safetensors has no checksum, so a flipped bit would load. The manifest is written last, and carries a sha256 of itself.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qlora_trainer.config.strict_json import decode, encode, read_capped
from qlora_trainer.errors import StorageError
from qlora_trainer.run.checkpoint.listing import step_name

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
ADAPTER_NAME = "adapter.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"
STATE_NAME = "state.json"
FILE_NAMES = (ADAPTER_NAME, OPTIMIZER_NAME, STATE_NAME)
_PACKAGES = ("torch", "bitsandbytes", "transformers", "safetensors", "numpy")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size and hash of one file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        step: optimizer steps done.
        run_id: the run that made it; rotation touches no other.
        files: by name; exactly `FILE_NAMES`.
        fingerprints: hashes of what the run was made of (base, tokenizer, data, config), compared at resume; of the
            config the state has the keys, which are compared one by one.
        versions: of the packages that a result depends on; a resume tells of others.
    """

    step: int
    run_id: str
    files: Mapping[str, FileEntry]
    fingerprints: Mapping[str, str]
    versions: Mapping[str, str]

    def to_bytes(self) -> bytes:
        """The manifest file."""
        body = {
            "schema_version": SCHEMA_VERSION,
            "step": self.step,
            "run_id": self.run_id,
            "files": {name: asdict(entry) for name, entry in self.files.items()},
            "fingerprints": dict(self.fingerprints),
            "versions": dict(self.versions),
        }
        return encode({**body, "sha256": _own_sha256(body)})


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide a run's numbers; a package that is not installed is left out."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of one checkpoint; its files are not looked at.

    Raises:
        StorageError: made by a newer version of this program, which must not be mistaken for damage.
        ValueError: damaged; begins with the file's name.
        OSError: it cannot be read.
    """
    try:
        data = read_capped(folder / MANIFEST_NAME)
        body = decode(data)
        schema_version = body.get("schema_version")
        if type(schema_version) is int and schema_version > SCHEMA_VERSION:
            raise StorageError(
                where=str(folder),
                found=f"a checkpoint made by a newer version of qlora-trainer (schema {schema_version})",
                expected=f"schema {SCHEMA_VERSION}",
                fix="Upgrade qlora-trainer, or resume from another folder.",
            )
        is_as_written = encode(body) == data  # white space included, which the hash does not see
        if body.pop("sha256", None) != _own_sha256(body) or not is_as_written or schema_version != SCHEMA_VERSION:
            raise ValueError("does not match its own sha256")
        return _parse(body)
    except ValueError as error:
        raise ValueError(f"{MANIFEST_NAME}: {error}") from error


def verify(folder: Path) -> list[str]:
    """Say what is wrong with a checkpoint on disk.

    Args:
        folder: one `step-…` directory.

    Returns:
        One reason a fault, each beginning with the file's name; empty for a checkpoint that is whole.

    Raises:
        StorageError: made by a newer version of this program.
    """
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            return [f"{folder.name}: not a directory (links are not followed)"]
        if (folder / MANIFEST_NAME).is_symlink():
            return [f"{MANIFEST_NAME}: not a plain file"]
        manifest = read_manifest(folder)
        found_names = {path.name for path in folder.iterdir()}
    except FileNotFoundError as error:
        return [f"{Path(error.filename).name}: missing"]
    except OSError as error:
        return [f"{MANIFEST_NAME}: cannot be read ({error.strerror})"]
    except ValueError as error:
        return [str(error)]
    reasons = []
    if step_name(manifest.step) != folder.name:
        reasons.append(f"{MANIFEST_NAME}: made for {step_name(manifest.step)}, lies in {folder.name}")
    reasons += [f"{name}: not in the manifest" for name in sorted(found_names - {*FILE_NAMES, MANIFEST_NAME})]
    for name in FILE_NAMES:
        reason = _check_file(folder / name, manifest.files[name])
        if reason:
            reasons.append(f"{name}: {reason}")
    return reasons


def _check_file(path: Path, entry: FileEntry) -> str | None:
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            return "not a plain file"
        if status.st_size != entry.num_bytes:
            return f"{status.st_size:,} bytes, the manifest says {entry.num_bytes:,}"
        with path.open("rb") as file:
            found_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if found_sha256 != entry.sha256:
        return f"its sha256 is {found_sha256[:12]}…, the manifest says {entry.sha256[:12]}…"
    return None


def _own_sha256(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(encode(body)).hexdigest()


def _parse(body: Mapping[str, Any]) -> Manifest:
    """Take a manifest apart; its own hash was right, so a wrong shape is another program's file."""
    try:
        files = {name: FileEntry(**entry) for name, entry in body["files"].items()}
        manifest = Manifest(
            step=body["step"],
            run_id=body["run_id"],
            files=files,
            fingerprints=body["fingerprints"],
            versions=body["versions"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a manifest of this program ({error})") from error
    if type(manifest.step) is not int or set(files) != set(FILE_NAMES):
        raise ValueError("not a manifest of this program (its step or its list of files)")
    return manifest

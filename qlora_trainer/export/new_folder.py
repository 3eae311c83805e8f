"""A folder that is whole or not there: written beside its place, read back and compared by the caller, then renamed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora_trainer.errors import StorageError
from qlora_trainer.model.safetensors_header import require_sane_header
from qlora_trainer.run.checkpoint.storage import TEMPORARY_PREFIX, Storage, refusal, remove_tree, write_new
from qlora_trainer.run.checkpoint.tensors import lay_out, render


@contextmanager
def new_folder(target: Path, storage: Storage, *, key: str, doing: str) -> Iterator[Path]:
    """Gives a folder beside `target`, which becomes `target` on leaving without an error.

    After anything else, an interrupt included, nothing is left. What a killed process left is removed at the next try.

    Args:
        target: not there, or an empty folder; the folder above it exists.
        storage: where it is written.
        key: the option that names it, for errors.
        doing: the work, as in "exporting the adapter".

    Raises:
        StorageError: the disk refused.
    """
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
    try:
        if temporary.exists():
            remove_tree(temporary, storage)
        storage.make_dir(temporary)
        yield temporary
        storage.fsync_dir(temporary)
        storage.rename(temporary, target)  # over an empty folder, too
        storage.fsync_dir(target.parent)
    except BaseException as error:
        with suppress(OSError):  # the first refusal is the one to tell
            remove_tree(temporary, storage)
        if isinstance(error, OSError):
            raise refusal(error, where=target, doing=doing, place=key) from error
        raise


def write_checked(path: Path, data: bytes, storage: Storage) -> None:
    """Write a file, and see that it holds what it should.

    Raises:
        StorageError: it does not.
        OSError: the disk refused.
    """
    write_new(path, [memoryview(data)], storage)
    if path.read_bytes() != data:
        raise differs(path, "other bytes than were written")


def write_tensors_checked(
    path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, Tensor], storage: Storage
) -> None:
    """Write a safetensors file, and see that the library reads from it what was written, tensor by tensor.

    Args:
        path: the file.
        tensors: each of `shapes` is asked for once, one after the other, so that they may be computed then.
        shapes: what to write, as tensors of the same dtypes and shapes, on meta maybe.
        storage: where to write.

    Raises:
        StorageError: what is read back is something else.
        OSError: the disk refused.
    """
    told = _Told(tensors)
    write_new(path, render(told, lay_out(shapes)), storage)
    try:
        require_sane_header(path)
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
        wrong = sorted(names ^ told.digests.keys())
        for name in () if wrong else sorted(names):
            with safe_open(path, framework="pt") as file:  # anew each time: mapped pages are let go
                if digest_of(file.get_tensor(name)) != told.digests[name]:
                    wrong.append(name)
    except (SafetensorError, ValueError) as error:
        raise differs(path, f"no safetensors file ({error})") from error
    if wrong:
        raise differs(path, f"{len(wrong)} tensors that are not as they were written, the first is {wrong[0]}")


def digest_of(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Told(Mapping[str, Tensor]):
    """Tensors, with a digest of each that was asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.digests: dict[str, str] = {}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        self.digests[name] = digest_of(tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def differs(path: Path, found: str) -> StorageError:
    """What was written is not what is read back."""
    return StorageError(
        where=str(path),
        found=f"{found}, reading it back",
        expected="what was written",
        fix="Nothing was left; look at the disk, then try again.",
    )

"""Memory that the system may take back: on a CPU for real, on CUDA up to bitsandbytes' door."""

from __future__ import annotations

import ctypes
import inspect
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qlora_trainer.config import paths
from qlora_trainer.config.paths import file_system_kind, require_on_disk
from qlora_trainer.errors import StorageError
from qlora_trainer.hardware.paging import is_paged, zeros_paged
from qlora_trainer.hardware.quant_library import functional
from tests.hardware.kernel_memory import page_out, resident_bytes, share_in_memory

CPU = torch.device("cpu")
SHARED_MEMORY = Path("/dev/shm")


def make_zeros(folder: Path, num_elements: int = 2**20, dtype: torch.dtype = torch.float32) -> Tensor:
    return zeros_paged(num_elements, dtype=dtype, device=CPU, folder=folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("num_elements", [1, 4096, 100_003])
def test_it_is_an_ordinary_tensor_of_zeros(disk_folder: Path, num_elements: int, dtype: torch.dtype) -> None:
    paged = make_zeros(disk_folder, num_elements, dtype)

    assert (paged.dtype, paged.shape, paged.device) == (dtype, (num_elements,), CPU)
    assert not paged.any()
    paged.fill_(7)
    assert bool((paged == 7).all())


def test_nothing_is_left_on_disk(disk_folder: Path) -> None:
    paged = make_zeros(disk_folder)

    assert list(disk_folder.iterdir()) == []
    assert f"{disk_folder}/" in Path("/proc/self/maps").read_text()  # a file without a name

    del paged
    assert f"{disk_folder}/" not in Path("/proc/self/maps").read_text()


def test_its_blocks_are_claimed_at_once(disk_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claimed = []
    claim = os.posix_fallocate

    def claim_and_look(descriptor: int, first: int, num_bytes: int) -> None:
        claim(descriptor, first, num_bytes)
        claimed.append(os.fstat(descriptor).st_blocks * 512)  # stat(2) counts in 512 bytes

    monkeypatch.setattr(os, "posix_fallocate", claim_and_look)
    paged = make_zeros(disk_folder)

    assert claimed[0] >= paged.nbytes


def test_its_pages_leave_memory_and_come_back_unchanged(disk_folder: Path) -> None:
    paged = make_zeros(disk_folder)
    paged.copy_(torch.arange(paged.numel()))
    expected = paged.clone()
    assert share_in_memory(paged) == 1.0
    assert resident_bytes(paged) == paged.nbytes

    page_out(paged)

    assert share_in_memory(paged) == 0.0
    assert resident_bytes(paged) == 0
    assert torch.equal(paged, expected)


@pytest.mark.skipif(
    not (SHARED_MEMORY.is_dir() and file_system_kind(SHARED_MEMORY) == "tmpfs"), reason="no tmpfs at /dev/shm"
)
def test_a_folder_in_memory_is_refused() -> None:
    before = set(SHARED_MEMORY.iterdir())

    with pytest.raises(StorageError, match=r"/dev/shm: found a tmpfs.*paging_dir") as caught:
        make_zeros(SHARED_MEMORY)

    assert caught.value.exit_code == 5
    assert set(SHARED_MEMORY.iterdir()) == before


@pytest.mark.parametrize("kind", ["tmpfs", "ramfs", "devtmpfs"])
def test_every_file_system_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(paths, "file_system_kind", lambda _folder: kind)

    with pytest.raises(StorageError, match=f"found a {kind}"):
        require_on_disk(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    for name in ("missing", "file"):
        with pytest.raises(StorageError, match=f"{name}: found no such folder"):
            make_zeros(tmp_path / name)


def test_more_than_the_disk_has_is_refused_before_any_of_it_is_taken(
    disk_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: Any) -> None:
        raise AssertionError("the disk is being filled")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    num_elements = shutil.disk_usage(disk_folder).total

    with pytest.raises(StorageError, match=r"no room for \d+ MiB .*No space left on device"):
        make_zeros(disk_folder, num_elements)

    assert list(disk_folder.iterdir()) == []


@pytest.fixture
def file_size_limit() -> Iterator[int]:
    """Files of this process can grow to 1 MiB only (Python ignores SIGXFSZ, so the call fails instead)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    yield 2**20
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_claim_that_the_file_system_refuses_leaves_nothing(disk_folder: Path, file_size_limit: int) -> None:
    with pytest.raises(StorageError, match="no room for 4 MiB"):
        make_zeros(disk_folder, file_size_limit)

    assert list(disk_folder.iterdir()) == []


def test_file_systems_are_told_apart() -> None:
    assert file_system_kind(Path("/proc")) == "proc"
    assert file_system_kind(Path(__file__).parent) not in {"proc", "unknown"}


class FakeManagedMemory:
    """bitsandbytes' two calls; keeps what they were called with."""

    def __init__(self) -> None:
        self.allocated: list[dict[str, Any]] = []
        self.filled: list[tuple[Tensor, int]] = []
        self.array: np.ndarray[Any, Any] | None = None

    def get_paged(self, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        self.allocated.append({"shape": shape, "dtype": dtype, "device": device})
        paged = torch.full(shape, 3, dtype=dtype)  # not zero: somebody has to fill it
        paged.is_paged = True  # type: ignore[attr-defined]
        return paged

    def fill(self, tensor: Tensor, value: int) -> None:
        self.filled.append((tensor, value))
        tensor.fill_(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_on_cuda_it_is_bitsandbytes_managed_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    fake = FakeManagedMemory()
    for name in ("get_paged", "fill"):
        monkeypatch.setattr(functional, name, getattr(fake, name))
    seen_by_torch = []

    def as_tensor(data: Any, *, device: torch.device) -> Tensor:
        seen_by_torch.append((data.__cuda_array_interface__, device))
        return data.paged  # type: ignore[no-any-return]

    monkeypatch.setattr(torch, "as_tensor", as_tensor)

    paged = zeros_paged(1000, dtype=dtype, device=torch.device("cuda", 0), folder=tmp_path)

    assert fake.allocated == [{"shape": (1000,), "dtype": dtype, "device": torch.device("cuda", 0)}]
    assert [(tensor is paged, value) for tensor, value in fake.filled] == [(True, 0)]
    assert not paged.any()
    ((interface, device),) = seen_by_torch
    assert device == torch.device("cuda", 0)
    address, is_read_only = interface["data"]
    assert (interface["shape"], interface["version"], is_read_only) == ((1000,), 3, False)
    assert np.dtype(interface["typestr"]).itemsize == dtype.itemsize
    paged[0] = 5
    assert ctypes.string_at(address, dtype.itemsize) == paged[:1].numpy().tobytes()  # the same memory, not a copy
    assert list(tmp_path.iterdir()) == []


def test_bitsandbytes_takes_the_arguments_that_it_is_given() -> None:
    get_paged = inspect.signature(functional.get_paged)
    bound = get_paged.bind(1000, dtype=torch.uint8, device=torch.device("cuda", 0))
    assert bound.arguments == {"shape": (1000,), "dtype": torch.uint8, "device": torch.device("cuda", 0)}

    filled = inspect.signature(functional.fill).bind("tensor", 0)
    assert filled.arguments == {"A": "tensor", "value": 0}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_on_a_gpu_torch_computes_in_managed_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    paged = zeros_paged(2**20, dtype=dtype, device=torch.device("cuda", 0), folder=tmp_path)

    assert (paged.device, paged.dtype) == (torch.device("cuda", 0), dtype)
    assert not paged.any()
    paged[5:10].add_(2)
    assert int(paged.sum()) == 10
    assert torch.cuda.memory_allocated() < paged.nbytes  # torch's own allocator had no part in it


def test_the_kernel_is_asked_what_is_paged(disk_folder: Path) -> None:
    paged = zeros_paged(4096, dtype=torch.float32, device=CPU, folder=disk_folder)

    assert is_paged(paged)
    assert is_paged(paged[100:])
    assert not is_paged(torch.zeros(4096))
    assert not is_paged(paged.clone())
    (disk_folder / "file").write_bytes(bytes(4096 * 4))
    private = torch.from_file(str(disk_folder / "file"), shared=False, size=4096)
    assert not is_paged(private)  # its pages are the process's own once they were written


@pytest.mark.parametrize("status, managed, expected", [(0, 1, True), (0, 0, False), (201, 0, None)])
def test_the_driver_is_asked_what_is_managed(
    status: int, managed: int, expected: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attribute(value: Any, number: int, address: Any) -> int:
        assert (number, address.value) == (8, 4096)
        value._obj.value = managed
        return status

    monkeypatch.setattr(ctypes, "CDLL", lambda _name: SimpleNamespace(cuPointerGetAttribute=attribute))
    tensor: Any = SimpleNamespace(device=torch.device("cuda", 0), data_ptr=lambda: 4096)
    if expected is None:
        with pytest.raises(RuntimeError, match="error 201"):
            is_paged(tensor)
    else:
        assert is_paged(tensor) is expected

"""What is put comes back, the same bits; a file that cannot be written is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora_trainer.errors import StorageError
from qlora_trainer.hardware.input_store import FileInputs, HostInputs, InputStore
from qlora_trainer.hardware.side_stream import SideStream
from tests.hardware.late_stream import LateStream

CPU = torch.device("cpu")
_LARGE = """
import sys
from pathlib import Path
import torch
from qlora_trainer.hardware.input_store import FileInputs
from qlora_trainer.hardware.memory import resident_bytes

store, before = FileInputs(Path(sys.argv[1])), resident_bytes()
for number in range(8):
    store.put(number, torch.full((2**24,), float(number)))  # 64 MiB each
grown = resident_bytes() - before
assert float(store.take(5)[-1]) == 5.0
print(grown)
"""


def inputs(num_tokens: int, dtype: torch.dtype, count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    return [torch.randn(1, num_tokens, 33, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["file", "host", "late"])
def test_what_is_put_comes_back(kind: str, dtype: torch.dtype, disk_folder: Path) -> None:
    """Some are written when they were sent, others dropped before.

    Mutations tried, seen by "late" alone: no `join` in `sent`, none in `take`, no reference to what leaves.
    """
    store: InputStore = FileInputs(disk_folder)
    if kind != "file":
        store = HostInputs(SideStream(CPU) if kind == "host" else LateStream(CPU))
    for num_tokens in (40, 7, 64):  # micro-batches differ in size
        put = inputs(num_tokens, dtype)
        for number, tensor in enumerate(put):
            store.put(number, own := tensor.clone())
            if number % 2:
                del own
                store.sent()
            else:
                store.sent()
                own.zero_()
        for number in reversed(range(len(put))):
            taken = store.take(number)
            assert torch.equal(taken, put[number])
            assert (taken.dtype, taken.shape) == (dtype, put[number].shape)
            assert taken.data_ptr() != put[number].data_ptr()


def test_what_is_not_contiguous_comes_back(disk_folder: Path) -> None:
    store, tensor = FileInputs(disk_folder), torch.randn(3, 50, 8).transpose(0, 1)
    store.put(0, tensor)
    assert torch.equal(store.take(0), tensor)


def test_after_a_backward_that_failed_new_inputs_come_back() -> None:
    store = HostInputs(SideStream(CPU))
    for number, tensor in enumerate(inputs(40, torch.float32)):
        store.put(number, tensor)
    store.take(3)  # and then memory runs out
    put = inputs(20, torch.float32)
    for number, tensor in enumerate(put):
        store.put(number, tensor)
    for number in reversed(range(len(put))):
        assert torch.equal(store.take(number), put[number])


def test_a_large_input_takes_no_memory_while_it_waits(disk_folder: Path) -> None:
    """In a process of its own: what glibc keeps of freed memory depends on all that a process did before."""
    grown_bytes = int(subprocess.check_output([sys.executable, "-c", _LARGE, str(disk_folder)], text=True))
    assert grown_bytes < 2**26


def test_no_file_is_left_and_no_file_has_a_name(disk_folder: Path) -> None:
    store = FileInputs(disk_folder)
    store.put(0, torch.zeros(10))
    assert list(disk_folder.iterdir()) == []


def test_memory_is_no_disk() -> None:
    with pytest.raises(StorageError, match=r"/dev/shm: found a tmpfs"):
        FileInputs(Path("/dev/shm")).put(0, torch.zeros(10))


def test_a_full_disk_is_told(disk_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match=r"no room for 4 MiB of a layer's input .*activation_offload") as caught:
        FileInputs(disk_folder).put(0, torch.zeros(2**20))
    assert str(disk_folder) in str(caught.value)

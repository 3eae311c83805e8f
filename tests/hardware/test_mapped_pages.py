"""Pages of a mapped file leave this process's memory and come back; other memory is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qlora_trainer.hardware.mapped_pages import file_spans, give_back, read_ahead
from qlora_trainer.hardware.memory import resident_bytes

MIB = 2**20


@pytest.fixture
def tensors(disk_folder: Path) -> dict[str, torch.Tensor]:
    """Mapped: two neighbours of 8 MiB, and one behind 16 MiB of something else."""
    path = disk_folder / "weights.safetensors"
    parts = {"a": 8, "b": 8, "between": 16, "z": 8}
    save_file({name: torch.full((size * MIB,), number + 1, dtype=torch.uint8)
               for number, (name, size) in enumerate(parts.items())}, path)  # fmt: skip
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in ("a", "b", "z")}


def test_pages_are_given_back_and_read_again(tensors: dict[str, torch.Tensor]) -> None:
    spans = file_spans(list(tensors.values()))
    # Bytes are added up as int64: copies of 64 MiB, which this process's heap may keep.
    tensors = {name: tensor.view(torch.int64) for name, tensor in tensors.items()}
    before = resident_bytes()
    sums = {name: int(tensor.sum()) for name, tensor in tensors.items()}
    assert resident_bytes() - before > 20 * MIB
    give_back(spans)
    assert resident_bytes() - before < 4 * MIB
    read_ahead(spans)
    assert resident_bytes() - before < 4 * MIB
    assert {name: int(tensor.sum()) for name, tensor in tensors.items()} == sums


def test_neighbours_are_one_span(tensors: dict[str, torch.Tensor]) -> None:
    spans = file_spans(list(tensors.values()))
    assert len(spans) == 2
    assert all(span.first % 4096 == span.last % 4096 == 0 for span in spans)
    assert 24 * MIB <= sum(span.num_bytes for span in spans) <= 24 * MIB + 4 * 4096


def test_memory_of_no_file_is_refused(tensors: dict[str, torch.Tensor]) -> None:
    anonymous = torch.ones(8 * MIB, dtype=torch.uint8)
    with pytest.raises(ValueError, match="no part of a mapped file"):
        file_spans([tensors["a"], anonymous])
    assert bool((anonymous == 1).all())


def test_a_shared_mapping_is_refused(disk_folder: Path) -> None:
    """It may be written: what is then given back, is not lost, but it is no frozen weight."""
    (disk_folder / "shared").write_bytes(bytes(MIB))
    shared = torch.from_file(str(disk_folder / "shared"), shared=True, size=MIB, dtype=torch.uint8)
    with pytest.raises(ValueError, match="no part of a mapped file"):
        file_spans([shared])

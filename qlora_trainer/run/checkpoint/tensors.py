"""Tensors to and from a safetensors file, without ever holding a second copy of them.

`safetensors.torch.save` renders a whole file in memory, and `save_file` writes past the storage seam with mode 0600.
The format is a length, a JSON header and raw bytes, so it is written here, tensor by tensor. It is read by the library
once the header is known to be sane (the library reads whatever length the first eight bytes claim).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qlora_trainer.errors import StorageError
from qlora_trainer.model.safetensors_header import require_sane_header
from qlora_trainer.step.state import first_non_finite

_PIECE_ELEMENTS = 2**22  # what is written at once

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each tensor will lie in the file.

    Attributes:
        header: the length and the JSON, padded so that the first tensor is aligned.
        names: the tensors in the order of the file.
        num_bytes: size of the whole file.
    """

    header: bytes
    names: tuple[str, ...]
    num_bytes: int


def lay_out(tensors: Mapping[str, Tensor]) -> Layout:
    """Place tensors one after the other, widest elements first so that all are aligned, then by name.

    Raises:
        ValueError: a dtype that safetensors does not have, or a reserved name.
    """
    if "__metadata__" in tensors:
        raise ValueError("a tensor cannot be named __metadata__")
    names = tuple(sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPE_NAMES:
            raise ValueError(f"{name}: a safetensors file has no {tensor.dtype}")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        entries[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return Layout(header=header, names=names, num_bytes=len(header) + end)


def render(tensors: Mapping[str, Tensor], layout: Layout) -> Iterator[memoryview]:
    """Yield the bytes of the file in order; a tensor on a GPU is copied to the host alone, then let go."""
    yield memoryview(layout.header)
    for name in layout.names:
        flat = tensors[name].detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        for start in range(0, flat.numel(), _PIECE_ELEMENTS):
            yield flat[start : start + _PIECE_ELEMENTS].numpy().data


def require_finite(where: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinities.

    Args:
        where: the file that the tensors are for; named in the error.
        tensors: what to look at; integers pass.

    Raises:
        StorageError: names the first tensor that is not finite.
    """
    name = first_non_finite(tensors)
    if name is not None:
        raise StorageError(
            where=str(where),
            found=f"NaN or an infinity in {name}",
            expected="finite numbers",
            fix="Not saved; the checkpoint before is intact. Resume from it with a lower learning rate.",
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a whole file; the tensors are on the CPU and map the file.

    Raises:
        ValueError: not a safetensors file.
        OSError: it cannot be read.
    """
    require_sane_header(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"not a safetensors file: {error}") from error

"""NF4 weights: how they are made, kept, unpacked and named on disk.

NF4 stores each weight in 4 bits and one scale for 64 weights (Dettmers et al., QLoRA, 2023). Double quantization stores
those scales in 8 bits with one fp32 scale for 256 of them: 0.5159 byte a weight instead of 0.5625.
The names on disk are bitsandbytes' own, which transformers reads.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_trainer.hardware.quant_library import dynamic_map, functional

BLOCKSIZE = 64
NESTED_BLOCKSIZE = 256
# bitsandbytes' CPU quantizer makes five temporaries of the weight's element count, 17 bytes an element in all.
QUANTIZE_ELEMENTS = 2**22
_STATE_SUFFIX = "quant_state.bitsandbytes__nf4"


@dataclass(frozen=True, slots=True)
class NF4Weight:
    """A packed weight of N elements.

    Attributes:
        packed: uint8 [ceil(N / 2), 1], two weights a byte.
        absmax: one scale a block; uint8 [ceil(N / 64)] if nested, else float32.
        nested_absmax: float32 [ceil(N / 64 / 256)], or None when the scales are not nested.
        offset: float32 scalar that was taken off the scales before they were nested, or None.
        code: float32 [256], the levels that nested scales are stored in, one tensor for all weights; else None.
        shape: (out_features, in_features).
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    code: Tensor | None
    shape: tuple[int, int]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.packed, self.absmax, self.nested_absmax) if tensor is not None)

    @property
    def scales(self) -> BlockScales:
        return BlockScales(self.absmax, self.nested_absmax, self.offset, self.code)


@dataclass(frozen=True, slots=True)
class BlockScales:
    """Of a packed weight all but the packed bytes; see `NF4Weight`."""

    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    code: Tensor | None

    def to(self, device: torch.device) -> BlockScales:
        """The same there."""
        others = (self.nested_absmax, self.offset, self.code)
        return BlockScales(self.absmax.to(device), *(None if one is None else one.to(device) for one in others))


@functools.cache
def nf4_code(device: torch.device) -> Tensor:
    """The 16 NF4 levels, float32 [16]."""
    code: Tensor = functional.get_4bit_type("nf4", device=device)
    return code


@functools.cache
def nested_code(device: torch.device) -> Tensor:
    """The 256 levels of bitsandbytes' signed dynamic 8-bit map, float32 [256], that the scales are stored in."""
    return dynamic_map(signed=True, device=device)


def quantize(weight_OI: Tensor, *, double_quant: bool) -> NF4Weight:
    """Pack a 2-D float weight, bit-equal to bitsandbytes' `quantize_4bit` on the whole tensor.

    Blocks are independent, so the weight goes through the library in pieces, which bounds its temporaries.
    """
    flat = weight_OI.reshape(-1)
    pieces = [
        torch.ops.bitsandbytes.quantize_4bit.default(piece, BLOCKSIZE, "nf4", torch.uint8)
        for piece in flat.split(QUANTIZE_ELEMENTS)
    ]
    packed, absmax = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    shape = (weight_OI.shape[0], weight_OI.shape[1])
    if not double_quant:
        return NF4Weight(packed, absmax, None, None, None, shape)
    offset = absmax.mean()
    code = nested_code(absmax.device)
    nested, nested_absmax = torch.ops.bitsandbytes.quantize_blockwise.default(absmax - offset, code, NESTED_BLOCKSIZE)
    return NF4Weight(packed, nested, nested_absmax, offset, code, shape)


def dequantize(weight: NF4Weight, dtype: torch.dtype, row_scale_O: Tensor | None = None) -> Tensor:
    """The weight as a new dense tensor [out_features, in_features] of `dtype`.

    Args:
        weight: packed.
        dtype: of the result.
        row_scale_O: fp32, a factor on each row. It goes into the blocks' scales, before anything is rounded to `dtype`,
            where blocks end with the rows; in fp32 over the weight elsewhere.
    """
    if row_scale_O is not None and weight.shape[1] % BLOCKSIZE:
        return _dequantize(weight, torch.float32).mul_(row_scale_O.unsqueeze(1)).to(dtype)
    return _dequantize(weight, dtype, row_scale_O)


def dequantize_rows(weight: NF4Weight, rows: slice) -> Tensor:
    """Some rows of a weight, dense, fp32.

    Args:
        weight: packed.
        rows: beginning at a multiple of `rows_at_once`.
    """
    num_columns = weight.shape[1]
    num_rows = min(rows.stop, weight.shape[0]) - rows.start
    first, last = rows.start * num_columns, (rows.start + num_rows) * num_columns
    packed = weight.packed[first // 2 : math.ceil(last / 2)]
    return dequantize_part(packed, weight.scales, rows.start, (num_rows, num_columns), torch.float32)


def dequantize_part(
    packed: Tensor, scales: BlockScales, first_row: int, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Rows of a weight whose packed bytes are apart from the others', dense.

    Args:
        packed: uint8, of these rows only.
        scales: of the whole weight.
        first_row: which of the weight's rows is the first of them: a multiple of `rows_at_once`.
        shape: of the result.
        dtype: of the result.
    """
    first = first_row * shape[1]
    blocks = slice(first // BLOCKSIZE, math.ceil((first + math.prod(shape)) / BLOCKSIZE))
    nested = scales.nested_absmax
    if nested is not None:
        nested = nested[blocks.start // NESTED_BLOCKSIZE : math.ceil(blocks.stop / NESTED_BLOCKSIZE)]
    return _dequantize(NF4Weight(packed, scales.absmax[blocks], nested, scales.offset, scales.code, shape), dtype)


def rows_at_once(shape: tuple[int, int], num_elements: int) -> int:
    """About `num_elements` of a weight in whole rows, such that no block is cut; at least as many as a cut allows."""
    _, num_columns = shape
    step = math.lcm(num_columns, BLOCKSIZE * NESTED_BLOCKSIZE)
    return step * max(1, num_elements // step) // num_columns


def _dequantize(weight: NF4Weight, dtype: torch.dtype, row_scale_O: Tensor | None = None) -> Tensor:
    absmax = weight.absmax
    if weight.nested_absmax is not None and weight.offset is not None and weight.code is not None:
        absmax = torch.ops.bitsandbytes.dequantize_blockwise.default(
            absmax, weight.nested_absmax, weight.code, NESTED_BLOCKSIZE, torch.float32
        )
        absmax = absmax.add_(weight.offset)
    if row_scale_O is not None:
        absmax = (absmax.view(weight.shape[0], -1) * row_scale_O.unsqueeze(1)).view(-1)
    num_rows, num_columns = weight.shape
    # As one row where blocks do not end with rows: bitsandbytes' CPU kernel (0.50.2) takes other blocks' scales there.
    shape = weight.shape if num_columns % BLOCKSIZE == 0 else (1, num_rows * num_columns)
    dense: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        weight.packed, absmax, BLOCKSIZE, "nf4", shape, dtype
    )
    return dense.view(weight.shape)


def empty(shape: tuple[int, int], *, code: Tensor | None, device: torch.device) -> NF4Weight:
    """A weight with storage but no values, for a dry run; nested where a `code` is given."""
    num_blocks = math.ceil(shape[0] * shape[1] / BLOCKSIZE)
    packed = torch.empty((math.ceil(shape[0] * shape[1] / 2), 1), dtype=torch.uint8, device=device)
    if code is None:
        return NF4Weight(packed, torch.empty(num_blocks, device=device), None, None, None, shape)
    nested_absmax = torch.empty(math.ceil(num_blocks / NESTED_BLOCKSIZE), device=device)
    absmax = torch.empty(num_blocks, dtype=torch.uint8, device=device)
    return NF4Weight(packed, absmax, nested_absmax, torch.empty((), device=device), code, shape)


def to_checkpoint(name: str, weight: NF4Weight, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a standard bitsandbytes 4-bit checkpoint for the weight called `name`.

    `dtype` is what a reader of the checkpoint dequantizes to by default (`bfloat16` for all we write).
    """
    state: dict[str, object] = {"quant_type": "nf4", "blocksize": BLOCKSIZE}
    state |= {"dtype": str(dtype).removeprefix("torch."), "shape": list(weight.shape)}
    tensors = {
        name: weight.packed,
        f"{name}.absmax": weight.absmax,
        f"{name}.quant_map": nf4_code(weight.packed.device),
    }
    if weight.nested_absmax is not None and weight.offset is not None:
        tensors[f"{name}.nested_absmax"] = weight.nested_absmax
        tensors[f"{name}.nested_quant_map"] = nested_code(weight.packed.device)
        state |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32"}
        state["nested_offset"] = float(weight.offset)
    encoded = json.dumps(state).encode()
    tensors[f"{name}.{_STATE_SUFFIX}"] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    return tensors


def checkpoint_names(name: str, *, double_quant: bool) -> list[str]:
    """The names that `to_checkpoint` writes for the weight called `name`."""
    names = [name, f"{name}.absmax", f"{name}.quant_map", f"{name}.{_STATE_SUFFIX}"]
    return [*names, f"{name}.nested_absmax", f"{name}.nested_quant_map"] if double_quant else names


def from_checkpoint(name: str, tensors: Mapping[str, Tensor]) -> NF4Weight:
    """The weight that `to_checkpoint(name, ...)` wrote; packed bytes are not copied."""
    state = json.loads(bytes(tensors[f"{name}.{_STATE_SUFFIX}"].tolist()))
    packed, absmax = tensors[name], tensors[f"{name}.absmax"]
    shape = (state["shape"][0], state["shape"][1])
    if "nested_offset" not in state:
        return NF4Weight(packed, absmax, None, None, None, shape)
    offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=packed.device)
    return NF4Weight(packed, absmax, tensors[f"{name}.nested_absmax"], offset, nested_code(packed.device), shape)

"""Random numbers as functions of what they are for, not of what was drawn before.

A draw keyed by (seed, step, document, position, layer, column) is the same however a global batch is cut into
micro-batches, whether a layer is recomputed, and after a resume; no generator state exists that could be lost.

`mix32` is C. Wellons' `lowbias32` integer hash (https://nullprogram.com/blog/2018/07/31/, bias 0.17): cheap, and of
far better quality than dropout needs. Keys are 32-bit values in int64 tensors: torch's unsigned types lack shifts.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_MASK_32 = 0xFFFFFFFF


def key32(*parts: int | str) -> int:
    """A 32-bit key for `parts`, the same in every process and version (BLAKE2b)."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


def mix32(keys: Tensor) -> Tensor:
    """Hash each 32-bit key (int64 tensor, values in [0, 2^32)) to a 32-bit value, in a new tensor."""
    keys = (keys ^ (keys >> 16)).mul_(0x7FEB352D).bitwise_and_(_MASK_32)
    keys = (keys ^ (keys >> 15)).mul_(0x846CA68B).bitwise_and_(_MASK_32)
    return keys ^ (keys >> 16)


def token_keys(document_keys: list[int], document_lengths: list[int]) -> Tensor:
    """One key a token, int64 [sum of lengths], from its document's key and its position in the document."""
    keys = [
        mix32(mix32(torch.arange(length, dtype=torch.int64)) ^ key)
        for key, length in zip(document_keys, document_lengths, strict=True)
    ]
    return torch.cat(keys)


def dropout_factors(
    row_keys_T: Tensor,
    layer_key: int,
    num_columns: int,
    probability: float,
    dtype: torch.dtype,
    *,
    columns: slice | None = None,
) -> Tensor:
    """Inverted-dropout factors [T, num_columns]: 0 with `probability`, else 1 / (1 - probability).

    Where `columns` are given, only those of them.
    """
    start, stop = (0, num_columns) if columns is None else (columns.start, columns.stop)
    columns_C = mix32(torch.arange(start, stop, dtype=torch.int64, device=row_keys_T.device) ^ layer_key)
    draws_TC = mix32(row_keys_T.unsqueeze(1) ^ columns_C)
    kept_TC = draws_TC >= int(probability * 2**32)
    return kept_TC.to(dtype).mul_(1.0 / (1.0 - probability))

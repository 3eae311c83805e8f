"""DoRA (Liu et al., 2024): each output row of W + s B A is brought to a trained length, its magnitude.

The row norms change with A and B only, so they are computed once for all micro-batches of a step, of an evaluation, of
an answer: W is unpacked a few rows at a time and never whole. They count as constants for the gradient (the paper's
section 4.3, and PEFT).

Legend: I in_features, O out_features, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_trainer.model import nf4
from qlora_trainer.model.linear import NF4Linear
from qlora_trainer.model.nf4 import NF4Weight
from qlora_trainer.model.quantized import QuantizedModel

# Of a weight, unpacked at once: 8 MiB in fp32, and at most a quarter of it, less than a product unpacks in 16 bits.
CHUNK_ELEMENTS, MAX_CHUNKS = 2**21, 4


@torch.no_grad()
def refresh_norms(model: QuantizedModel) -> None:
    """Compute the row norms of every linear with a DoRA adapter anew, in place; nothing for the others.

    To be called where weights may have changed since: at the start of a step, of an evaluation, of an answer.
    """
    for linear in model.linears.values():
        adapter = linear.adapter
        if adapter is not None and adapter.norm_O is not None:
            set_row_norms_(adapter.norm_O, linear, adapter.lora_A, adapter.lora_B, adapter.scale)


@torch.no_grad()
def set_row_norms_(
    norm_O: Tensor,
    linear: NF4Linear,
    a_RI: Tensor | None = None,
    b_OR: Tensor | None = None,
    scale: float = 1.0,
    *,
    of_zeros: float = 1.0,
) -> None:
    """The norms of the rows of W + scale B A, of W alone where A and B are None, into `norm_O`, fp32.

    A row of zeros has no direction that a length could be given to. What is divided by is told as 1 for it
    (`of_zeros`); the magnitude that it begins with is its length, 0, so that it and its row of B stay zero.
    """
    weight = linear.weight
    parts = (weight.packed, weight.absmax, weight.nested_absmax, weight.offset, weight.code)
    row_norms_(norm_O, *parts, linear.in_features, a_RI, b_OR, scale, of_zeros)


# One operation, so that a plan asks once for each kind of linear what happens inside, and not for every linear.
@torch.library.custom_op("qlora_trainer::row_norms_", mutates_args=("norm_O",))
def row_norms_(
    norm_O: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    code: Tensor | None,
    in_features: int,
    a_RI: Tensor | None,
    b_OR: Tensor | None,
    scale: float,
    of_zeros: float,
) -> None:
    """`set_row_norms_` of the weight of those parts (see `NF4Weight`)."""
    out_features = norm_O.shape[0]
    weight = NF4Weight(packed, absmax, nested_absmax, offset, code, (out_features, in_features))
    wide_RI = None if a_RI is None else a_RI.float()
    rows = nf4.rows_at_once(weight.shape, max(CHUNK_ELEMENTS, -(-out_features * in_features // MAX_CHUNKS)))
    for first in range(0, out_features, rows):
        chunk = slice(first, first + rows)
        dense_OI = nf4.dequantize_rows(weight, chunk)
        if wide_RI is not None and b_OR is not None:
            dense_OI.addmm_(b_OR[chunk].float(), wide_RI, alpha=scale)
        torch.linalg.vector_norm(dense_OI, dim=1, out=norm_O[chunk])
        del dense_OI  # before the next is made
    norm_O.masked_fill_(norm_O == 0.0, of_zeros)


@row_norms_.register_fake
def _(norm_O: Tensor, *_others: object) -> None:
    return None

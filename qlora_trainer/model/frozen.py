"""The 16-bit ends of the model: embeddings and output head, stored in bf16, used in the compute dtype.

A head may be in NF4 instead, as the linears are (`quantization.head`): then it is unpacked a block of the vocabulary at
a time, and never whole.

They are frozen, unless a `weight` is a parameter that is trained whole (`model.trained_tables`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora_trainer.hardware.heap import ResidentLimit
from qlora_trainer.model import nf4
from qlora_trainer.model.vocabulary_blocks import VocabularyBlocks, look_up_on_host

_SCALES = ("absmax", "nested_absmax", "offset", "code")


class FrozenEmbedding(nn.Module):
    """Looks rows up in a bf16 table and returns them in the compute dtype, so the table is never upcast whole.

    Args:
        weight_VH: the table.
        compute_dtype: dtype of the residual stream.
        scale: factor some models (Gemma) put on embeddings, rounded to the compute dtype as they do; None for none.

    Attributes:
        device: of the rows that it returns, where the table lives on the host; None where it does not.
    """

    weight: Tensor
    scale: Tensor | None

    def __init__(self, weight_VH: Tensor, compute_dtype: torch.dtype, scale: Tensor | None) -> None:
        super().__init__()
        self.compute_dtype = compute_dtype
        self.register_buffer("weight", weight_VH, persistent=False)
        self.register_buffer("scale", None if scale is None else scale.to(compute_dtype), persistent=False)
        self.num_embeddings, self.embedding_dim = weight_VH.shape
        self.device: torch.device | None = None

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [...] -> [..., H] in the compute dtype."""
        if self.weight.requires_grad:
            rows: Tensor = _TrainedRows.apply(  # type: ignore[no-untyped-call]
                self.weight, input_ids, self.compute_dtype
            )
        elif self.device is not None:
            rows = look_up_on_host(self.weight, input_ids, self.device).to(self.compute_dtype)
        else:
            rows = nn.functional.embedding(input_ids, self.weight).to(self.compute_dtype)
        return rows if self.scale is None else rows * self.scale


class _TrainedRows(torch.autograd.Function):
    """Rows of a trained table. Their gradients are added to its `.grad` in fp32, without a [V, H] in between.

    Every row has its true gradient, that of the padding token too, which `nn.Embedding` leaves out.
    """

    @staticmethod
    def forward(ctx: Any, weight_VH: Tensor, input_ids: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.weight_VH = weight_VH
        ctx.save_for_backward(input_ids)
        return nn.functional.embedding(input_ids, weight_VH).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        (input_ids,) = ctx.saved_tensors
        grad_NH = grad.reshape(-1, grad.shape[-1]).float()
        if grad.device.type == "cpu":
            ctx.weight_VH.grad.index_add_(0, input_ids.flatten(), grad_NH)
        else:  # sorts first: atomic additions would come in another order each time
            ctx.weight_VH.grad.index_put_((input_ids.flatten(),), grad_NH, accumulate=True)
        return None, None, None


class FrozenHead(nn.Module):
    """The projection onto the vocabulary; training goes through the chunked loss instead of this forward.

    Args:
        weight_VH: the projection, which is the embedding table itself where a model ties them; dense, or in NF4.
        bias_V: bias or None.
        resident_limit: asked for room before the projection.

    Attributes:
        weight: [V, H]; of a head in NF4 its packed bytes, uint8 [V, H / 2].
        is_on_host: whether `weight` lives on the host and is used block by block.
    """

    weight: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    code: Tensor | None
    bias: Tensor | None

    def __init__(
        self, weight_VH: Tensor | nf4.NF4Weight, bias_V: Tensor | None, resident_limit: ResidentLimit | None = None
    ) -> None:
        super().__init__()
        self.resident_limit = resident_limit or ResidentLimit()
        self.register_buffer("bias", bias_V, persistent=False)
        for name in ("weight", *_SCALES):
            self.register_buffer(name, None, persistent=False)
        self.out_features, self.in_features = weight_VH.shape
        self.hold(weight_VH)
        self.is_on_host = False

    def hold(self, weight_VH: Tensor | nf4.NF4Weight) -> None:
        """Take a projection in the place of the one that is there, dense or in NF4; a row of it has an even length."""
        if isinstance(weight_VH, nf4.NF4Weight):
            self.weight = weight_VH.packed.view(self.out_features, self.in_features // 2)
            scales: nf4.BlockScales | None = weight_VH.scales
        else:
            self.weight, scales = weight_VH, None
        for name in _SCALES:
            setattr(self, name, getattr(scales, name, None))

    @property
    def is_trained(self) -> bool:
        """Whether its weight or its bias is trained."""
        return any(parameter.requires_grad for parameter in self.parameters(recurse=False))

    @property
    def scales(self) -> nf4.BlockScales | None:
        """Those of the blocks of `weight`; None where that is dense, also in the place of one in NF4."""
        if self.weight.dtype != torch.uint8:
            return None
        return nf4.BlockScales(self.absmax, self.nested_absmax, self.offset, self.code)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> logits [..., V] in hidden's dtype."""
        num_rows = hidden.numel() // self.in_features
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        if self.is_on_host or self.scales is not None:
            return self._in_blocks(hidden, bias)
        self.resident_limit.make_room(hidden.itemsize * (self.weight.numel() + num_rows * self.out_features))
        return nn.functional.linear(hidden, self.weight.to(hidden.dtype), bias)

    def _in_blocks(self, hidden: Tensor, bias_V: Tensor | None) -> Tensor:
        out = hidden.new_empty((*hidden.shape[:-1], self.out_features))
        blocks = VocabularyBlocks.of(self.weight, hidden, is_on_host=self.is_on_host, scales=self.scales)
        for block, part_VH in blocks.each():
            out[..., block] = nn.functional.linear(hidden, part_VH)
            del part_VH
        return out if bias_V is None else out.add_(bias_V)

"""Small computations that show whether what training stands on works on this machine, each against a reference.

Legend: B rows, H query heads, K key/value heads, T tokens, D head size; in rows of `triton_rows` H elements, n heads.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_trainer.hardware.causal_attention import AttentionShape, attend, attend_backward
from qlora_trainer.hardware.paging import zeros_paged
from qlora_trainer.hardware.quant_library import bitsandbytes, functional
from qlora_trainer.hardware.row_kernels import row_kernels

# NF4 with blocks of 64 leaves normal weights with this relative error (root mean square; measured over 2^24 of them).
NF4_ERROR = 0.092
_NUM_ELEMENTS = 2**16  # whole blocks of 256, and more than the 4,096 under which bitsandbytes keeps 32 bits
_LEARNING_RATE = 1e-3


def nf4_error(device: torch.device) -> float:
    """Relative root mean square error of normal weights after they went through NF4 and back."""
    weight = _normal(256, 256, device=device)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    unpacked = functional.dequantize_4bit(packed, state)
    return _relative_error(unpacked, weight)


def attention_error(device: torch.device, *, window: int, softcap: float) -> float:
    """Largest relative error of attention's output and gradients against plain fp32 attention over all pairs."""
    shape = AttentionShape(scale=0.25, window=window, softcap=softcap)
    q_BHTD, grad_BHTD = _normal(1, 4, 40, 16, device=device), _normal(1, 4, 40, 16, device=device)
    k_BKTD, v_BKTD = _normal(1, 2, 40, 16, device=device), _normal(1, 2, 40, 16, device=device)
    out_BHTD, lse_BHT = attend(q_BHTD, k_BKTD, v_BKTD, shape)
    found = [out_BHTD, *attend_backward(grad_BHTD, q_BHTD, k_BKTD, v_BKTD, out_BHTD, lse_BHT, shape)]
    leaves = [tensor.requires_grad_() for tensor in (q_BHTD, k_BKTD, v_BKTD)]
    reference_BHTD = _plain_attention(q_BHTD, k_BKTD, v_BKTD, shape)
    expected = [reference_BHTD.detach(), *torch.autograd.grad(reference_BHTD, leaves, grad_BHTD)]
    return max(_relative_error(*pair) for pair in zip(found, expected, strict=True))


def row_kernel_error(device: torch.device) -> float:
    """Largest relative error of kernels of `triton_rows` against torch: a norm, a rotation and a gated activation."""
    kernels = row_kernels()
    x_TH, up_TH = _normal(2, 40, 96, device=device)
    weight_H = _normal(96, device=device)
    normed_TH, gated_TH, heads_TnD = torch.empty_like(x_TH), torch.empty_like(x_TH), x_TH.clone().unflatten(1, (3, 32))
    kernels.rms_norm(normed_TH, x_TH.new_empty((40, 1)), x_TH, weight_H, 1e-5, 0.0)
    kernels.gated(gated_TH, x_TH, up_TH, "silu")
    cos_TD, sin_TD = up_TH[:, :32].cos(), up_TH[:, :32].sin()
    kernels.rotate(heads_TnD, cos_TD, sin_TD, 1.0)
    first, second = x_TH.unflatten(1, (3, 2, 16)).unbind(2)
    cos, sin = cos_TD[:, None, :16], sin_TD[:, None, :16]
    pairs = [
        (normed_TH, nn.functional.rms_norm(x_TH, (96,), weight_H, 1e-5)),
        (gated_TH, nn.functional.silu(x_TH) * up_TH),
        (heads_TnD, torch.cat((first * cos - second * sin, second * cos + first * sin), -1)),
    ]
    return max(_relative_error(*pair) for pair in pairs)


def update_error(device: torch.device, *, bits: int) -> float:
    """Relative error of a first AdamW step of bitsandbytes, which should move each weight by the learning rate."""
    gradient = _normal(_NUM_ELEMENTS, device=device)
    state = _updated(gradient, bits, lambda dtype: torch.zeros(_NUM_ELEMENTS, dtype=dtype, device=device))
    return _relative_error(state["weight"], -_LEARNING_RATE * gradient.sign())


def is_paged_update_equal(device: torch.device, *, bits: int, folder: Path) -> bool:
    """Whether two AdamW steps on paged state give what they give on resident state, bit for bit.

    Raises:
        StorageError: `folder` cannot hold paged state (see `zeros_paged`).
    """
    gradient = _normal(_NUM_ELEMENTS, device=device)
    resident = _updated(gradient, bits, lambda dtype: torch.zeros(_NUM_ELEMENTS, dtype=dtype, device=device), 2)
    paged = _updated(
        gradient, bits, lambda dtype: zeros_paged(_NUM_ELEMENTS, dtype=dtype, device=device, folder=folder), 2
    )
    return all(torch.equal(paged[name], tensor) for name, tensor in resident.items())


def _updated(
    gradient: Tensor, bits: int, make_zeros: Callable[[torch.dtype], Tensor], num_steps: int = 1
) -> dict[str, Tensor]:
    """Weight and moments after AdamW steps from zero, in buffers that `make_zeros` makes."""
    weight = nn.Parameter(make_zeros(torch.float32))
    weight.grad = gradient
    adamw = bitsandbytes.optim.AdamW([weight], lr=_LEARNING_RATE, weight_decay=0.0, optim_bits=bits)
    moment_dtype = torch.uint8 if bits == 8 else torch.float32
    state: dict[str, Any] = {"step": 0, "state1": make_zeros(moment_dtype), "state2": make_zeros(moment_dtype)}
    if bits == 8:
        for name in ("absmax1", "absmax2"):
            state[name] = torch.zeros(_NUM_ELEMENTS // 256, device=gradient.device)
        state["qmap1"] = functional.create_dynamic_map(signed=True).to(gradient.device)
        state["qmap2"] = functional.create_dynamic_map(signed=False).to(gradient.device)
    adamw.state[weight] = state
    for _ in range(num_steps):
        adamw.step()
    return {"weight": weight.detach(), "state1": state["state1"], "state2": state["state2"]}


def _plain_attention(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, shape: AttentionShape) -> Tensor:
    num_tokens, num_groups = q_BHTD.shape[2], q_BHTD.shape[1] // k_BKTD.shape[1]
    k_BHTD, v_BHTD = (tensor.repeat_interleave(num_groups, dim=1) for tensor in (k_BKTD, v_BKTD))
    scores_BHTT = q_BHTD @ k_BHTD.transpose(-1, -2) * shape.scale
    if shape.softcap:
        scores_BHTT = shape.softcap * torch.tanh(scores_BHTT / shape.softcap)
    position_T = torch.arange(num_tokens, device=q_BHTD.device)
    distance_TT = position_T.unsqueeze(1) - position_T.unsqueeze(0)
    hidden_TT = (distance_TT < 0) | (distance_TT >= (shape.window or num_tokens))
    return scores_BHTT.masked_fill(hidden_TT, -torch.inf).softmax(-1) @ v_BHTD


def _normal(*shape: int, device: torch.device) -> Tensor:
    # Its own generator: an examination leaves the global one alone.
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))

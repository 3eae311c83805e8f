"""The row operations of `model/row_ops.py` as Triton kernels: each is one launch that reads and writes everything once.

A launcher takes what the CPU's body of its operation takes, and writes into the same arguments. Arithmetic is fp32,
each result is rounded once. Import this through `row_kernels.py` only: triton is not there with torch's CPU wheels.

A norm holds its whole row in registers: up to 16,384 columns nothing spills, and no model here has more. Narrow rows
(heads) share a program, so that each has some thousand elements to load.

Legend: T rows, H width of a row, n heads, D head size, I intermediate size; inside kernels R rows and C columns of a
program, n heads of a program.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# The arguments of kernels are what triton makes of them: pointers, numbers, constants.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048  # of a program whose rows are narrower
FLAT_ELEMENTS = 1024  # of one that has no rows: 8 a thread, 16 bytes of bf16
FLAT_WARPS = 4
# Differs from batch to batch, and whether 16 divides it matters to nothing: not to be compiled for.
NOT_COMPILED_IN = ("num_rows",)


@triton.jit(do_not_specialize=NOT_COMPILED_IN)
def rms_norm_kernel(
    out_ptr, inverse_ptr, x_ptr, weight_ptr, num_rows, x_stride, eps, offset,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row_R1 = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column_1C = tl.arange(0, BLOCK)[None, :]
    is_column_1C = column_1C < WIDTH
    is_here_RC = (row_R1 < num_rows) & is_column_1C
    x_RC = tl.load(x_ptr + row_R1 * x_stride + column_1C, mask=is_here_RC, other=0.0).to(tl.float32)
    factor_1C = tl.load(weight_ptr + column_1C, mask=is_column_1C, other=0.0).to(tl.float32) + offset
    inverse_R1 = tl.rsqrt(tl.sum(x_RC * x_RC, axis=1, keep_dims=True) / WIDTH + eps)
    tl.store(inverse_ptr + row_R1, inverse_R1, mask=row_R1 < num_rows)
    out_RC = x_RC * inverse_R1 * factor_1C
    tl.store(out_ptr + row_R1 * WIDTH + column_1C, out_RC.to(out_ptr.dtype.element_ty), mask=is_here_RC)


@triton.jit(do_not_specialize=NOT_COMPILED_IN)
def rms_norm_again_kernel(
    out_ptr, x_ptr, inverse_ptr, weight_ptr, num_rows, x_stride, offset,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row_R1 = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column_1C = tl.arange(0, BLOCK)[None, :]
    is_column_1C = column_1C < WIDTH
    is_here_RC = (row_R1 < num_rows) & is_column_1C
    x_RC = tl.load(x_ptr + row_R1 * x_stride + column_1C, mask=is_here_RC, other=0.0).to(tl.float32)
    factor_1C = tl.load(weight_ptr + column_1C, mask=is_column_1C, other=0.0).to(tl.float32) + offset
    inverse_R1 = tl.load(inverse_ptr + row_R1, mask=row_R1 < num_rows, other=0.0)
    out_RC = x_RC * inverse_R1 * factor_1C
    tl.store(out_ptr + row_R1 * WIDTH + column_1C, out_RC.to(out_ptr.dtype.element_ty), mask=is_here_RC)


@triton.jit(do_not_specialize=NOT_COMPILED_IN)
def rms_norm_backward_kernel(
    grad_ptr, x_ptr, inverse_ptr, added_ptr, weight_ptr, num_rows, grad_stride, x_stride, added_stride, offset,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row_R1 = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column_1C = tl.arange(0, BLOCK)[None, :]
    is_column_1C = column_1C < WIDTH
    is_here_RC = (row_R1 < num_rows) & is_column_1C
    grad_at_RC = grad_ptr + row_R1 * grad_stride + column_1C
    x_RC = tl.load(x_ptr + row_R1 * x_stride + column_1C, mask=is_here_RC, other=0.0).to(tl.float32)
    factor_1C = tl.load(weight_ptr + column_1C, mask=is_column_1C, other=0.0).to(tl.float32) + offset
    inverse_R1 = tl.load(inverse_ptr + row_R1, mask=row_R1 < num_rows, other=0.0)
    scaled_RC = tl.load(grad_at_RC, mask=is_here_RC, other=0.0).to(tl.float32) * factor_1C
    mean_R1 = tl.sum(scaled_RC * x_RC, axis=1, keep_dims=True) / WIDTH
    grad_RC = scaled_RC * inverse_R1 - x_RC * (mean_R1 * (inverse_R1 * inverse_R1 * inverse_R1))
    if added_ptr is not None:
        added_at_RC = added_ptr + row_R1 * added_stride + column_1C
        grad_RC += tl.load(added_at_RC, mask=is_here_RC, other=0.0).to(tl.float32)
    tl.store(grad_at_RC, grad_RC.to(grad_ptr.dtype.element_ty), mask=is_here_RC)


@triton.jit
def rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, num_heads, x_stride, head_stride, cos_stride, sin_stride, sign,
    HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column_1C = tl.arange(0, BLOCK)[None, :]
    is_column_1C = column_1C < HALF
    cos_1C = tl.load(cos_ptr + token * cos_stride + column_1C, mask=is_column_1C, other=0.0).to(tl.float32)
    sin_1C = tl.load(sin_ptr + token * sin_stride + column_1C, mask=is_column_1C, other=0.0).to(tl.float32) * sign
    for head in range(0, num_heads, HEADS):
        head_n1 = head + tl.arange(0, HEADS)[:, None]
        is_here_nC = (head_n1 < num_heads) & is_column_1C
        first_at_nC = x_ptr + token * x_stride + head_n1 * head_stride + column_1C
        first_nC = tl.load(first_at_nC, mask=is_here_nC, other=0.0).to(tl.float32)
        second_nC = tl.load(first_at_nC + HALF, mask=is_here_nC, other=0.0).to(tl.float32)
        out_nC = first_nC * cos_1C - second_nC * sin_1C
        tl.store(first_at_nC, out_nC.to(x_ptr.dtype.element_ty), mask=is_here_nC)
        out_nC = second_nC * cos_1C + first_nC * sin_1C
        tl.store(first_at_nC + HALF, out_nC.to(x_ptr.dtype.element_ty), mask=is_here_nC)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """The activation and its derivative; tanh(u) is 2 sigmoid(2 u) - 1."""
    if ACTIVATION == "silu":
        share = tl.sigmoid(x)
        slope = share * (1.0 + x * (1.0 - share))
    elif ACTIVATION == "gelu_tanh":
        share = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))  # 2 sqrt(2 / pi)
        slope = share + x * share * (1.0 - share) * (1.5957691216057308 * (1.0 + 0.134145 * x * x))
    else:
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)  # 1 / sqrt(2 pi)
    return x * share, slope


@triton.jit
def gated_kernel(out_ptr, gate_ptr, up_ptr, num_elements, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_here = at < num_elements
    gate = tl.load(gate_ptr + at, mask=is_here, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=is_here, other=0.0).to(tl.float32)
    value, _ = activated(gate, ACTIVATION)
    tl.store(out_ptr + at, (value * up).to(out_ptr.dtype.element_ty), mask=is_here)


@triton.jit
def gated_backward_kernel(grad_ptr, gate_ptr, up_ptr, num_elements, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_here = at < num_elements
    grad = tl.load(grad_ptr + at, mask=is_here, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=is_here, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=is_here, other=0.0).to(tl.float32)
    value, slope = activated(gate, ACTIVATION)
    tl.store(gate_ptr + at, (grad * up * slope).to(gate_ptr.dtype.element_ty), mask=is_here)
    tl.store(up_ptr + at, (grad * value).to(up_ptr.dtype.element_ty), mask=is_here)
    tl.store(grad_ptr + at, (up * value).to(grad_ptr.dtype.element_ty), mask=is_here)


def rms_norm(out_TH: Tensor, inverse_T1: Tensor, x_TH: Tensor, weight_H: Tensor, eps: float, offset: float) -> None:
    """Norm of `x_TH` into `out_TH` and 1 / rms into `inverse_T1`, both contiguous."""
    num_rows, width = x_TH.shape
    x_TH = _by_columns(x_TH)
    _launch(
        rms_norm_kernel, row_grid(num_rows, width), out_TH, inverse_T1, x_TH, weight_H, num_rows, x_TH.stride(0),
        eps, offset, **row_options(width),
    )  # fmt: skip


def rms_norm_again(out_TH: Tensor, x_TH: Tensor, inverse_T1: Tensor, weight_H: Tensor, offset: float) -> None:
    """Norm of `x_TH` into `out_TH`, which is contiguous, by a 1 / rms that is known."""
    num_rows, width = x_TH.shape
    x_TH = _by_columns(x_TH)
    _launch(
        rms_norm_again_kernel, row_grid(num_rows, width), out_TH, x_TH, inverse_T1, weight_H, num_rows,
        x_TH.stride(0), offset, **row_options(width),
    )  # fmt: skip


def rms_norm_backward(
    grad_TH: Tensor, x_TH: Tensor, inverse_T1: Tensor, added_TH: Tensor | None, weight_H: Tensor, offset: float
) -> None:
    """The gradient of the normed rows becomes that of `x_TH`, plus `added_TH`, in place."""
    num_rows, width = x_TH.shape
    x_TH = _by_columns(x_TH)
    added_TH = None if added_TH is None else _by_columns(added_TH)
    assert grad_TH.stride(1) == 1
    _launch(
        rms_norm_backward_kernel, row_grid(num_rows, width), grad_TH, x_TH, inverse_T1, added_TH, weight_H, num_rows,
        grad_TH.stride(0), x_TH.stride(0), 0 if added_TH is None else added_TH.stride(0), offset,
        **row_options(width),
    )  # fmt: skip


def rotate(x_TnD: Tensor, cos_TD: Tensor, sin_TD: Tensor, sign: float) -> None:
    """Rotates the heads of each row of `x_TnD`, in place."""
    num_tokens, num_heads, head_dim = x_TnD.shape
    cos_TD, sin_TD = _by_columns(cos_TD), _by_columns(sin_TD)
    assert x_TnD.stride(2) == 1
    _launch(
        rotate_kernel, num_tokens, x_TnD, cos_TD, sin_TD, num_heads, x_TnD.stride(0), x_TnD.stride(1),
        cos_TD.stride(0), sin_TD.stride(0), sign, **head_options(num_heads, head_dim),
    )  # fmt: skip


def gated(out_TI: Tensor, gate_TI: Tensor, up_TI: Tensor, activation: str) -> None:
    """`activation(gate) * up` into `out_TI`, which is contiguous."""
    gate_TI, up_TI = gate_TI.contiguous(), up_TI.contiguous()
    _launch(
        gated_kernel, triton.cdiv(gate_TI.numel(), FLAT_ELEMENTS), out_TI, gate_TI, up_TI, gate_TI.numel(),
        **flat_options(activation),
    )  # fmt: skip


def gated_backward(grad_TI: Tensor, gate_TI: Tensor, up_TI: Tensor, activation: str) -> None:
    """Gradients in place of gate and up themselves; into `grad_TI` comes what `gated` returned."""
    assert all(tensor.is_contiguous() for tensor in (grad_TI, gate_TI, up_TI))
    _launch(
        gated_backward_kernel, triton.cdiv(grad_TI.numel(), FLAT_ELEMENTS), grad_TI, gate_TI, up_TI, grad_TI.numel(),
        **flat_options(activation),
    )  # fmt: skip


def row_grid(num_rows: int, width: int) -> int:
    """Programs for that many rows."""
    num_programs: int = triton.cdiv(num_rows, row_options(width)["ROWS"])
    return num_programs


def row_options(width: int) -> dict[str, int]:
    """What the kernels of rows of `width` elements are compiled for."""
    block = triton.next_power_of_2(width)
    rows = max(1, ELEMENTS // block)
    # 16 elements a thread, 32 of the widest: more threads would have too few registers each.
    return {"WIDTH": width, "ROWS": rows, "BLOCK": block, "num_warps": min(16, max(4, rows * block // 512))}


def head_options(num_heads: int, head_dim: int) -> dict[str, int]:
    """What the kernel of `num_heads` heads of `head_dim` elements is compiled for."""
    half = head_dim // 2
    block = triton.next_power_of_2(half)
    heads = min(triton.next_power_of_2(num_heads), max(1, ELEMENTS // block))
    return {"HALF": half, "HEADS": heads, "BLOCK": block, "num_warps": 4}


def flat_options(activation: str) -> dict[str, int | str]:
    """What the elementwise kernels are compiled for."""
    return {"ACTIVATION": activation, "BLOCK": FLAT_ELEMENTS, "num_warps": FLAT_WARPS}


def _by_columns(rows: Tensor) -> Tensor:
    """Rows that are read: neighbours in memory, whatever is between the rows."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _launch(kernel: triton.JITFunction, num_programs: int, *args: object, **options: int | str) -> None:
    """On the device of the first argument; there is nothing to do without a program."""
    first = args[0]
    assert isinstance(first, Tensor)
    if num_programs:
        with torch.cuda.device_of(first):
            kernel[(num_programs,)](*args, **options)

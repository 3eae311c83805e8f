"""What library kernels allocate inside themselves: memory that neither their results nor their fake kernels show.

Each figure was read off `torch.profiler`'s memory events (torch 2.13, bitsandbytes 0.50.2), and a test holds it against
the same counter; those of a GPU's kernels are added up from their sources, and not measured yet. Kernels that are not
named here allocate nothing but their results.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from qlora_trainer.hardware.causal_attention import takes_groups
from qlora_trainer.hardware.device import num_cpu_threads

# bitsandbytes' CPU updates, in bytes an element of the piece that is updated.
ADAMW_32BIT_BYTES, ADAMW_8BIT_BYTES = 12, 20
# bitsandbytes' CPU `quantize_4bit` of a float32 piece, in bytes an element.
QUANTIZE_4BIT_BYTES = 9.5
# oneDNN's scratch buffer of a product of 16-bit matrices, a thread: by the columns of the left one, and at most;
# measured, docs/memory.md.
SCRATCH_LEAST_BYTES, SCRATCH_BYTES_A_COLUMN, SCRATCH_MOST_BYTES = 32 * 2**10, 168, 193 * 2**10


# Products of 16 bits that oneDNN compiles for each length of row, and keeps: what a run of SmolLM2 had of them beside
# its plan, for rows of one length and for those of the others (docs/log.md, 2026-11-29).
COMPILED_BYTES, COMPILED_FOR_OTHERS_BYTES = 12 * 2**20, 32 * 2**20


def compiled_bytes(compute_dtype: torch.dtype, *, has_one_length: bool) -> int:
    """Of the kernels that a CPU keeps while it trains in this dtype, on documents of one length or of several."""
    if compute_dtype.itemsize != 2 or not onednn_multiplies_16_bits():
        return 0
    return COMPILED_BYTES + (0 if has_one_length else COMPILED_FOR_OTHERS_BYTES)


def inside_bytes(op: str, args: tuple[Any, ...], num_threads: int | None = None) -> int:
    """Bytes that `op` needs beyond its results while it runs.

    Args:
        op: name of the operation, such as `aten::mm`.
        args: its positional arguments.
        num_threads: of CPU kernels; None for all processors that this process may use.
    """
    threads = num_cpu_threads() if num_threads is None else num_threads
    match op:
        case "aten::_scaled_dot_product_flash_attention_for_cpu":
            return _cpu_flash_bytes(args[0], threads)
        case "aten::_scaled_dot_product_flash_attention_for_cpu_backward":
            return _cpu_flash_backward_bytes(args[0], args[1], threads)
        case "qlora_trainer::fused_attention":
            return _gpu_attention_bytes(args[0], args[1])
        case "qlora_trainer::fused_attention_backward" if takes_groups(args[1].dtype):
            return _gpu_flash_backward_bytes(args[1], args[2])
        case "qlora_trainer::fused_attention_backward":
            return _gpu_efficient_backward_bytes(args[1], args[2])
        case "bitsandbytes::optimizer_update_32bit" if args[1].device.type == "cpu":
            return ADAMW_32BIT_BYTES * int(args[1].numel())
        case "bitsandbytes::optimizer_update_8bit_blockwise" if args[1].device.type == "cpu":
            return ADAMW_8BIT_BYTES * int(args[1].numel())
        case "aten::mm" | "aten::addmm" | "aten::addmm_":
            return _product_bytes(args[0] if op == "aten::mm" else args[1], threads)
        case "bitsandbytes::quantize_4bit" if args[0].device.type == "cpu":
            return math.ceil(QUANTIZE_4BIT_BYTES * int(args[0].numel()))
    return 0


def _product_bytes(left: Tensor, num_threads: int) -> int:
    """oneDNN's scratch buffer, where it multiplies 16-bit matrices on a CPU; elsewhere there is none.

    Its size follows from blockings that differ from processor to processor. This is what most products take on an
    AVX-512 one with bf16 instructions; a few take up to 1.3 MiB a thread, which `device_memory.CPU_FIXED_BYTES` covers.
    """
    if left.device.type != "cpu" or left.dtype.itemsize != 2 or not onednn_multiplies_16_bits():
        return 0
    return num_threads * min(SCRATCH_MOST_BYTES, SCRATCH_LEAST_BYTES + SCRATCH_BYTES_A_COLUMN * left.shape[-1])


@functools.cache
def onednn_multiplies_16_bits() -> bool:
    """Whether products of 16 bits on this CPU are oneDNN's: it has instructions for them."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _blocks(num_tokens: int) -> tuple[int, int]:
    """Queries and keys in a block (ATen/native/cpu/FlashAttentionKernel.cpp, `flash_attention_kernel_impl`)."""
    queries = 256 if num_tokens >= 768 else 64 if num_tokens >= 192 else 32
    return queries, min(512, num_tokens)


def _cpu_flash_bytes(q_BHTD: Tensor, num_threads: int) -> int:
    """A thread's scores, row maxima, row sums and output block in fp32; 16-bit inputs need 16-bit weights too."""
    queries, keys = _blocks(q_BHTD.shape[2])
    num_bytes = 4 * (queries * keys + 2 * queries + queries * q_BHTD.shape[-1])
    if q_BHTD.dtype != torch.float32:
        num_bytes += 2 * queries * keys
    return num_threads * num_bytes


def _cpu_flash_backward_bytes(grad_BHTD: Tensor, q_BHTD: Tensor, num_threads: int) -> int:
    """A thread's weights and their gradient in fp32; and the gradient once more, unless heads lie behind tokens."""
    queries, keys = _blocks(q_BHTD.shape[2])
    copied_bytes = 0 if grad_BHTD.transpose(1, 2).is_contiguous() else grad_BHTD.numel() * grad_BHTD.element_size()
    return num_threads * 2 * 4 * queries * keys + copied_bytes


def _gpu_attention_bytes(q_BHTD: Tensor, k_BKTD: Tensor) -> int:
    """Log-sum-exp; repeated keys and values. The output is laid out token by token, as the kernel makes it."""
    rows, heads, num_tokens, _ = q_BHTD.shape
    return 4 * rows * heads * _round_up(num_tokens, 32) + _repeated_bytes(q_BHTD, k_BKTD)


def _repeated_bytes(q_BHTD: Tensor, k_BKTD: Tensor) -> int:
    """Keys and values for every query head, where the kernel takes no groups; one head needs no copy."""
    is_repeated = not takes_groups(q_BHTD.dtype) and 1 < k_BKTD.shape[1] < q_BHTD.shape[1]
    return 2 * q_BHTD.numel() * q_BHTD.element_size() if is_repeated else 0


def _gpu_efficient_backward_bytes(q_BHTD: Tensor, k_BKTD: Tensor) -> int:
    """The memory-efficient kernel's backward, with the forward run again before it, read off its source.

    The forward's output, log-sum-exp and repeated keys and values; row sums; dk and dv of every query head where heads
    share keys; and a workspace of tiles of 64 x 64 in fp32: all of dq, each with a lock of 16 bytes, and of dk and dv a
    few, where 16-bit heads are wider than 64 (ATen/native/transformers/cuda/attention_backward.cu and
    mem_eff_attention/kernel_backward.h, `workspace_size`). On Volta, heads wider than 64 take more: the row sums are
    made of fp32 copies.
    """
    rows, heads, num_tokens, head_dim = q_BHTD.shape
    q_bytes = q_BHTD.numel() * q_BHTD.element_size()
    forward_bytes = q_bytes + 4 * rows * heads * _round_up(num_tokens, 32) + _repeated_bytes(q_BHTD, k_BKTD)
    num_tiles = _round_up(num_tokens, 64) // 64 * (_round_up(head_dim, 64) // 64)
    workspace_bytes = num_tiles * (4 * 64 * 64 + 16)
    if q_BHTD.element_size() == 2 and head_dim > 64:
        num_splits = max(1, min(_round_up(num_tokens, 64) // 64, 200 // (rows * heads)))
        workspace_bytes += 2 * 4 * num_splits * 64 * _round_up(head_dim, 64)
    expanded_bytes = 2 * q_bytes if k_BKTD.shape[1] != heads else 0
    return forward_bytes + 4 * rows * heads * num_tokens + expanded_bytes + rows * heads * workspace_bytes


def _gpu_flash_backward_bytes(q_BHTD: Tensor, k_BKTD: Tensor) -> int:
    """FlashAttention 2's backward, with the forward run again before it.

    The forward's output and log-sum-exp; an fp32 accumulator of dq, rounded up to 128 tokens and 32 columns; the row
    sums; and, where heads share keys, dk and dv for every query head (csrc/flash_attn/flash_api.cpp, `mha_bwd`).
    """
    rows, heads, num_tokens, head_dim = q_BHTD.shape
    tokens, columns = _round_up(num_tokens, 128), _round_up(head_dim, 32)
    out_bytes = q_BHTD.numel() * q_BHTD.element_size() + 4 * rows * heads * num_tokens
    accumulator_bytes = 4 * rows * heads * tokens * (columns + 1)
    expanded_bytes = 0
    if k_BKTD.shape[1] != heads:
        expanded_bytes = 2 * q_BHTD.numel() * q_BHTD.element_size()
    return out_bytes + accumulator_bytes + expanded_bytes


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

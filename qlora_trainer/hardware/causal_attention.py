"""Attention within one document: the library's fused kernel where it can, exact query-chunked math where it cannot.

| device | dtype      | window | soft cap | kernel                    | kept for backward               |
|--------|------------|--------|----------|---------------------------|---------------------------------|
| CPU    | any        | no     | no       | torch's flash attention   | out, log-sum-exp                |
| CUDA   | bf16       | no     | no       | FlashAttention 2          | out; forward is run again there |
| CUDA   | fp16, fp32 | no     | no       | memory-efficient attention, or FlashAttention 2 | the same  |
| any    | any        | yes    | any      | math in chunks of queries | out, log-sum-exp                |
| any    | any        | any    | yes      | math in chunks of queries | out, log-sum-exp                |

CUDA's kernels are behind `scaled_dot_product_attention`, which falls back to T x T matrices without a word where a
condition of theirs is not met (ATen/native/transformers/cuda/sdp_utils.cpp). Here all are: FlashAttention, which knows
grouped heads, wants sm_80 and 16 bits; the other one, the only one of older cards, knows none, so that keys and values
are repeated for every query head; and sizes of heads that they do not take get the math in chunks.

A window that is at least as long as the document is no window. Chunked math never builds a T x T matrix: its largest
temporary is `QUERY_CHUNK x (QUERY_CHUNK + min(window, T))` floats a head. Source of the backward formulas: Dao et al.,
FlashAttention (2022), appendix B.

Legend: B rows, H query heads, K key/value heads, G = H / K, T tokens, D head size, Q queries in a chunk, S keys seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

QUERY_CHUNK = 256


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What a layer's attention is, apart from its tensors.

    Attributes:
        scale: factor on query-key products.
        window: keys a query sees, itself included; 0 means all before it.
        softcap: scores become `softcap * tanh(scores / softcap)`; 0 means none.
    """

    scale: float
    window: int
    softcap: float

    def is_plain(self, q_BHTD: Tensor, v_BKTD: Tensor) -> bool:
        """Whether a fused causal kernel computes this exactly."""
        has_window = 0 < self.window < q_BHTD.shape[2]
        is_causal_only = not has_window and self.softcap == 0.0 and q_BHTD.shape[-1] == v_BKTD.shape[-1]
        return is_causal_only and (_has_cpu_kernel(q_BHTD) or _has_gpu_kernel(q_BHTD.dtype, q_BHTD.shape[-1]))


def _has_cpu_kernel(q_BHTD: Tensor) -> bool:
    return q_BHTD.device.type == "cpu"


def _has_gpu_kernel(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether one of torch's fused kernels takes heads of that size, on every card that computes in the dtype."""
    if takes_groups(dtype):  # FlashAttention; its backward has no sizes between 192 and 224 on sm_86, 89 and 120
        return head_dim <= 192 or 224 < head_dim <= 256
    return head_dim % 8 == 0


def takes_groups(dtype: torch.dtype) -> bool:
    """Whether the GPU's kernel of this dtype takes fewer key and value heads than query heads as they are."""
    return dtype == torch.bfloat16  # cards that have it have FlashAttention


def working_bytes(q_BHTD: Tensor, longest_document: int, shape: AttentionShape) -> int:
    """About what attention over the longest document of a row takes on a CPU beside its results, forward or backward.

    Both measured, in fp32: a fused kernel's backward repeats keys and values and has gradients of all heads; in chunks
    there are up to six tensors of scores.
    """
    rows, heads, _, head_dim = q_BHTD.shape
    document = q_BHTD[:, :, :longest_document]
    if shape.is_plain(document, document):
        return 8 * 4 * rows * heads * longest_document * head_dim
    chunks = _chunks(longest_document, shape.window)
    largest = max((chunk.end - chunk.first_query) * (chunk.end - chunk.first_key) for chunk in chunks)
    return 4 * rows * heads * (6 if shape.softcap else 5) * largest


def attend(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor | None]:
    """Causal attention; returns (out [B, H, T, D], log-sum-exp [B, H, T] fp32, or None where backward needs none)."""
    if not shape.is_plain(q_BHTD, v_BKTD):
        return _attend_in_chunks(q_BHTD, k_BKTD, v_BKTD, shape)
    if _has_cpu_kernel(q_BHTD):
        out_BHTD, lse_BHT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BHTD, k_BKTD, v_BKTD, 0.0, True, scale=shape.scale
        )
        return out_BHTD, lse_BHT
    out_BTHD: Tensor = fused_attention(q_BHTD, k_BKTD, v_BKTD, shape.scale)
    return out_BTHD.transpose(1, 2), None


def attend_backward(
    grad_BHTD: Tensor,
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    out_BHTD: Tensor,
    lse_BHT: Tensor | None,
    shape: AttentionShape,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend` with respect to q, k and v, in their dtypes."""
    is_plain = shape.is_plain(q_BHTD, v_BKTD)
    if is_plain and not _has_cpu_kernel(q_BHTD):
        grads: tuple[Tensor, Tensor, Tensor] = fused_attention_backward(grad_BHTD, q_BHTD, k_BKTD, v_BKTD, shape.scale)
        return grads
    assert lse_BHT is not None
    if is_plain:
        return _cpu_flash_backward(grad_BHTD, q_BHTD, k_BKTD, v_BKTD, out_BHTD, lse_BHT, shape.scale)
    return _attend_in_chunks_backward(grad_BHTD, q_BHTD, k_BKTD, v_BKTD, out_BHTD, lse_BHT, shape)


@torch.library.custom_op("qlora_trainer::fused_attention", mutates_args=())
def fused_attention(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float) -> Tensor:
    """The library's causal attention on a GPU: an op of its own, so that a dry run need not know its kernel.

    Returns [B, T, H, D], as the kernels lay it out: nothing is copied where that is so.
    """
    return _library_attention(q_BHTD, k_BKTD, v_BKTD, scale).transpose(1, 2).contiguous()


@fused_attention.register_fake
def _(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float) -> Tensor:
    return q_BHTD.new_empty(q_BHTD.transpose(1, 2).shape)


@torch.library.custom_op("qlora_trainer::fused_attention_backward", mutates_args=())
def fused_attention_backward(
    grad_BHTD: Tensor, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `fused_attention`: the forward is run again, since the library's kernels save different things."""
    with _recorded():
        leaves = [tensor.detach().requires_grad_() for tensor in (q_BHTD, k_BKTD, v_BKTD)]
        again_BHTD = _library_attention(leaves[0], leaves[1], leaves[2], scale)
    grads = torch.autograd.grad(again_BHTD, leaves, grad_BHTD)
    return grads[0], grads[1], grads[2]


@fused_attention_backward.register_fake
def _(grad_BHTD: Tensor, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q_BHTD), torch.empty_like(k_BKTD), torch.empty_like(v_BKTD)


@contextmanager
def _recorded() -> Iterator[None]:
    """Autograd sees what is done, also inside an operation of our own, from whose body torch excludes it."""
    excluded = torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.AutogradFunctionality)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


def _library_attention(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float) -> Tensor:
    has_groups = q_BHTD.shape[1] != k_BKTD.shape[1]
    if has_groups and not takes_groups(q_BHTD.dtype):
        k_BKTD, v_BKTD = (_for_every_query_head(tensor, q_BHTD.shape[1]) for tensor in (k_BKTD, v_BKTD))
        has_groups = False
    return scaled_dot_product_attention(q_BHTD, k_BKTD, v_BKTD, is_causal=True, scale=scale, enable_gqa=has_groups)


def _for_every_query_head(tensor_BKTD: Tensor, num_heads: int) -> Tensor:
    """[B, H, T, D], each head as often as query heads share it: a copy, unless it is one head."""
    if tensor_BKTD.shape[1] == 1:
        return tensor_BKTD.expand(-1, num_heads, -1, -1)
    return tensor_BKTD.repeat_interleave(num_heads // tensor_BKTD.shape[1], dim=1)


def _cpu_flash_backward(
    grad_BHTD: Tensor,
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    out_BHTD: Tensor,
    lse_BHT: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    # Unlike the forward kernel, the backward one knows no grouped heads: repeat k and v, then sum over the group.
    # In fp32, because it is up to five times slower in bf16 (torch 2.13: 3.4 ms, not 0.7, for 60 tokens and 9 heads).
    dtype, num_groups = q_BHTD.dtype, q_BHTD.shape[1] // k_BKTD.shape[1]
    k_BHTD, v_BHTD = (tensor.float().repeat_interleave(num_groups, dim=1) for tensor in (k_BKTD, v_BKTD))
    grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_BHTD.float(), q_BHTD.float(), k_BHTD, v_BHTD, out_BHTD.float(), lse_BHT, 0.0, True, scale=scale
    )
    if num_groups > 1:
        grad_k, grad_v = (grad.unflatten(1, (-1, num_groups)).sum(2) for grad in (grad_k, grad_v))
    return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Queries [first_query, end) and the keys [first_key, end) that at least one of them sees."""

    first_query: int
    first_key: int
    end: int

    def is_visible_QS(self, window: int, device: torch.device) -> Tensor:
        query_Q1 = torch.arange(self.first_query, self.end, device=device).unsqueeze(1)
        key_1S = torch.arange(self.first_key, self.end, device=device).unsqueeze(0)
        visible_QS = key_1S <= query_Q1
        return visible_QS & (key_1S > query_Q1 - window) if window else visible_QS


def _chunks(num_tokens: int, window: int) -> Iterator[_Chunk]:
    for first_query in range(0, num_tokens, QUERY_CHUNK):
        first_key = max(0, first_query - window + 1) if window else 0
        yield _Chunk(first_query, first_key, min(first_query + QUERY_CHUNK, num_tokens))


def _scores(q_BKGQD: Tensor, k_BKSD: Tensor, shape: AttentionShape, visible_QS: Tensor) -> tuple[Tensor, Tensor | None]:
    """fp32 scores with -inf where a key is not visible, and tanh of the uncapped ones for backward."""
    # In place wherever it can be: these are the largest tensors, and blocks that are freed fit no larger chunk.
    scores_BKGQS = torch.matmul(q_BKGQD, k_BKSD.unsqueeze(2).transpose(-1, -2)).float().mul_(shape.scale)
    tanh_BKGQS = None
    if shape.softcap:
        tanh_BKGQS = scores_BKGQS.div_(shape.softcap).tanh_()
        scores_BKGQS = shape.softcap * tanh_BKGQS
    return scores_BKGQS.masked_fill_(~visible_QS, -torch.inf), tanh_BKGQS


def _attend_in_chunks(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor]:
    num_kv_heads, num_tokens = k_BKTD.shape[1], q_BHTD.shape[2]
    q_BKGTD = q_BHTD.unflatten(1, (num_kv_heads, -1))
    out_BKGTD = q_BKGTD.new_empty((*q_BKGTD.shape[:-1], v_BKTD.shape[-1]))
    lse_BKGT = q_BKGTD.new_empty(q_BKGTD.shape[:-1], dtype=torch.float32)
    for chunk in _chunks(num_tokens, shape.window):
        queries, keys = slice(chunk.first_query, chunk.end), slice(chunk.first_key, chunk.end)
        visible_QS = chunk.is_visible_QS(shape.window, q_BHTD.device)
        scores_BKGQS = _scores(q_BKGTD[..., queries, :], k_BKTD[:, :, keys], shape, visible_QS)[0]
        highest_BKGQ1 = scores_BKGQS.amax(-1, keepdim=True)
        weights_BKGQS = scores_BKGQS.sub_(highest_BKGQ1).exp_()  # `logsumexp` would make a copy of the scores inside
        del scores_BKGQS
        sum_BKGQ1 = weights_BKGQS.sum(-1, keepdim=True)
        weights_BKGQS = weights_BKGQS.div_(sum_BKGQ1).to(v_BKTD.dtype)
        out_BKGTD[..., queries, :] = torch.matmul(weights_BKGQS, v_BKTD[:, :, keys].unsqueeze(2))
        lse_BKGT[..., queries] = sum_BKGQ1.log_().add_(highest_BKGQ1).squeeze(-1)
        del weights_BKGQS
    return out_BKGTD.flatten(1, 2), lse_BKGT.flatten(1, 2)


def _attend_in_chunks_backward(
    grad_BHTD: Tensor,
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    out_BHTD: Tensor,
    lse_BHT: Tensor,
    shape: AttentionShape,
) -> tuple[Tensor, Tensor, Tensor]:
    num_kv_heads, num_tokens = k_BKTD.shape[1], q_BHTD.shape[2]
    q_BKGTD, grad_BKGTD, out_BKGTD, lse_BKGT = (
        tensor.unflatten(1, (num_kv_heads, -1)) for tensor in (q_BHTD, grad_BHTD, out_BHTD, lse_BHT)
    )
    grad_q_BKGTD = torch.empty_like(q_BKGTD)
    grad_k_BKTD = torch.zeros_like(k_BKTD, dtype=torch.float32)
    grad_v_BKTD = torch.zeros_like(v_BKTD, dtype=torch.float32)
    for chunk in _chunks(num_tokens, shape.window):
        queries, keys = slice(chunk.first_query, chunk.end), slice(chunk.first_key, chunk.end)
        q_BKGQD, grad_BKGQD = q_BKGTD[..., queries, :], grad_BKGTD[..., queries, :]
        k_BKSD, v_BKSD = k_BKTD[:, :, keys], v_BKTD[:, :, keys]
        visible_QS = chunk.is_visible_QS(shape.window, q_BHTD.device)
        scores_BKGQS, tanh_BKGQS = _scores(q_BKGQD, k_BKSD, shape, visible_QS)
        weights_BKGQS = scores_BKGQS.sub_(lse_BKGT[..., queries].unsqueeze(-1)).exp_()
        del scores_BKGQS
        grad_v_BKTD[:, :, keys] += torch.matmul(weights_BKGQS.transpose(-1, -2), grad_BKGQD.float()).sum(2)
        delta_BKGQ1 = (grad_BKGQD.float() * out_BKGTD[..., queries, :].float()).sum(-1, keepdim=True)
        grad_scores_BKGQS = torch.matmul(grad_BKGQD, v_BKSD.unsqueeze(2).transpose(-1, -2)).float()
        grad_scores_BKGQS.sub_(delta_BKGQ1).mul_(weights_BKGQS).mul_(shape.scale)
        del weights_BKGQS
        if tanh_BKGQS is not None:
            grad_scores_BKGQS.mul_(tanh_BKGQS.square_().neg_().add_(1.0))
        del tanh_BKGQS
        grad_q_BKGTD[..., queries, :] = torch.matmul(grad_scores_BKGQS.to(k_BKSD.dtype), k_BKSD.unsqueeze(2))
        grad_k_BKTD[:, :, keys] += torch.matmul(grad_scores_BKGQS.transpose(-1, -2), q_BKGQD.float()).sum(2)
        del grad_scores_BKGQS
    return grad_q_BKGTD.flatten(1, 2), grad_k_BKTD.to(k_BKTD.dtype), grad_v_BKTD.to(v_BKTD.dtype)

"""What kernels allocate inside themselves, against the memory events of torch's profiler."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from qlora_trainer.hardware import kernel_workspace
from qlora_trainer.hardware.kernel_workspace import compiled_bytes, inside_bytes
from qlora_trainer.planning.tracker import StorageTracker
from qlora_trainer.step.optimizer import CPU_PIECE_ELEMENTS, AdapterOptimizer, OptimizerSettings
from tests.hardware.profiled_memory import allocated_by, bytes_beyond_results

FORWARD = "aten::_scaled_dot_product_flash_attention_for_cpu"
BACKWARD = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"
MOST_SCRATCH_BYTES = 1.7 * 2**20  # of a product of 16-bit matrices, a thread: 1.64 MiB is the most that was seen
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
THREADS = pytest.mark.parametrize("num_threads", [1, 2])
LENGTHS = pytest.mark.parametrize("num_tokens", [100, 300, 1000])


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """A test may change the number of threads."""
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def heads(rows: int, num_heads: int, num_tokens: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, num_heads, num_tokens, 32, dtype=dtype)


@DTYPES
@LENGTHS
@THREADS
def test_flash_attention_on_a_cpu(dtype: torch.dtype, num_tokens: int, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    q_BHTD, k_BKTD = heads(2, 4, num_tokens, dtype), heads(2, 2, num_tokens, dtype)
    args = (q_BHTD, k_BKTD, k_BKTD, 0.0, True)
    found = bytes_beyond_results(lambda: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args))
    assert inside_bytes(FORWARD, args, num_threads) == found


@LENGTHS
@THREADS
@pytest.mark.parametrize("is_by_token", [True, False])
def test_flash_attention_backward_on_a_cpu(num_tokens: int, num_threads: int, is_by_token: bool) -> None:
    """In fp32, which is all that it is asked for. A row sum of a block of queries is left out: 1 KiB at most."""
    torch.set_num_threads(num_threads)
    q_BHTD, k_BHTD = heads(2, 3, num_tokens, torch.float32), heads(2, 3, num_tokens, torch.float32)
    out_BHTD, lse_BHT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q_BHTD, k_BHTD, k_BHTD, 0.0, True)
    grad_BHTD = torch.randn(2, num_tokens, 3, q_BHTD.shape[-1]).transpose(1, 2) if is_by_token else q_BHTD
    args = (grad_BHTD, q_BHTD, k_BHTD, k_BHTD, out_BHTD, lse_BHT, 0.0, True)
    found = bytes_beyond_results(lambda: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*args))
    assert 0 <= found - inside_bytes(BACKWARD, args, num_threads) <= 1024


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("num_elements", [256, 2**14, CPU_PIECE_ELEMENTS + 2**10])
def test_an_optimizer_update_on_a_cpu(bits: Literal[8, 32], num_elements: int, tmp_path: Path) -> None:
    """What the tracker sees: a copy of the largest piece's state, and the kernel's own. Beside it are three scalars."""
    parameter = nn.Parameter(torch.randn(num_elements))
    settings = OptimizerSettings(bits=bits, residency="device", weight_decay=0.1, paging_folder=tmp_path)
    optimizer = AdapterOptimizer({"all": parameter}, settings)
    optimizer.update(1e-3)
    with StorageTracker(inside=inside_bytes) as tracker:
        optimizer.update(1e-3)
    found = allocated_by(lambda: optimizer.update(1e-3)).peak_bytes
    assert 0 <= found - tracker.peak_bytes <= 16


@pytest.mark.parametrize("num_elements", [2**12, 2**16 + 64])
def test_quantizing_on_a_cpu(num_elements: int) -> None:
    weight = torch.randn(num_elements)
    args = (weight, 64, "nf4", torch.uint8)
    torch.ops.bitsandbytes.quantize_4bit.default(*args)  # its table is made once
    found = bytes_beyond_results(lambda: torch.ops.bitsandbytes.quantize_4bit.default(*args))
    assert inside_bytes("bitsandbytes::quantize_4bit", args) == pytest.approx(found, abs=16)


@DTYPES
def test_unpacking_on_a_cpu_needs_only_its_result(dtype: torch.dtype) -> None:
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(torch.randn(96, 128), 64, "nf4", torch.uint8)
    args: tuple[Any, ...] = (packed, absmax, 64, "nf4", (96, 128), dtype)
    torch.ops.bitsandbytes.dequantize_4bit.default(*args)
    found = bytes_beyond_results(lambda: torch.ops.bitsandbytes.dequantize_4bit.default(*args))
    assert inside_bytes("bitsandbytes::dequantize_4bit", args) == found == 0


def test_unpacking_nested_scales_on_a_cpu_needs_only_its_result() -> None:
    code = torch.linspace(-1.0, 1.0, 256)
    nested, nested_absmax = torch.ops.bitsandbytes.quantize_blockwise.default(torch.randn(1024), code, 256)
    args = (nested, nested_absmax, code, 256, torch.float32)
    found = bytes_beyond_results(lambda: torch.ops.bitsandbytes.dequantize_blockwise.default(*args))
    assert inside_bytes("bitsandbytes::dequantize_blockwise", args) == found == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_need_only_their_result(dtype: torch.dtype) -> None:
    left, right = torch.randn(70, 50, dtype=dtype), torch.randn(50, 90, dtype=dtype)
    assert inside_bytes("aten::mm", (left, right)) == bytes_beyond_results(lambda: torch.mm(left, right)) == 0


@pytest.mark.parametrize("sizes", [(70, 50, 90), (256, 576, 1536), (512, 2048, 2048), (64, 3000, 4096)])
@THREADS
def test_16_bit_products_need_a_scratch_buffer_where_onednn_multiplies(
    sizes: tuple[int, int, int], num_threads: int
) -> None:
    """Nothing where torch multiplies itself. The forward's form is told to the size, the others within their most."""
    torch.set_num_threads(num_threads)
    rows, inner, columns = sizes
    left, right = torch.randn(rows, inner).bfloat16(), torch.randn(columns, inner).bfloat16()
    out = torch.randn(rows, columns).bfloat16()
    for one, other in ((left, right.t()), (out, right), (out.t(), left)):
        told = inside_bytes("aten::mm", (one, other), num_threads)
        found = bytes_beyond_results(lambda: one @ other)  # noqa: B023  # called at once
        assert (told > 0) == (found > 0) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
        assert max(told, found) <= num_threads * MOST_SCRATCH_BYTES
        if one is left:  # too little is the dangerous side: 0.98 to 1.53 were seen
            assert 0.9 * found <= told <= 1.6 * found


def test_what_onednn_compiles_is_counted_where_it_multiplies_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for multiplies in (True, False):
        monkeypatch.setattr(kernel_workspace, "onednn_multiplies_16_bits", lambda: multiplies)  # noqa: B023
        one, several = (compiled_bytes(torch.bfloat16, has_one_length=own) for own in (True, False))
        assert (0 < one < several) == multiplies
        assert several == 0 or multiplies
        assert compiled_bytes(torch.float32, has_one_length=False) == 0


@pytest.mark.parametrize("op", ["aten::addmm", "aten::addmm_"])
def test_a_product_with_a_sum_needs_the_scratch_buffer_of_the_product(op: str) -> None:
    out, left, right = (torch.randn(*sizes).bfloat16() for sizes in ((70, 90), (70, 50), (50, 90)))
    told = inside_bytes(op, (out, left, right))
    assert told == inside_bytes("aten::mm", (left, right))

    if op == "aten::addmm":
        found = bytes_beyond_results(lambda: torch.addmm(out, left, right))
    else:
        found = allocated_by(lambda: out.addmm_(left, right)).peak_bytes
    assert (found > 0) == (told > 0)


def test_16_bit_products_elsewhere_need_no_scratch_buffer() -> None:
    left, right = (torch.empty(sizes, dtype=torch.bfloat16, device="meta") for sizes in ((70, 50), (50, 90)))
    assert inside_bytes("aten::mm", (left, right)) == 0


@pytest.mark.parametrize(
    "num_heads, num_kv_heads, num_tokens, head_dim, expected",
    [
        # out 16 MiB, log-sum-exp 256 KiB, accumulator 32 MiB, row sums 256 KiB
        (32, 32, 2048, 128, 48 * 2**20 + 2 * 2**18),
        # and dk and dv of every query head, 16 MiB each
        (32, 8, 2048, 128, 80 * 2**20 + 2 * 2**18),
        # 130 tokens become 256, 80 columns become 96
        (1, 1, 130, 80, 130 * 80 * 2 + 4 * 130 + 4 * 256 * 97),
    ],
)
def test_flash_attention_backward_on_a_gpu_is_added_up_by_hand(
    num_heads: int, num_kv_heads: int, num_tokens: int, head_dim: int, expected: int
) -> None:
    q_BHTD, k_BKTD = (
        torch.empty(1, number, num_tokens, head_dim, dtype=torch.bfloat16, device="meta")
        for number in (num_heads, num_kv_heads)
    )
    args = (q_BHTD, q_BHTD, k_BKTD, k_BKTD, 1.0)
    assert inside_bytes("qlora_trainer::fused_attention_backward", args) == expected


@pytest.mark.parametrize(
    "num_heads, num_kv_heads, num_tokens, head_dim, expected",
    [
        # out 16 MiB, log-sum-exp and row sums 256 KiB each; 32 x 2 tiles of dq a head; of dk and dv 6 tiles x 2 each
        (32, 32, 2048, 128, 16 * 2**20 + 2**19 + 32 * (64 * 16400 + 2 * 6 * 2 * 2**14)),
        # and repeated keys and values, and dk and dv of every query head, 16 MiB each
        (32, 8, 2048, 128, 80 * 2**20 + 2**19 + 32 * (64 * 16400 + 2 * 6 * 2 * 2**14)),
        # one head needs no copy: its queries all read it
        (4, 1, 2048, 64, 3 * 2**20 + 2**16 + 4 * 32 * 16400),
        # 130 tokens become 160 for the log-sum-exp and 192 for tiles, 80 columns become 128; 3 splits of the keys
        (1, 1, 130, 80, 130 * 80 * 2 + 4 * 160 + 4 * 130 + 6 * 16400 + 2 * 3 * 2 * 2**14),
    ],
)
def test_memory_efficient_backward_on_a_gpu_is_added_up_by_hand(
    num_heads: int, num_kv_heads: int, num_tokens: int, head_dim: int, expected: int
) -> None:
    """What fp16 takes: cards before Ampere have no other kernel."""
    q_BHTD, k_BKTD = (
        torch.empty(1, number, num_tokens, head_dim, dtype=torch.float16, device="meta")
        for number in (num_heads, num_kv_heads)
    )
    args = (q_BHTD, q_BHTD, k_BKTD, k_BKTD, 1.0)
    assert inside_bytes("qlora_trainer::fused_attention_backward", args) == expected


@pytest.mark.parametrize("dtype, num_kv_heads, copies", [
    (torch.bfloat16, 8, 0),
    (torch.float16, 8, 2),  # keys and values for every query head
    (torch.float16, 32, 0),
    (torch.float16, 1, 0),
])  # fmt: skip
def test_attention_on_a_gpu_is_added_up_by_hand(dtype: torch.dtype, num_kv_heads: int, copies: int) -> None:
    q_BHTD, k_BKTD = (torch.empty(1, heads, 2048, 128, dtype=dtype, device="meta") for heads in (32, num_kv_heads))
    expected = copies * 16 * 2**20 + 2**18
    assert inside_bytes("qlora_trainer::fused_attention", (q_BHTD, k_BKTD, k_BKTD, 1.0)) == expected


def test_updates_elsewhere_are_done_by_one_kernel() -> None:
    gradient = torch.empty(1024, device="meta")
    assert inside_bytes("bitsandbytes::optimizer_update_32bit", ("adam", gradient)) == 0
    assert inside_bytes("bitsandbytes::optimizer_update_8bit_blockwise", ("adam", gradient)) == 0
    assert inside_bytes("bitsandbytes::quantize_4bit", (gradient,)) == 0

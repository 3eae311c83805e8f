"""Runs every kernel of `triton_rows` against the CPU's operation on the same numbers in fp32; a child of the tests.

    TRITON_INTERPRET=1 python -m tests.hardware.computed_rows cpu
    python -m tests.hardware.computed_rows cuda

Prints a JSON list: name, dtype and error of each result. The error is the largest over all elements, in the spacing of
the dtype's numbers there: one rounding to the nearest is 0.5 at most. Where terms cancel, what fp32 cannot know is left
out of account: 1e-6 of the largest element. Errors of fp32 results are norms, relative.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from qlora_trainer.hardware import triton_rows
from qlora_trainer.model import row_ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5
# Rows and their width: one, fewer and more than a program has, odd and even, a whole block and a part of one.
NORMS = ((1, 1), (5, 67), (70, 64), (3, 576), (2, 4096))
HEADS = ((5, 3, 16), (4, 9, 64), (2, 33, 128), (3, 1, 6))
GATED = ((1, 1), (5, 67), (3, 1024), (1, 1025))


def drawn(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape).to(dtype).to(device)


def on_cpu(tensor: Tensor) -> Tensor:
    """A copy, in fp32."""
    return tensor.to("cpu", torch.float32, copy=True)


class Surrounded:
    """A tensor inside a wider one, as a view by rows; `untouched` says whether what is around it stayed what it was."""

    def __init__(self, inner: Tensor) -> None:
        rows, columns = inner.shape
        self.outer = torch.full((rows + 1, columns + 16), 7.0, dtype=inner.dtype, device=inner.device)
        self.tensor = self.outer[:rows, 16:]
        self.tensor.copy_(inner)

    def is_untouched(self) -> bool:
        around = self.outer.clone()
        around[:-1, 16:] = 7.0
        return bool((around == 7.0).all())


def results(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, what the kernel found, and what was expected, in fp32 and not rounded."""
    for rows, width in NORMS:
        for offset in (0.0, 1.0):
            yield from _norms(rows, width, offset, dtype, device)
    for heads in HEADS:
        yield from _rotations(heads, dtype, device)
    for shape in GATED:
        for activation in (row_ops.SILU, row_ops.GELU, row_ops.GELU_TANH):
            yield from _activations(shape, activation, dtype, device)


def _norms(
    rows: int, width: int, offset: float, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor, Tensor]]:
    name = f"[{rows}, {width}] + {offset}"
    x, grad, added = (drawn(rows, width, dtype=dtype, device=device) for _ in range(3))
    weight = drawn(width, dtype=dtype, device=device)
    expected, expected_inverse = row_ops.rms_norm(on_cpu(x), on_cpu(weight), EPS, offset)
    for form, given in (("whole", x), ("view", Surrounded(x).tensor), ("columns", x.t().contiguous().t())):
        out, inverse = torch.empty_like(x), torch.empty(rows, 1, device=device)
        triton_rows.rms_norm(out, inverse, given, weight, EPS, offset)
        yield f"rms_norm {name} {form}", out, expected
        yield f"rms_norm's inverse {name} {form}", inverse, expected_inverse
        again = torch.empty_like(x)
        triton_rows.rms_norm_again(again, given, inverse, weight, offset)
        yield f"rms_norm_again {name} {form}", again, expected
    constant = drawn(1, 1, dtype=dtype, device=device).expand(rows, width)  # a gradient of a sum
    for form, residual in (("alone", None), ("added", added), ("constant", constant)):
        inside = Surrounded(grad)
        triton_rows.rms_norm_backward(inside.tensor, x, expected_inverse.to(device), residual, weight, offset)
        wanted = on_cpu(grad)
        row_ops.rms_norm_backward_(
            wanted, on_cpu(x), expected_inverse, on_cpu(weight), offset, None if residual is None else on_cpu(residual)
        )  # fmt: skip
        assert inside.is_untouched()
        yield f"rms_norm_backward {name} {form}", inside.tensor, wanted


def _rotations(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor, Tensor]]:
    tokens, heads, head_dim = shape
    angles = torch.randn(tokens, head_dim // 2).repeat(1, 2)
    cos, sin = (table.to(dtype).to(device) for table in (angles.cos(), angles.sin()))
    for sign, is_back in ((1.0, False), (-1.0, True)):
        x = drawn(*shape, dtype=dtype, device=device)
        wanted = on_cpu(x)
        row_ops.rotate_(wanted, on_cpu(cos), on_cpu(sin), is_back)
        inside = Surrounded(x.flatten(1))
        triton_rows.rotate(inside.tensor.unflatten(1, (heads, head_dim)), cos, sin, sign)
        assert inside.is_untouched()
        yield f"rotate {shape} {sign} view", inside.tensor, wanted.flatten(1)
        by_head = x.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)  # far apart
        triton_rows.rotate(by_head, cos, Surrounded(sin).tensor, sign)
        yield f"rotate {shape} {sign} by head", by_head, wanted
        triton_rows.rotate(x, cos, sin, sign)
        yield f"rotate {shape} {sign} whole", x, wanted


def _activations(
    shape: tuple[int, int], activation: str, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor, Tensor]]:
    grad, gate, up = (drawn(*shape, dtype=dtype, device=device) for _ in range(3))
    gate *= 4.0  # into the tails
    expected = row_ops.gated(on_cpu(gate), on_cpu(up), activation)
    out = torch.empty_like(gate)
    triton_rows.gated(out, gate, Surrounded(up).tensor, activation)
    yield f"gated {shape} {activation}", out, expected
    wanted = [on_cpu(tensor) for tensor in (grad, gate, up)]
    row_ops.gated_backward_(wanted[0], wanted[1], wanted[2], activation)
    triton_rows.gated_backward(grad, gate, up, activation)
    for name, found, right in zip(("grad", "gate", "up"), (grad, gate, up), wanted, strict=True):
        yield f"gated_backward's {name} {shape} {activation}", found, right


def error(found: Tensor, expected: Tensor) -> float:
    difference = (found.cpu().double() - expected.double()).abs()
    if found.dtype == torch.float32:
        return float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(expected.double()))
    info = torch.finfo(found.dtype)
    spacing = info.eps * torch.exp2(expected.double().abs().clamp(min=info.tiny).log2().floor())
    return float(((difference - 1e-6 * expected.abs().max()) / spacing).max())


def main() -> None:
    device = torch.device(sys.argv[1])
    torch.manual_seed(0)
    print(
        json.dumps(
            [
                {"name": name, "dtype": str(found.dtype), "error": error(found, expected)}
                for dtype in DTYPES
                for name, found, expected in results(dtype, device)
            ]
        )
    )


if __name__ == "__main__":
    main()

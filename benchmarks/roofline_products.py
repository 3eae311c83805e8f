"""The matrix products of a step: written down while a real one runs, then made again by themselves.

Products inside our own operations are seen too: their Python code is run in place of the operation. Attention's are
not, where a fused kernel makes them: that kernel is no GEMM.

Legend: M rows and N columns of the result, K what is summed over.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_trainer.planning.inside import _BODIES as BODIES

Kind = Literal["fresh", "added", "in place"]
# Positions of the tensor that is added, if any, and of the left factor; the right one follows.
_FORMS: dict[str, tuple[Kind, int | None, int]] = {
    "aten::mm": ("fresh", None, 0),
    "aten::bmm": ("fresh", None, 0),
    "aten::addmm": ("added", 0, 1),
    "aten::baddbmm": ("added", 0, 1),
    "aten::addmm_": ("in place", 0, 1),
    "aten::baddbmm_": ("in place", 0, 1),
}
# Products without a form here: to be counted as none, they must not occur.
_PRODUCT = re.compile(r"mm(_|$)|mv(_|$)|::(v?dot|linear|matmul|einsum|addr|ger)$|mkldnn|convolution")
POOL_BYTES = 64 * 2**20  # of one kind of product; all kinds together are far more than a cache
_TUNING_SECONDS, _TUNING_CALLS = 0.15, 20


@dataclass(frozen=True, slots=True)
class Looks:
    """A matrix, of which nothing is kept alive."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Looks:
        return cls(tuple(tensor.shape), tuple(tensor.stride()))

    @property
    def num_elements(self) -> int:
        """Of the memory that it spans."""
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    def make(self, dtype: torch.dtype) -> Tensor:
        """A tensor that looks so, of small random numbers."""
        storage = torch.empty(self.num_elements, dtype=dtype).uniform_(-0.01, 0.01)
        return storage.as_strided(self.shape, self.stride)


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix product, its tensors by their looks.

    Attributes:
        kind: a new tensor; a new tensor to which another one is added; or added to what is there.
        left, right: factors, with a batch in front or without.
        out: the result.
        added: what is added to a new tensor, such as a bias.
        dtype: of the factors.
    """

    kind: Kind
    left: Looks
    right: Looks
    out: Looks
    added: Looks | None
    dtype: str

    @property
    def flops(self) -> int:
        """Two a multiply-add."""
        *batch, rows, inner = self.left.shape
        return 2 * (batch[0] if batch else 1) * rows * inner * self.right.shape[-1]

    @property
    def name(self) -> str:
        """`M x K x N`, factors that are transposed with a T, `+=` where it adds to what is there."""
        *batch, rows, inner = self.left.shape
        transposed = ["T" if looks.stride[-1] != 1 and looks.shape[-1] > 1 else "" for looks in (self.left, self.right)]
        size = f"{rows} x {inner}{transposed[0]} x {self.right.shape[-1]}{transposed[1]}"
        return f"{f'{batch[0]} x ' if batch else ''}{size}{' +=' if self.kind == 'in place' else ''}"


class ProductRecorder(TorchDispatchMode):
    """Notes every matrix product while it is active.

    Attributes:
        products: in order.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: list[Product] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, options = func._schema.name, dict(kwargs or {})
        body = BODIES.get(name)
        if body is not None:
            with self:
                return body(*args, **options)
        out = func(*args, **options)
        if name in _FORMS:
            self._note(name, args, options, out)
        elif _PRODUCT.search(name):
            raise RuntimeError(f"{name}: a product that is not written down")
        return out

    def _note(self, name: str, args: Sequence[Any], options: Mapping[str, Any], out: Tensor) -> None:
        kind, place_of_added, place = _FORMS[name]
        left, right = args[place], args[place + 1]
        is_added_to = kind != "fresh" and options.get("beta", 1) != 0
        added = (
            Looks.of(args[place_of_added]) if kind == "added" and is_added_to and place_of_added is not None else None
        )
        self.products.append(
            Product(
                kind=kind if is_added_to else "fresh",
                left=Looks.of(left),
                right=Looks.of(right),
                out=Looks.of(out),
                added=added,
                dtype=str(left.dtype).removeprefix("torch."),
            )
        )


def num_flops(products: Sequence[Product]) -> int:
    """Of all of them."""
    return sum(product.flops for product in products)


class Replay:
    """Makes products again, in order, on tensors of one dtype that are there already.

    Each kind of product has as many sets of tensors as `pool_bytes` hold, no more than it occurs, and takes them in
    turn: what a product reads has left the caches since, as other kinds have used theirs in between.

    Args:
        products: in order.
        dtype: of all tensors.
        pool_bytes: see above.

    Attributes:
        seconds_of: product -> the least seconds that it took by itself, on tensors that were in the caches.
    """

    def __init__(self, products: Sequence[Product], dtype: torch.dtype, *, pool_bytes: int = POOL_BYTES) -> None:
        counts = Counter(map(in_any_dtype, products))
        self.seconds_of: dict[Product, float] = {}
        pools: dict[Product, list[Callable[[], object]]] = {}
        for product, count in counts.items():
            set_bytes = dtype.itemsize * sum(looks.num_elements for looks in _tensors_of(product))
            sets = [_make(product, dtype) for _ in range(max(1, min(count, pool_bytes // set_bytes)))]
            fastest, self.seconds_of[product] = _fastest(product, sets[0])
            pools[product] = [fastest(product, *made) for made in sets]
        self._calls: list[Callable[[], object]] = []
        taken: Counter[Product] = Counter()
        for product in map(in_any_dtype, products):
            pool = pools[product]
            self._calls.append(pool[taken[product] % len(pool)])
            taken[product] += 1

    def run(self) -> float:
        """Make all of them; returns the seconds it took."""
        start = time.perf_counter()
        for call in self._calls:
            call()
        return time.perf_counter() - start


def in_any_dtype(product: Product) -> Product:
    """The same for every dtype that it was made in."""
    return replace(product, dtype="")


def _tensors_of(product: Product) -> list[Looks]:
    return [looks for looks in (product.left, product.right, product.out, product.added) if looks is not None]


def _make(product: Product, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    left, right, out = (looks.make(dtype) for looks in (product.left, product.right, product.out))
    return left, right, out, None if product.added is None else product.added.make(dtype)


def _direct(product: Product, left: Tensor, right: Tensor, out: Tensor, added: Tensor | None) -> Callable[[], object]:
    is_batched = len(product.left.shape) == 3
    if product.kind == "in place":
        return partial(out.baddbmm_ if is_batched else out.addmm_, left, right)
    if product.kind == "added":
        assert added is not None
        return partial(torch.baddbmm if is_batched else torch.addmm, added, left, right, out=out)
    return partial(torch.bmm if is_batched else torch.mm, left, right, out=out)


def _as_linear(
    product: Product, left: Tensor, right: Tensor, out: Tensor, added: Tensor | None
) -> Callable[[], object]:
    """As `torch.nn.functional.linear`, which may take another kernel; its result is made anew."""
    return partial(torch.nn.functional.linear, left, right.t(), added)


def _fastest(product: Product, made: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> tuple[Any, float]:
    ways = [_direct]
    is_bias = product.added is None or len(product.added.shape) == 1
    if product.kind != "in place" and len(product.left.shape) == 2 and product.right.stride[0] == 1 and is_bias:
        ways.append(_as_linear)
    timed = [(_least_seconds(way(product, *made)), way) for way in ways]
    seconds, fastest = min(timed, key=lambda pair: pair[0])
    return fastest, seconds


def _least_seconds(call: Callable[[], object]) -> float:
    call()  # oneDNN makes its kernel
    least, begun = float("inf"), time.perf_counter()
    for _ in range(_TUNING_CALLS):
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        least = min(least, end - start)
        if end - begun > _TUNING_SECONDS:
            break
    return least

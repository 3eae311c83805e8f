"""Counts the storages that are alive while something runs, on real or on fake tensors.

Every operation's new storages are noted when they are made and when they are dropped, with what they are for: a list of
events, from which the live bytes at any moment follow. Views cost nothing, a storage is counted once, and what a kernel
allocates inside itself is asked for (`hardware.kernel_workspace`, or the op's own Python code run in a tracker of its
own). Source of the idea: torch's FakeTensorMode and TorchDispatchMode, see `../docs/design.md`.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_trainer.planning.fake_results import FakeResults

CATEGORIES = (
    "base",
    "quant_state",
    "embedding",
    "adapter",
    "gradient",
    "optimizer",
    "saved_activation",
    "recompute",
    "logits",
    "dequant_workspace",
    "other",
)
# What an operation's result is for, where the operation tells.
_DEVICE_OF = torch.ops.prim.device.default
_CATEGORY_OF_OP = {
    "bitsandbytes::dequantize_4bit": "dequant_workspace",
    "bitsandbytes::dequantize_blockwise": "dequant_workspace",
    "qlora_trainer::chunked_cross_entropy": "logits",
}

InsideBytes = Callable[[str, tuple[Any, ...]], int | None]


@dataclass(frozen=True, slots=True)
class _Traits:
    """What a tracker needs to know of an operation.

    Attributes:
        may_alias: its results may be views of its arguments, or the arguments themselves.
        is_view: it only looks at a storage in another way.
        category: what its results are for, an index of `CATEGORIES`; None where it does not tell.
    """

    name: str
    may_alias: bool
    is_view: bool
    category: int | None


@functools.cache
def _traits(func: Any) -> _Traits:
    schema = func._schema
    category = _CATEGORY_OF_OP.get(schema.name)
    return _Traits(
        name=schema.name,
        may_alias=any(result.alias_info is not None for result in schema.returns),
        is_view=bool(func.is_view),
        category=None if category is None else CATEGORIES.index(category),
    )


@dataclass(slots=True)
class Events:
    """Allocations (+) and releases (-), in order, as parallel lists.

    Attributes:
        num_bytes: as the storage asked for them; the device's rounding comes later.
        allocation: index of the event that made the storage; its own index for an allocation.
        category: of the storage, an index of `CATEGORIES`; only meaningful at allocations.
        is_device: on the tracked device, not on the host.
        marks: (index of the next event, label): where a new part of the work begins.
    """

    num_bytes: list[int] = field(default_factory=list)
    allocation: list[int] = field(default_factory=list)
    category: list[int] = field(default_factory=list)
    is_device: list[bool] = field(default_factory=list)
    marks: list[tuple[int, Any]] = field(default_factory=list)

    def bytes_between(self, made: Any, dropped: Any) -> int:
        """Of the storages made in the part marked `made`, those that are dropped in the part marked `dropped`."""
        starts = [start for start, _ in self.marks] + [len(self.num_bytes)]
        part_of = {label: range(start, end) for (start, label), end in zip(self.marks, starts[1:], strict=True)}
        return -sum(
            self.num_bytes[index]
            for index in part_of[dropped]
            if self.num_bytes[index] < 0 and self.allocation[index] in part_of[made]
        )


@dataclass(frozen=True, slots=True)
class Inside:
    """A pair of events (at `index` and the next) that stand for what a kernel allocates inside itself."""

    index: int
    op: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """One operation that computes: a matrix product (`flops`) or anything else (`moved_bytes`: read and written)."""

    index: int
    op: str
    flops: int
    moved: tuple[int, ...]


def _is_storage_of(result: Tensor, arguments: Iterable[Any]) -> bool:
    key = result.untyped_storage()._cdata
    return any(isinstance(value, Tensor) and value.untyped_storage()._cdata == key for value in arguments)


class StorageTracker(TorchDispatchMode):
    """Notes every storage that is made and dropped while it is active.

    Args:
        device_type: storages elsewhere are host memory; None counts every storage as the device's.
        alignment_bytes: what the device's allocator rounds a size up to.
        inside: bytes that an operation allocates inside itself, of (its name, its arguments); None where it does not.
        record_work: also note what is computed.
        results: asked for what operations return, on fake tensors; None asks the operations.
    """

    def __init__(
        self,
        *,
        device_type: str | None = None,
        alignment_bytes: int = 1,
        inside: InsideBytes | None = None,
        record_work: bool = False,
        results: FakeResults | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events = Events()
        self.insides: list[Inside] = []
        self.work: list[Work] = []
        self.live_bytes = self.peak_bytes = 0
        self._device_type = device_type
        self._alignment_bytes = alignment_bytes
        self._inside = inside
        self._record_work = record_work
        self._results = results
        self._alive: dict[int, int] = {}
        self._default_category = CATEGORIES.index("other")

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No wrapper around every operation: nothing is compiled under a tracker, and it doubles the tracker's time."""
        return False

    def mark(self, label: Any) -> None:
        """A new part of the work begins here."""
        self.events.marks.append((len(self.events.num_bytes), label))

    @contextmanager
    def as_category(self, category: str) -> Iterator[None]:
        """What is allocated inside is for `category`, unless its operation says otherwise."""
        before, self._default_category = self._default_category, CATEGORIES.index(category)
        try:
            yield
        finally:
            self._default_category = before

    def tag(self, tensors: Iterable[Tensor | None], category: str) -> None:
        """Say what storages that are alive already are for."""
        number = CATEGORIES.index(category)
        for tensor in tensors:
            if tensor is not None:
                self.events.category[self._alive[tensor.untyped_storage()._cdata]] = number

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak_bytes = self.live_bytes

    def live_by_category(self) -> dict[str, int]:
        """Rounded bytes alive now on the device, by what they are for."""
        found = dict.fromkeys(CATEGORIES, 0)
        for index in self._alive.values():
            if self.events.is_device[index]:
                found[CATEGORIES[self.events.category[index]]] += self._rounded(self.events.num_bytes[index])
        return found

    def live_sizes(self) -> dict[str, list[int]]:
        """Unrounded sizes of the storages alive now on the device, by what they are for."""
        found: dict[str, list[int]] = {}
        for index in self._alive.values():
            if self.events.is_device[index]:
                category = CATEGORIES[self.events.category[index]]
                found.setdefault(category, []).append(self.events.num_bytes[index])
        return found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE_OF:  # half of all that is dispatched
            return args[0].device
        kwargs = kwargs or {}
        out = func(*args, **kwargs) if self._results is None else self._results.of(func, args, kwargs)
        traits = _traits(func)
        results = (out,) if isinstance(out, Tensor) else out if isinstance(out, tuple | list) else ()
        number = self._default_category if traits.category is None else traits.category
        for result in results:
            if not isinstance(result, Tensor):
                continue
            if not (traits.may_alias and _is_storage_of(result, (*args, *kwargs.values()))):  # `out=` is a keyword
                self._add(result, number)
        if self._record_work and not traits.is_view:
            self._note_work(traits.name, args, results)
        if self._inside is not None:
            inside_bytes = self._inside(traits.name, args)
            if inside_bytes is not None:
                self._add_inside(traits.name, args, inside_bytes)
        return out

    def _add(self, tensor: Tensor, category: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        events, index = self.events, len(self.events.num_bytes)
        num_bytes = storage.nbytes()
        is_device = self._device_type is None or tensor.device.type == self._device_type
        events.num_bytes.append(num_bytes)
        events.allocation.append(index)
        events.category.append(category)
        events.is_device.append(is_device)
        self._alive[key] = index
        if is_device:
            self.live_bytes += self._rounded(num_bytes)
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._drop, key).atexit = False

    def _drop(self, key: int) -> None:
        events, allocation = self.events, self._alive.pop(key)
        num_bytes = events.num_bytes[allocation]
        events.num_bytes.append(-num_bytes)
        events.allocation.append(allocation)
        events.category.append(events.category[allocation])
        events.is_device.append(events.is_device[allocation])
        if events.is_device[allocation]:
            self.live_bytes -= self._rounded(num_bytes)

    def _add_inside(self, name: str, args: tuple[Any, ...], inside_bytes: int) -> None:
        events, index = self.events, len(self.events.num_bytes)
        category = CATEGORIES.index(_CATEGORY_OF_OP.get(name, "other"))
        self.insides.append(Inside(index, name, args_spec(args)))
        first = next((value for value in args if isinstance(value, Tensor)), None)
        is_device = first is None or self._device_type in (None, first.device.type)
        for signed in (inside_bytes, -inside_bytes):
            events.num_bytes.append(signed)
            events.allocation.append(index)
            events.category.append(category)
            events.is_device.append(is_device)
        if is_device:
            self.peak_bytes = max(self.peak_bytes, self.live_bytes + self._rounded(inside_bytes))

    def _rounded(self, num_bytes: int) -> int:
        return -(-num_bytes // self._alignment_bytes) * self._alignment_bytes

    def _note_work(self, name: str, args: tuple[Any, ...], results: Iterable[Any]) -> None:
        tensors = [value for value in itertools.chain(args, results) if isinstance(value, Tensor)]
        moved = tuple(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.work.append(Work(len(self.events.num_bytes), name, product_flops(name, args), moved))


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor argument looked like; the tensor itself must not be kept alive."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def args_spec(args: Iterable[Any]) -> tuple[Any, ...]:
    """Arguments, tensors replaced by their `TensorSpec` and lists by tuples: hashable, and nothing is kept alive."""
    return tuple(
        TensorSpec(tuple(value.shape), value.dtype, value.device)
        if isinstance(value, Tensor)
        else tuple(value)
        if isinstance(value, list)
        else value
        for value in args
    )


def product_flops(name: str, args: tuple[Any, ...]) -> int:
    """Floating-point operations of a matrix product (2 a multiply-add); 0 for anything else."""
    match name:
        case "aten::mm" | "aten::bmm":
            left, right = args[0], args[1]
        case "aten::addmm" | "aten::addmm_" | "aten::baddbmm":
            left, right = args[1], args[2]
        case "qlora_trainer::attention_in_parts_backward_":  # the output projection's part of it, without its adapter's
            left, right = args[5], args[6]
        case _:
            return 0
    return 2 * int(left.numel()) * int(right.shape[-1])

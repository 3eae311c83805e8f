"""Writes down what a step does on a device that has no kernels: each operation, its cost and where it came from.

An operation of our own is one entry for torch; its Python code is run afterwards, on fake tensors in a ledger of its
own (as `planning/inside.py` does for memory), so that nothing is hidden in it. What asks for a value gets an answer,
and is written down as a wait: on a GPU the host would stop there until the device is done.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks.step_operations import KERNELS, CannotCountError, Operation, bind, operation_of, touched_bytes
from qlora_trainer.hardware import causal_attention
from qlora_trainer.hardware.quant_library import bitsandbytes
from qlora_trainer.planning import inside

PHASES = ("forward", "recompute", "backward", "outside")
FUSED_4BIT_MOST_ROWS = 1536  # bitsandbytes/backends/cuda/ops.py, _gemm_4bit_custom_max_m
_aten = torch.ops.aten
_TORCH = "torch"  # the place of what comes from no Python code
_NOT_THE_CAUSE = (str(torch.__path__[0]), __file__)
_ENGINE = torch.autograd.graph._engine_run_backward.__code__
_CHECKPOINT = torch.utils.checkpoint.__file__
_IN_PLACE = {_aten.index_put_.default, _aten._index_put_impl_.default}
# Their results' sizes are values: on a GPU the host waits for them. Here every element is chosen.
_CHOOSING = {
    _aten.index.Tensor,
    *_IN_PLACE,
    _aten.masked_select.default,
    _aten.masked_scatter_backward.default,
    _aten.nonzero.default,
}


# torch takes these apart where a device has no kernel for them, and a GPU has one (native_functions.yaml).
_KERNELS_OF_A_GPU = ("silu_backward", "mish_backward")


def _no_kernel(*args: Any, **kwargs: Any) -> Tensor:
    raise RuntimeError("only fake tensors are on this device")


def _gemm_4bit(A: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """bitsandbytes' `gemm_4bit` on a GPU, for many rows; few are multiplied by a kernel that unpacks as it goes."""
    if A.numel() // A.shape[-1] <= FUSED_4BIT_MOST_ROWS:
        raise CannotCountError(f"bitsandbytes::gemm_4bit of {FUSED_4BIT_MOST_ROWS} rows or fewer is a fused kernel")
    product: Tensor = bitsandbytes.backends.default.ops._gemm_4bit_default_impl(A, *args, **kwargs)
    return product


_BODIES: dict[str, Callable[..., Any]] = {
    **inside._BODIES,
    "qlora_trainer::fused_attention": causal_attention.fused_attention._init_fn,
    "qlora_trainer::fused_attention_backward": causal_attention.fused_attention_backward._init_fn,
    "bitsandbytes::gemm_4bit": _gemm_4bit,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One operation of a step.

    Attributes:
        operation: what it costs.
        phase: one of `PHASES`; "outside" of forward and backward are the batch, the update and the bookkeeping.
        place: the function it came from; in a backward, the one whose gradient it is.
    """

    operation: Operation
    phase: str
    place: str


@dataclass(frozen=True, slots=True)
class _Looks:
    """A tensor argument, of which nothing is kept alive."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of an operation with a body, to be run later."""

    name: str
    arguments: tuple[tuple[str, Any], ...]


class Ledger(TorchDispatchMode):
    """Notes operations on `device_type`; entered after the fake mode.

    Attributes:
        is_open: whether anything is written.
        is_outside: whether what comes is outside of forward and backward.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_open, self.is_outside = True, True
        self._device_type = device_type
        self._written: list[tuple[Operation | _Call, str, str]] = []
        self._places: dict[int, str] = {}
        self._not_finite = WeakIdKeyDictionary()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __enter__(self) -> Ledger:
        self._kernels = torch.library.Library("aten", "IMPL")
        for name in _KERNELS_OF_A_GPU:
            self._kernels.impl(name, _no_kernel, "PrivateUse1")
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._kernels._destroy()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func.namespace in ("prim", "profiler"):
            return func(*args, **options)
        if func is _aten._local_scalar_dense.default:
            return self._answer(args[0])
        arguments = bind(func, args, options)
        if func in _CHOOSING and (chosen := self._choose(func, arguments)) is not None:
            return chosen
        out = func(*args, **options)
        if func._schema.name in ("aten::isnan", "aten::isinf"):
            self._not_finite[out] = True
        results = [] if out is None else [out] if len(func._schema.returns) == 1 else list(out)
        if func._schema.name in _BODIES and func._schema.name not in KERNELS:
            self.write(_Call(func._schema.name, tuple((key, _looks(value)) for key, value in arguments.items())))
        else:
            self.write(operation_of(func, arguments, results, self._device_type))
        return out

    def entries(self) -> Iterator[Entry]:
        """All that was written, our own operations taken apart; to be called outside of every mode."""
        for what, phase, place in self._written:
            if isinstance(what, _Call):
                for entry in _inner_entries(what, self._device_type):
                    yield Entry(entry.operation, phase, f"{place} > {entry.place}")
            else:
                yield Entry(what, phase, place)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """What comes meanwhile is forward and backward."""
        self.is_outside = False
        try:
            yield
        finally:
            self.is_outside = True

    def write(self, what: Operation | _Call) -> None:
        """Note an operation; also one that torch does not see, such as a stand-in for somebody's kernel."""
        if not self.is_open:
            return
        place, is_recomputed = _cause(sys._getframe(1))
        if torch._C._current_graph_task_id() == -1:  # autograd is not running
            phase = "outside" if self.is_outside else "forward"
            # The node that this operation belongs to was made just before it, if it has one.
            self._places.setdefault(torch._C._autograd._get_sequence_nr() - 1, place)
        elif is_recomputed:
            phase = "recompute"
        else:
            phase = "backward"
            node = torch._C._current_autograd_node()
            if place == _TORCH and node is not None:
                is_torchs = node.name()[-1].isdigit()  # "MulBackward0"; others are functions, told by their names
                place = self._places.get(node._sequence_nr(), node.name()) if is_torchs else node.name()
        if isinstance(what, _Call) or what.kind != "nothing":
            self._written.append((what, phase, place))

    def _answer(self, tensor: Tensor) -> bool | int:
        """True or 1, and False where it is asked for NaN or infinity."""
        if tensor.device.type == self._device_type:
            self.write(_wait("aten::_local_scalar_dense", tensor.element_size()))
        if tensor in self._not_finite:
            return False
        return True if tensor.dtype == torch.bool else 1

    def _choose(self, func: Any, arguments: Mapping[str, Any]) -> Any:
        """What a mask chooses, all of it; None where no mask chooses. A mask is turned into places first."""
        mask = _mask_of(func, arguments)
        if mask is None:
            return None
        source: Tensor = arguments["self"] if "self" in arguments else arguments["grad_output"]
        if func in _IN_PLACE:
            out = source
        elif func is _aten.nonzero.default:
            out = source.new_empty((mask.numel(), mask.ndim), dtype=torch.int64)
        else:
            out = source.new_empty(arguments.get("sizes", (mask.numel(), *source.shape[mask.ndim :])))
        if mask.device.type == self._device_type:
            self.write(_wait("aten::nonzero", 8))
            self.write(Operation("aten::nonzero", "other", 0, touched_bytes(mask) + 8 * mask.ndim * mask.numel(), 1))
            if func is not _aten.nonzero.default:
                self.write(Operation(func._schema.name, "other", 0, 2 * touched_bytes(out), 1))
        return out


def _mask_of(func: Any, arguments: Mapping[str, Any]) -> Tensor | None:
    if func is _aten.nonzero.default:
        return arguments["self"]  # type: ignore[no-any-return]
    if "indices" not in arguments:
        return arguments["mask"]  # type: ignore[no-any-return]
    first = next((index for index in arguments["indices"] if index is not None), None)
    return first if first is not None and first.dtype in (torch.bool, torch.uint8) else None


def _wait(name: str, num_bytes: int) -> Operation:
    return Operation(name, "other", moved_bytes=num_bytes, copied_to="host", waits=True)


def _cause(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost function that is none of torch's, and whether a layer is being recomputed."""
    place, is_recomputed = "", False
    while frame is not None and frame.f_code is not _ENGINE:  # who asked for gradients is no cause of their work
        name = frame.f_code.co_filename
        if not place and not name.startswith(_NOT_THE_CAUSE):
            place = frame.f_code.co_qualname.replace("<locals>.", "")
        is_recomputed = is_recomputed or name == _CHECKPOINT
        frame = frame.f_back
    return place or _TORCH, is_recomputed


def _looks(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Looks(tuple(value.shape), value.stride(), value.dtype, value.device)
    return tuple(_looks(item) for item in value) if isinstance(value, list | tuple) else value


def _made(value: Any) -> Any:
    if isinstance(value, _Looks):
        return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=value.device)
    return [_made(item) for item in value] if isinstance(value, tuple) else value


@functools.lru_cache(maxsize=4096)
def _inner_entries(call: _Call, device_type: str) -> tuple[Entry, ...]:
    ledger = Ledger(device_type)
    with FakeTensorMode(), torch.no_grad(), fused_attention_of(causal_attention):
        arguments = {name: _made(value) for name, value in call.arguments}
        with ledger:
            _BODIES[call.name](**arguments)
    return tuple(ledger.entries())


@contextmanager
def fused_attention_of(module: Any) -> Iterator[None]:
    """In `module`, torch's attention is the kernel it has on a GPU; a device without kernels has none."""
    with mock.patch.object(module, "scaled_dot_product_attention", _flash_attention):
        yield


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None:
        raise CannotCountError("attention with a mask has no fused kernel here")
    out: Tensor = _aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    return out

"""Stand-ins for the peer's GPU kernels: they allocate what the kernels allocate, and compute nothing.

Imports torch and nothing else of ours but the tracker, so that it also runs in the peer's own virtual environment.
Three things cannot run on fake tensors and are replaced: bitsandbytes' C library, Triton kernels, and FlashAttention's
CUDA extension. The Python code around the first two is the peer's own, so what is allocated and saved is its doing. The
device is "cpu" under another name (fake CUDA tensors cannot run a backward without a GPU): what asks for "cuda" gets
"cpu", and where torch allocates differently on the two (dropout), the CUDA way is called by name.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_trainer.planning.tracker import StorageTracker, Work

KERNEL = "peer::kernel"  # the name under which a replaced kernel's work is noted
ATTENTION = "peer::attention"
_active: list[StorageTracker] = []


@contextlib.contextmanager
def noting_work(tracker: StorageTracker) -> Iterator[None]:
    """What the stand-ins would have computed is added to `tracker.work`."""
    _active.append(tracker)
    try:
        yield
    finally:
        _active.pop()


def note_work(tensors: Iterable[Any], *, flops: int = 0, op: str = KERNEL) -> None:
    """One kernel that reads or writes each of `tensors` once."""
    if _active:
        moved = tuple(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))
        _active[-1].work.append(Work(len(_active[-1].events.num_bytes), op, flops, moved))


class CudaAsCpu(TorchDispatchMode):
    """What is to be made on "cuda" is made on "cpu", and a value that is asked for is `True` or 1.

    The peer asks: are the positions of a row ascending, how many labels are there in a chunk, is the gradient of the
    loss something else than 1 (then a kernel scales in place). Memory hangs on the first only, and they do ascend.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1
        wanted = dict(kwargs or {})
        device = wanted.get("device")
        if device is not None and torch.device(device).type == "cuda":
            wanted["device"] = torch.device("cpu")
        return func(*args, **wanted)


@contextlib.contextmanager
def cuda_dropout() -> Iterator[None]:
    """Dropout as on CUDA: a mask of one byte an element is saved. The CPU's saves one of the input's dtype."""
    functional: Any = torch.nn.functional
    stock = functional.dropout

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0 or inplace:
            return stock(x, p, training, inplace)  # type: ignore[no-any-return]
        return torch.ops.aten.native_dropout(x, p, True)[0]  # type: ignore[no-any-return]

    functional.dropout = dropout
    try:
        yield
    finally:
        functional.dropout = stock


@contextlib.contextmanager
def module_conversion() -> Iterator[None]:
    """`Module.to` for fake parameters, in place as for real ones (tied ones stay tied); torch's own swaps and fails."""
    stock = torch.nn.Module._apply

    def convert(module: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for child in module.children() if recurse else ():
            child._apply(fn)
        for parameter in module._parameters.values():
            if parameter is not None:
                with torch.no_grad():
                    parameter.data = fn(parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fn(buffer)
        return module

    torch.nn.Module._apply = convert  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module._apply = stock  # type: ignore[method-assign]


@contextlib.contextmanager
def cuda_autocast_flag(dtype: torch.dtype) -> Iterator[None]:
    """Code that asks whether CUDA's autocast is on hears yes; the casting itself is done by the CPU's autocast."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


class FlashAttention(torch.autograd.Function):
    """FlashAttention 2.6's memory (github.com/Dao-AILab/flash-attention, csrc/flash_attn/flash_api.cpp).

    Legend: B batch, T time, H heads, K key/value heads, D head size. Saved: q, k, v, the output and its log-sum-exp in
    fp32 [B, H, T]. `mha_bwd` allocates besides the three gradients a row sum in fp32 [B, H, T'], an accumulator of
    dq in fp32 [B, T', H, D'], and, with fewer key/value heads than heads, dk and dv for all heads; T' is T rounded to
    128, D' is D rounded to 32.
    """

    @staticmethod
    def forward(ctx: Any, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Tensor:
        q_BTHD, k_BTKD, v_BTKD = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BTHD, k_BTKD, v_BTKD))
        out_BTHD = torch.empty(q_BTHD.shape, dtype=q_BTHD.dtype, device=q_BTHD.device)
        batch, time, heads, _ = q_BTHD.shape
        lse_BHT = torch.empty((batch, heads, time), dtype=torch.float32, device=q_BTHD.device)
        ctx.save_for_backward(q_BTHD, k_BTKD, v_BTKD, out_BTHD, lse_BHT)
        _note_attention(q_BTHD, (q_BTHD, k_BTKD, v_BTKD, out_BTHD), num_products=2)
        return out_BTHD

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, Tensor]:
        q_BTHD, k_BTKD, v_BTKD, out_BTHD, _ = ctx.saved_tensors
        (dout_BTHD,) = grads
        dout_BTHD = dout_BTHD if dout_BTHD.stride(-1) == 1 else dout_BTHD.contiguous()
        like = {"dtype": q_BTHD.dtype, "device": q_BTHD.device}
        dq, dk, dv = (torch.empty(x.shape, **like) for x in (q_BTHD, k_BTKD, v_BTKD))
        batch, time, heads, size = q_BTHD.shape
        time_up, size_up = -(-time // 128) * 128, -(-size // 32) * 32
        rows = torch.empty((batch, heads, time_up), dtype=torch.float32, device=q_BTHD.device)
        dq_sum = torch.empty((batch, time_up, heads, size_up), dtype=torch.float32, device=q_BTHD.device)
        expanded = []
        if k_BTKD.shape[2] != heads:
            expanded = [torch.empty((batch, k_BTKD.shape[1], heads, size), **like) for _ in range(2)]
        _note_attention(q_BTHD, (q_BTHD, k_BTKD, v_BTKD, out_BTHD, dout_BTHD, dq, dk, dv), num_products=5)
        note_work((dq_sum, dq_sum, dq, rows, *expanded))
        return dq, dk, dv


def _note_attention(q_BTHD: Tensor, moved: Iterable[Tensor], num_products: int) -> None:
    """Causal: half of each product's T x T."""
    batch, time, heads, size = q_BTHD.shape
    note_work(moved, flops=num_products * 2 * batch * heads * time * time * size // 2, op=ATTENTION)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *args: Any, window_size: Any = None, **kwargs: Any) -> Tensor:
    """In place of `flash_attn.flash_attn_func`."""
    return FlashAttention.apply(q, k, v)  # type: ignore[no-any-return, no-untyped-call]


def _module(name: str, **attributes: Any) -> types.ModuleType:
    """A module that is not on disk; what it is asked for and does not have is None."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
    module.__dict__.update({"__getattr__": lambda name: None, "__path__": []} | attributes)
    return module


def fake_flash_attention() -> None:
    """A `flash_attn` that can be imported; rows without padding only need its one function."""
    sys.modules["flash_attn"] = _module("flash_attn", flash_attn_func=flash_attn_func)
    for name in ("flash_attn.bert_padding", "flash_attn.layers", "flash_attn.layers.rotary"):
        sys.modules[name] = _module(name)


class FakeLibrary:
    """In place of bitsandbytes' C library, whose functions get tensors for pointers (`get_ptr` is replaced, too)."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: note_work(args)


def fake_bitsandbytes() -> None:
    """Put `FakeLibrary` in bitsandbytes' place; before anything imports names from `bitsandbytes.functional`."""
    functional: Any = importlib.import_module("bitsandbytes.functional")
    functional.lib = FakeLibrary()
    functional.get_ptr = lambda tensor: tensor
    functional.is_on_gpu = lambda tensors: True
    functional.pre_call = functional.post_call = lambda device: None


class FakeKernel:
    """In place of a Triton kernel: `kernel[grid](...)` notes what it reads and writes."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: note_work((*args, *kwargs.values()))


@contextlib.contextmanager
def importing_triton_kernels() -> Iterator[None]:
    """Modules imported inside get a `triton` whose kernels do nothing, and decorators of the CPU's autocast."""

    def decorate(*args: Any, **kwargs: Any) -> Any:
        return lambda kernel: kernel if isinstance(kernel, FakeKernel) else FakeKernel(kernel)

    language = _module("triton.language", constexpr=int)
    triton = _module(
        "triton",
        language=language,
        jit=FakeKernel,
        heuristics=decorate,
        autotune=decorate,
        cdiv=lambda a, b: -(-a // b),
        next_power_of_2=lambda n: 1 << (n - 1).bit_length(),
    )
    triton.Config = lambda *args, **kwargs: None  # type: ignore[attr-defined]
    amp: Any = torch.amp
    stock = amp.custom_fwd, amp.custom_bwd
    amp.custom_fwd = lambda device_type, **options: functools.partial(stock[0], device_type="cpu", **options)
    amp.custom_bwd = lambda device_type: functools.partial(stock[1], device_type="cpu")
    sys.modules |= {"triton": triton, "triton.language": language}
    try:
        yield
    finally:
        del sys.modules["triton"], sys.modules["triton.language"]
        amp.custom_fwd, amp.custom_bwd = stock

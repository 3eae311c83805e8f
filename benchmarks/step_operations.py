"""What one operation of a training step costs on a GPU: products, bytes read and written, kernels, copies.

Everything follows from the operation's schema: an argument is read, a result is written, an argument that is changed in
place is both. Views and allocations cost nothing; a broadcast operand is read once. Where a schema says too much (an
embedding reads the rows it is asked for, not its table), the tables below say what is true.

Each operation starts one kernel, except those over lists of tensors, which are cut as ATen cuts them. Some of torch's
start two or three (a norm over millions of elements): both sides of a comparison are counted alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from qlora_trainer.planning.inside import ROW_OPS
from qlora_trainer.planning.tracker import product_flops

Kind = Literal["product", "attention", "dequantization", "other", "nothing"]

ATTENTION = "aten::_scaled_dot_product_flash_attention"
ATTENTION_BACKWARD = "aten::_scaled_dot_product_flash_attention_backward"
DEQUANTIZE = "bitsandbytes::dequantize_4bit"
# Operations that are one kernel on a GPU, for which the schema is right: bitsandbytes' own, and those of ours that
# `hardware/triton_rows.py` has a kernel for. They are not taken apart.
KERNELS = {
    DEQUANTIZE: "dequantization",
    "bitsandbytes::dequantize_blockwise": "dequantization",
    "bitsandbytes::optimizer_update_32bit": "other",
    "bitsandbytes::optimizer_update_8bit_blockwise": "other",
    **dict.fromkeys(ROW_OPS, "other"),
}
_NO_KERNEL = {"aten::_unsafe_view", "aten::lift_fresh", "aten::detach_", "aten::set_", "aten::resize_"}
_WRITTEN_ONLY = {"aten::copy_", "aten::fill_", "aten::zero_", "aten::_foreach_copy_", "aten::_foreach_zero_"}
# Declared as changed, though it is only where gradients are unscaled.
_READ_ONLY = {
    "aten::_fused_adamw_": "grads",
    "bitsandbytes::optimizer_update_32bit": "g",
    "bitsandbytes::optimizer_update_8bit_blockwise": "g",
}
# Of this argument as much is read as is written to the result.
_PICKED = {"aten::embedding": "weight", "aten::index_select": "self", "aten::gather": "self", "aten::index": "self"}
# As many elements of `self` change as the index has.
_SCATTERED = {"aten::scatter_add_", "aten::scatter_"}
# Only the looks of their arguments matter.
_LIKE = re.compile(r"::new_|_like$")
# Products without a formula here: to be counted as none, they must not occur.
_PRODUCT = re.compile(r"mm(_|$)|mv(_|$)|attention|convolution|::(v?dot|linear|matmul|einsum|addr|ger)$")
# ATen/native/cuda/MultiTensorApply.cuh: tensors a launch by the number of lists, blocks a launch, elements a block.
_TENSORS_A_LAUNCH, _BLOCKS_A_LAUNCH, _BLOCK_ELEMENTS = (110, 64, 48, 36, 30), 320, 65_536


class CannotCountError(Exception):
    """An operation whose cost is not known here."""


@dataclass(frozen=True, slots=True)
class Operation:
    """What one operation costs.

    Attributes:
        name: such as `aten::mul`.
        kind: what it is counted under; "nothing" where only a view or an empty tensor is made.
        flops: of matrix products, 2 a multiply-add; causal attention is half of its square.
        moved_bytes: read and written.
        launches: kernels.
        copied_to: "device" or "host" for a copy between the two, which is no kernel.
        waits: the host waits for the device.
    """

    name: str
    kind: Kind
    flops: int = 0
    moved_bytes: int = 0
    launches: int = 0
    copied_to: Literal["device", "host"] | None = None
    waits: bool = False


def bind(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by their names in the schema."""
    names = [argument.name for argument in func._schema.arguments]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among `values` and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, Tensor))


def operation_of(func: Any, arguments: Mapping[str, Any], results: Sequence[Any], device_type: str) -> Operation:
    """What a call costs.

    Args:
        func: the operation.
        arguments: by name.
        results: what it returned.
        device_type: tensors elsewhere are the host's.

    Raises:
        CannotCountError: it is none of torch's or bitsandbytes' that are known.
    """
    name: str = func._schema.name
    all_tensors = list(tensors_in((*arguments.values(), *results)))
    is_made_only = name.startswith(("aten::empty", "aten::new_empty"))
    if func.is_view or is_made_only or name in _NO_KERNEL:
        return Operation(name, "nothing")
    if not any(tensor.device.type == device_type for tensor in all_tensors):
        return Operation(name, "nothing")
    copied = _copy_between(name, arguments, results, device_type)
    if copied is not None:
        return copied
    launches = _multi_tensor_launches(arguments, results) if name.startswith(("aten::_foreach", "aten::_fused")) else 1
    moved_bytes = sum(_moved_bytes(func, arguments, results, device_type))
    flops, kind = _product(name, arguments)
    return Operation(name, kind, flops, moved_bytes, launches)


def _product(name: str, arguments: Mapping[str, Any]) -> tuple[int, Kind]:
    if not name.startswith("aten::"):
        if name not in KERNELS:
            raise CannotCountError(
                f"{name}: an operation of its own, whose inner work is not known; "
                "give its body in planning/inside.py, _BODIES, so that it is planned for and counted"
            )
        return 0, "dequantization" if KERNELS[name] == "dequantization" else "other"
    if name in (ATTENTION, ATTENTION_BACKWARD):
        return _attention_flops(arguments, is_backward=name == ATTENTION_BACKWARD), "attention"
    flops = product_flops(name, tuple(arguments.values()))
    if not flops and _PRODUCT.search(name):
        raise CannotCountError(f"{name}: a product whose FLOPs are not known here")
    return flops, "product" if flops else "other"


def _attention_flops(arguments: Mapping[str, Any], *, is_backward: bool) -> int:
    """Two products forward, five backward, which computes the scores again (Dao, FlashAttention 2, 2023)."""
    query_BHTD, key_BKSD, value_BKSE = arguments["query"], arguments["key"], arguments["value"]
    rows, heads, num_queries, size = query_BHTD.shape
    size_v = value_BKSE.shape[-1]
    widths = 3 * size + 2 * size_v if is_backward else size + size_v
    flops = int(2 * rows * heads * num_queries * key_BKSD.shape[2] * widths)
    return flops // 2 if arguments.get("is_causal", False) else flops


def _copy_between(
    name: str, arguments: Mapping[str, Any], results: Sequence[Any], device_type: str
) -> Operation | None:
    if name not in ("aten::_to_copy", "aten::copy_"):
        return None
    source = arguments["src"] if name == "aten::copy_" else arguments["self"]
    target: Tensor = results[0]
    from_device, to_device = (tensor.device.type == device_type for tensor in (source, target))
    if from_device == to_device:
        return None
    # Blocking copies, both ways, end with a wait for the stream (ATen/native/cuda/Copy.cu, copy_kernel_cuda).
    waits = not arguments.get("non_blocking", False)
    num_bytes = target.numel() * target.element_size()
    return Operation(name, "other", moved_bytes=num_bytes, copied_to="device" if to_device else "host", waits=waits)


def _moved_bytes(func: Any, arguments: Mapping[str, Any], results: Sequence[Any], device_type: str) -> Iterator[int]:
    name: str = func._schema.name
    picked, read = _PICKED.get(name), set[int]()
    for argument in func._schema.arguments:
        value = arguments.get(argument.name)
        for tensor in tensors_in([value]):
            if tensor.device.type != device_type or argument.name == picked or _LIKE.search(name):
                continue
            num_bytes = touched_bytes(tensor)
            if name in _SCATTERED and argument.name == "self":
                num_bytes = arguments["index"].numel() * tensor.element_size()
            is_changed = argument.alias_info is not None and argument.alias_info.is_write
            if is_changed and argument.name != _READ_ONLY.get(name):
                yield num_bytes
            is_read = not (is_changed and (argument.kwarg_only or name in _WRITTEN_ONLY))  # `out=` is not
            if is_read and id(tensor) not in read:  # `x * x` reads x once
                read.add(id(tensor))
                yield num_bytes
    made = [result for result, declared in zip(results, func._schema.returns, strict=False) if not declared.alias_info]
    for tensor in tensors_in(made):
        if tensor.device.type == device_type:
            yield touched_bytes(tensor) * (2 if picked else 1)


def touched_bytes(tensor: Tensor) -> int:
    """Bytes of distinct elements: what is expanded is not there more than once."""
    shape_and_stride = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(size if stride else min(size, 1) for size, stride in shape_and_stride)


def _multi_tensor_launches(arguments: Mapping[str, Any], results: Sequence[Any]) -> int:
    """Launches over lists of tensors, cut as `multi_tensor_apply` does; lists of counters and of norms are no lists."""
    given = [list(tensors_in([value])) for value in (*arguments.values(), *results) if isinstance(value, list | tuple)]
    lists = [own for own in given if any(tensor.ndim for tensor in own)] or [own for own in given if own][:1]
    most_tensors = _TENSORS_A_LAUNCH[min(len(lists), len(_TENSORS_A_LAUNCH)) - 1]
    launches = num_tensors = num_blocks = 0
    for tensor in lists[0]:
        num_tensors += 1
        blocks_left = math.ceil(tensor.numel() / _BLOCK_ELEMENTS)
        while blocks_left:
            taken = min(blocks_left, _BLOCKS_A_LAUNCH - num_blocks)
            num_blocks, blocks_left = num_blocks + taken, blocks_left - taken
            if num_blocks == _BLOCKS_A_LAUNCH or (num_tensors == most_tensors and not blocks_left):
                launches, num_blocks, num_tensors = launches + 1, 0, int(blocks_left > 0)
    return launches + (num_blocks > 0)

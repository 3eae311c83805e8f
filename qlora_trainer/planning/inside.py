"""What our own operations allocate inside themselves: their Python code, on fake tensors in a tracker of its own."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora_trainer.hardware.kernel_workspace import inside_bytes as library_inside_bytes
from qlora_trainer.hardware.row_blocks import rows_in_block
from qlora_trainer.hardware.row_kernels import expects_row_kernels
from qlora_trainer.model import attention, attention_in_parts, dora, nf4, row_ops
from qlora_trainer.model.attention_in_parts import run_tokens
from qlora_trainer.model.vocabulary_blocks import rows_in_block as rows_in_vocabulary_block
from qlora_trainer.planning.fake_results import FakeResults
from qlora_trainer.planning.timeline import Probe, on_a_line
from qlora_trainer.planning.tracker import Inside, StorageTracker, TensorSpec
from qlora_trainer.step import loss

ATTENTION = ("qlora_trainer::packed_attention", "qlora_trainer::packed_attention_backward")
IN_PARTS = ("qlora_trainer::attention_in_parts_", "qlora_trainer::attention_in_parts_backward_")
LOSS = "qlora_trainer::chunked_cross_entropy"
ROW_NORMS = "qlora_trainer::row_norms_"
# Where the tokens of a row are in each tensor of an attention; the lengths of the documents come behind the tensors.
_TOKEN_AXES: dict[str, tuple[int | None, ...]] = {
    ATTENTION[0]: (2, 2, 2),
    ATTENTION[1]: (1, 2, 2, 2, 1, 2),
    IN_PARTS[0]: (0, 0, 0),
    IN_PARTS[1]: (0, 0, 0, 0, 1, 0, None, 0, None, None, 0),
}
# Of LOSS: the projection and its bias; how many positions are in a chunk; whether the projection is on the host; its
# scales where it is in NF4.
_WEIGHT_ARGUMENT, _BIAS_ARGUMENT, _CHUNK_ARGUMENT, _HOST_ARGUMENT, _SCALES_ARGUMENT = 2, 3, 6, 9, 13
_FEW_BLOCKS, _SOME_BLOCKS = 3, 5  # of the vocabulary, of which a large one has hundreds
# Elementwise, row by row: their temporaries are those of a block of rows.
ROW_OPS: dict[str, Callable[..., Any]] = {
    op._qualname: op._init_fn
    for op in (
        row_ops.rms_norm,
        row_ops.rms_norm_again,
        row_ops.rms_norm_backward_,
        row_ops.rms_norm_weight_gradient,
        row_ops.rotate_,
        row_ops.gated,
        row_ops.gated_backward_,
        row_ops.summed_in_blocks,
    )
}
# The undecorated functions behind the operations.
_BODIES: dict[str, Callable[..., Any]] = {
    **ROW_OPS,
    ATTENTION[0]: attention.packed_attention._init_fn,
    ATTENTION[1]: attention.packed_attention_backward._init_fn,
    IN_PARTS[0]: attention_in_parts.attention_in_parts_._init_fn,
    IN_PARTS[1]: attention_in_parts.attention_in_parts_backward_._init_fn,
    LOSS: loss.loss_and_gradient._init_fn,
    ROW_NORMS: dora.row_norms_._init_fn,
}


def inside_bytes(op: str, args: tuple[Any, ...]) -> int | None:
    """Bytes that `op` needs beyond its results while it runs; the hook of a `StorageTracker`.

    Our own operations are told as 0 and worked out afterwards by `bytes_of`: inside a dispatch, torch no longer takes
    composite operations apart, and what they allocate would not be seen.
    """
    return 0 if op in _BODIES else library_inside_bytes(op, args) or None


def bytes_of(inside: Inside) -> int:
    """The same of recorded arguments."""
    if inside.op == LOSS:
        return _loss_bytes(_two_chunks(inside.arguments))
    if inside.op in ATTENTION:
        lengths = tuple(dict.fromkeys(_lengths(inside)))
        return _traced_bytes(inside.op, _of_documents(inside.op, inside.arguments, lengths))
    if inside.op in IN_PARTS:
        tile, num_tokens = inside.arguments[_tile_argument(inside.op)], inside.arguments[0].shape[0]
        lengths = _costliest_documents(inside, max(_lengths(inside)), num_tokens, tile)
        return _traced_bytes(inside.op, _of_documents(inside.op, inside.arguments, lengths))
    if inside.op in ROW_OPS:
        if expects_row_kernels(_device_of(inside.arguments)):
            return 0  # one kernel, which allocates nothing
        return _traced_bytes(inside.op, _two_blocks(inside.arguments))
    if inside.op == ROW_NORMS:
        return _traced_bytes(inside.op, inside.arguments)
    return library_inside_bytes(inside.op, _as_meta(inside.arguments))


def _two_chunks(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The loss of one chunk of positions or of two: more are alike, and a thousand take minutes to trace.

    A second one that is not full is taken for full, which is nothing but what is left of the first: targets and sums.
    """
    hidden, targets, *others = arguments
    chunk = arguments[_CHUNK_ARGUMENT]
    num_positions = hidden.shape[0] if hidden.shape[0] <= chunk else 2 * chunk
    return (
        TensorSpec((num_positions, *hidden.shape[1:]), hidden.dtype, hidden.device),
        TensorSpec((num_positions,), targets.dtype, targets.device),
        *others,
    )


@functools.lru_cache(maxsize=4096)
def _loss_bytes(arguments: tuple[Any, ...]) -> int:
    """Where the projection comes block by block, two numbers of blocks are traced, and more of them are on a line."""
    hidden, weight = arguments[0], arguments[_WEIGHT_ARGUMENT]
    vocabulary = weight.shape[0]
    with FakeTensorMode():
        block = rows_in_vocabulary_block(_empty(weight))
    is_on_host = any(arguments[_HOST_ARGUMENT : _HOST_ARGUMENT + 1])  # defaults are not recorded
    is_cut = is_on_host or weight.dtype != hidden.dtype
    num_blocks = vocabulary // block
    # Where a bias is upcast whole, the peak may move to that as blocks get many.
    is_alike = arguments[_BIAS_ARGUMENT] is None
    if not is_cut or not is_alike or num_blocks <= _SOME_BLOCKS:
        return _traced_bytes(LOSS, arguments)
    few, some = (
        (number, _traced_bytes(LOSS, _with_vocabulary(arguments, number * block + vocabulary % block)))
        for number in (_FEW_BLOCKS, _SOME_BLOCKS)
    )
    return on_a_line(few, some, num_blocks)


def _with_vocabulary(arguments: tuple[Any, ...], vocabulary: int) -> tuple[Any, ...]:
    """LOSS over fewer tokens of the vocabulary, in whole blocks of scales where the projection is in NF4."""
    weight = arguments[_WEIGHT_ARGUMENT]
    changed = list(_with_tokens(arguments, weight.shape[0], vocabulary))
    num_scales = vocabulary * 2 * weight.shape[1] // nf4.BLOCKSIZE
    sizes = (num_scales, -(-num_scales // nf4.NESTED_BLOCKSIZE))
    for place, size in enumerate(sizes, _SCALES_ARGUMENT):
        spec = arguments[place] if place < len(arguments) else None
        if spec is not None:
            changed[place] = TensorSpec((size,), spec.dtype, spec.device)
    return tuple(changed)


def _device_of(arguments: tuple[Any, ...]) -> torch.device:
    return next(value.device for value in arguments if isinstance(value, TensorSpec))


def _two_blocks(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """A row operation over two blocks of rows at most: what is not 1-D has rows."""
    by_row = [value for value in arguments if isinstance(value, TensorSpec) and len(value.shape) > 1]
    widest = max(math.prod(spec.shape[1:]) for spec in by_row)
    num_rows = min(by_row[0].shape[0], 2 * rows_in_block(widest, by_row[0].device.type))
    return tuple(
        TensorSpec((num_rows, *value.shape[1:]), value.dtype, value.device) if value in by_row else value
        for value in arguments
    )


def _lengths(inside: Inside) -> tuple[int, ...]:
    """Of the documents of an attention."""
    lengths: tuple[int, ...] = inside.arguments[len(_TOKEN_AXES[inside.op])]
    return lengths


def _of_documents(op: str, arguments: tuple[Any, ...], lengths: tuple[int, ...]) -> tuple[Any, ...]:
    """Attention over other documents: it takes them one after the other, and a batch may hold a million."""
    axes = _TOKEN_AXES[op]
    tensors = [
        TensorSpec((*spec.shape[:axis], sum(lengths), *spec.shape[axis + 1 :]), spec.dtype, spec.device)
        if isinstance(spec, TensorSpec) and axis is not None
        else spec
        for spec, axis in zip(arguments, axes, strict=False)
    ]
    return (*tensors, lengths, *arguments[len(axes) + 1 :])


def _costliest_documents(inside: Inside, longest: int, num_tokens: int, tile: int) -> tuple[int, ...]:
    """Of all documents that are no longer than `longest`, those for which attention in parts takes most.

    That is the longest one, a key-value head at a time, and where it is shorter than a tile also a full run.
    """
    most_tokens = run_tokens(tile, inside.arguments[1].shape[1])
    if longest >= tile > most_tokens:
        return (longest,)
    run = min(most_tokens, num_tokens)
    num_full, rest = divmod(run, min(longest, run))
    alone = (longest,) if longest > most_tokens else ()
    return (*alone, *[min(longest, run)] * num_full, *[rest] * (rest > 0))


def resized(
    inside: Inside, probe: Probe, *, tokens: int, tile: int, seq_len: int, rows: int, loss_chunk: int
) -> Inside:
    """The same operation at other sizes; attention sees one document at a time.

    Args:
        inside: recorded at `probe`, its tokens in one document.
        probe: where it was traced.
        tokens: of the micro-batch.
        tile: tokens of a tile, where there are tiles.
        seq_len: of the longest document.
        rows: documents that attention sees at once: 1 when packed.
        loss_chunk: positions in a chunk of the loss.
    """
    if inside.op == LOSS:
        by_token = _with_tokens(inside.arguments[:2], probe.tokens, tokens)
        if probe.has_tile:
            by_token = _with_tokens(by_token, probe.tile, min(tile, tokens))
        others = list(inside.arguments[2:])
        others[_CHUNK_ARGUMENT - 2] = loss_chunk
        return Inside(inside.index, inside.op, (*by_token, *others))
    if inside.op in ROW_OPS:
        return Inside(inside.index, inside.op, _with_rows(inside.arguments, probe, tokens, tile))
    if inside.op in IN_PARTS:
        lengths = _costliest_documents(inside, seq_len, tokens, tile)
        changed = list(_of_documents(inside.op, inside.arguments, lengths))
        changed[_tile_argument(inside.op)] = tile
        return Inside(inside.index, inside.op, tuple(changed))
    return Inside(inside.index, inside.op, _with_tokens(inside.arguments, probe.tokens, seq_len, rows))


def _tile_argument(op: str) -> int:
    """Place of `tile_tokens`: behind tensors, lengths, scale, window and cap."""
    return len(_TOKEN_AXES[op]) + 4


def _with_rows(arguments: tuple[Any, ...], probe: Probe, tokens: int, tile: int) -> tuple[Any, ...]:
    """A row is a token, or a head of one."""
    return tuple(
        TensorSpec((_num_rows(value.shape[0], probe, tokens, tile), *value.shape[1:]), value.dtype, value.device)
        if isinstance(value, TensorSpec) and len(value.shape) > 1
        else value
        for value in arguments
    )


def _num_rows(traced: int, probe: Probe, tokens: int, tile: int) -> int:
    if traced % probe.tokens == 0:
        return traced // probe.tokens * tokens
    if probe.has_tile and traced % probe.tile == 0:
        return traced // probe.tile * min(tile, tokens)
    return traced  # the few tokens that are left for a last tile


def _with_tokens(arguments: tuple[Any, ...], probe_tokens: int, tokens: int, rows: int = 1) -> tuple[Any, ...]:
    changed: list[Any] = []
    for value in arguments:
        if isinstance(value, TensorSpec):
            shape = tuple(tokens if size == probe_tokens else size for size in value.shape)
            if rows > 1 and len(shape) == 4 and shape[0] == 1:
                shape = (rows, *shape[1:])
            changed.append(TensorSpec(shape, value.dtype, value.device))
        elif value == (probe_tokens,):  # document lengths
            changed.append((tokens,))
        else:
            changed.append(value)
    return tuple(changed)


def norms_of_rank(inside: Inside, probe_rank: int, rank: int) -> Inside:
    """`ROW_NORMS`, which knows no tokens, at another rank than it was recorded at."""
    return Inside(inside.index, inside.op, _with_tokens(inside.arguments, probe_rank, rank))


@functools.lru_cache(maxsize=4096)
def _traced_bytes(op: str, arguments: tuple[Any, ...]) -> int:
    device_types = [value.device.type for value in arguments if isinstance(value, TensorSpec)]
    known = _known()
    tracker = StorageTracker(device_type=device_types[0], inside=inside_bytes, results=known)
    with known.fake_mode, torch.no_grad():
        made = [_empty(value) if isinstance(value, TensorSpec) else value for value in arguments]
        made = [list(value) if isinstance(value, tuple) else value for value in made]
        with tracker:
            out = _BODIES[op](*made)
    if len(set(device_types)) > 1 and op != LOSS:  # whose projection may be on the host
        raise RuntimeError(f"{op} on several devices: {device_types}")
    results = (out,) if isinstance(out, Tensor) else out or ()  # one that works in place has none
    kept = {result.untyped_storage()._cdata: result.untyped_storage().nbytes() for result in results}
    return max(0, tracker.peak_bytes - sum(kept.values()))


@functools.cache
def _known() -> FakeResults:
    """Blocks and chunks are alike, within an operation and from one to the next."""
    return FakeResults(FakeTensorMode())


def _empty(spec: TensorSpec) -> Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype, device=spec.device)


def _as_meta(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Tensors of the right shape and device type, without storage."""
    with FakeTensorMode():
        return tuple(_empty(value) if isinstance(value, TensorSpec) else value for value in arguments)

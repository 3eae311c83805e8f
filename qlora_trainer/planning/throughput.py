"""How long a step takes, by a roofline: products at the device's rate, everything else at its bandwidth, launches.

Williams et al., "Roofline: an insightful visual performance model" (2009). Only the order of candidates and the figure
that is shown depend on it; nothing that is learned does.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

from qlora_trainer.hardware.cpu_speed import measure_cpu_speed
from qlora_trainer.hardware.device import ComputeDtype
from qlora_trainer.hardware.gpu_catalogue import Gpu
from qlora_trainer.model.attention_in_parts import run_tokens
from qlora_trainer.model.vocabulary_blocks import BLOCK_ELEMENTS
from qlora_trainer.planning.price import Layout, Prices, hidden_bytes
from qlora_trainer.planning.shallow_trace import LayerParts
from qlora_trainer.planning.tracker import TensorSpec
from qlora_trainer.planning.work import WorkSum
from qlora_trainer.step.batch import ROW_MULTIPLE

# Shares of the data sheet's figures that a training step reaches, and the cost of starting a kernel; the same for every
# card and model: least squares over 14 published runs on an A100 (benchmarks/published_memory.py, docs/log.md).
GPU_PRODUCT_SHARE, GPU_BANDWIDTH_SHARE, GPU_LAUNCH_SECONDS = 0.75, 0.79, 14e-6
# Copies from pinned memory reach 80 to 90 % of what PCIe carries (see `hardware.gpu_catalogue`).
GPU_LINK_SHARE = 0.8
# An update of one element in 32 bits reads four numbers and writes three, and a copy of three is made before it; of a
# host whose speed nobody knows, two channels of DDR4-3200 at 40 %: a guess.
HOST_UPDATE_BYTES, HOST_BANDWIDTH = 4 * (4 + 3 + 2 * 3), 20e9
# The same of what a CPU reaches where each kind of work is timed alone, by 27 layouts of a step on one CPU
# (`benchmarks.plan_choice`, docs/log.md): in a step nothing stays in the caches, and freed pages are mapped again.
CPU_PRODUCT_SHARE, CPU_ROW_SHARE, CPU_UNPACK_SHARE = 0.85, 0.4, 0.65
# Causal attention is half of a full product, and its kernels reach about this share of the product rate; a CPU's half
# of it in documents of so many tokens (docs/log.md, 2026-11-28: from 0.12 for 60 tokens to 0.4 for 1,024).
ATTENTION_SHARE, CPU_ATTENTION_RAMP_TOKENS = 0.5, 320


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What a device does in a second.

    Attributes:
        flops: of matrix products.
        bytes: read or written by everything else: by simple operations on large tensors, as in the loss.
        row_bytes: the same of row operations.
        unpacked_elements: weights dequantized; on a CPU, and read by a product.
        launch_seconds: of starting one operation.
        weight_passes: how often a product with the head moves it; CPU libraries read it, pack it and read that.
        attention_ramp_tokens: documents of that many are attended to at half the rate of long ones.
        link_bytes: between host and device, in one direction; on a CPU between a file and memory.
        link_overlaps: what goes over the link goes beside the work.
    """

    flops: float
    bytes: float
    row_bytes: float
    unpacked_elements: float
    launch_seconds: float
    weight_passes: int
    attention_ramp_tokens: int
    link_bytes: float
    link_overlaps: bool


@dataclass(frozen=True, slots=True)
class Demand:
    """What a training run asks for.

    Attributes:
        global_batch_size: documents an optimizer step.
        mean_tokens, shortest_tokens, std_tokens: of a document; the last is their standard deviation.
    """

    global_batch_size: int
    mean_tokens: float
    shortest_tokens: float
    std_tokens: float = 0.0

    @property
    def usual_batch_tokens(self) -> float:
        """What one global batch in forty exceeds: two standard deviations above the mean of so many documents."""
        return self.global_batch_size * self.mean_tokens + 2.0 * math.sqrt(self.global_batch_size) * self.std_tokens

    def num_micro_batches(self, micro_batch_tokens: int) -> int:
        """Of a usual global batch: one where all of it fits, whatever its documents are."""
        if micro_batch_tokens >= self.usual_batch_tokens:
            return 1
        return math.ceil(self.usual_batch_tokens / self.filled_tokens(micro_batch_tokens))

    def level_tokens(self, num_micro_batches: int) -> int:
        """The fewest tokens, in whole rows, of which that many micro-batches hold a usual global batch.

        More would be no faster before one micro-batch less does: they would be room that is planned and not filled.
        """
        rows = range(-(-math.ceil(self.usual_batch_tokens) // ROW_MULTIPLE) + 1)
        return ROW_MULTIPLE * bisect_left(
            rows, -num_micro_batches, lo=1, key=lambda number: -self.num_micro_batches(number * ROW_MULTIPLE)
        )

    def filled_tokens(self, micro_batch_tokens: int) -> float:
        """Of a micro-batch, what whole documents fill: equal ones leave a remainder, a short one fits any gap.

        It holds one at least, whatever the division of a rounded mean says.
        """
        of_equal = self.mean_tokens * max(1, micro_batch_tokens // self.mean_tokens)
        return max(of_equal, micro_batch_tokens - self.shortest_tokens)


def gpu_speed(gpu: Gpu) -> Speed:
    """Of a card of the catalogue."""
    bandwidth = gpu.bandwidth_gbps * 1e9 * GPU_BANDWIDTH_SHARE
    return Speed(
        flops=gpu.tensor_tflops * 1e12 * GPU_PRODUCT_SHARE,
        bytes=bandwidth,
        row_bytes=bandwidth,
        unpacked_elements=bandwidth / 2.52,  # half a byte read, two bytes written
        launch_seconds=GPU_LAUNCH_SECONDS,
        weight_passes=1,
        attention_ramp_tokens=0,
        link_bytes=gpu.host_link_gbps * 1e9 * GPU_LINK_SHARE,
        link_overlaps=True,
    )


def cpu_speed(compute_dtype: ComputeDtype) -> Speed:
    """Of this machine's CPU, measured."""
    measured = measure_cpu_speed(compute_dtype)
    return Speed(
        flops=measured.flops * CPU_PRODUCT_SHARE,
        bytes=measured.bytes,
        row_bytes=measured.bytes * CPU_ROW_SHARE,
        unpacked_elements=measured.unpacked_elements * CPU_UNPACK_SHARE,
        launch_seconds=measured.launch_seconds,
        weight_passes=3,
        attention_ramp_tokens=CPU_ATTENTION_RAMP_TOKENS,
        link_bytes=measured.file_bytes,
        link_overlaps=False,
    )


def tokens_per_second(
    prices: Prices, layout: Layout, demand: Demand, speed: Speed, *, streamed_bytes: int = 0, host_elements: int = 0
) -> float:
    """Tokens trained on in a second.

    A micro-batch costs a part that does not depend on its tokens (unpacking every weight, launches) and a part that
    does, so a global batch costs the first once for each of its micro-batches.

    Args:
        prices, layout, demand, speed: of the parts, of the step, of the data and of the device.
        streamed_bytes: of the base that pass through the device in a forward, and again in a backward.
        host_elements: that are updated on the host.
    """
    tokens = demand.global_batch_size * demand.mean_tokens
    num_micro_batches = demand.num_micro_batches(layout.tokens)
    fixed, full = (_seconds(prices, layout, number, demand, speed) for number in (0, layout.tokens))
    work = num_micro_batches * fixed + tokens * (full - fixed) / layout.tokens
    over_link = 2 * (
        num_micro_batches * streamed_bytes
        + tokens * layout.num_offloaded * hidden_bytes(prices, layout) / layout.tokens  # out and back
        + tokens * _head_bytes_over_link(prices, layout) / layout.tokens
    )
    link = over_link / speed.link_bytes
    # Gradients there and weights back, in fp32; nothing goes on beside it.
    update = host_elements * (8 / speed.link_bytes + HOST_UPDATE_BYTES / HOST_BANDWIDTH)
    return float(tokens / (update + (max(work, link) if speed.link_overlaps else work + link)))


def _head_bytes_over_link(prices: Prices, layout: Layout) -> int:
    """Of a micro-batch, in a forward: a head on the host comes once for each chunk of the loss."""
    if layout.levers.embedding_residency != "host":
        return 0
    _, head = prices.parts.head_spec
    chunk = min(layout.loss_chunk, layout.levers.tile_tokens or layout.loss_chunk)
    return -(-layout.tokens // chunk) * math.prod(head.shape) * head.dtype.itemsize


def _seconds(prices: Prices, layout: Layout, tokens: int, demand: Demand, speed: Speed) -> float:
    runs = prices.layer_runs(layout)
    first, last = prices.parts.of(runs[0].policy), prices.parts.of(runs[-1].policy)
    total = _part_seconds(first.embed_work, layout, tokens, speed) + _part_seconds(
        last.loss_work, layout, tokens, speed
    )
    for run in runs:
        own = run.parts
        each = _part_seconds(own.forward_work, layout, tokens, speed)
        each += _part_seconds(own.backward_work, layout, tokens, speed)
        attention_flops = own.attention_passes * tokens * _attention_flops_per_token(own.query_spec, demand)
        each += own.part_launches * _num_parts(own, layout, tokens, demand) * speed.launch_seconds
        total += run.num_layers * (each + attention_flops / _attention_rate(demand, speed))
    total += _loss_seconds(prices, layout, tokens, speed)
    return total


def _num_parts(own: LayerParts, layout: Layout, tokens: int, demand: Demand) -> float:
    """Into which attention cuts so many tokens, in documents of the mean length."""
    is_long = demand.mean_tokens > run_tokens(layout.levers.tile_tokens, own.num_parts)
    of_each = own.num_parts if is_long else 1
    return of_each * tokens / demand.mean_tokens


def _part_seconds(work: WorkSum, layout: Layout, tokens: int, speed: Speed) -> float:
    flops, moved = work.at(tokens, layout.rank)
    launches = work.launches + work.tile_launches * (-(-tokens // max(1, layout.levers.tile_tokens)))
    return (
        flops / speed.flops
        + moved / speed.row_bytes
        + work.unpacked_elements / speed.unpacked_elements
        + launches * speed.launch_seconds
    )


def _attention_flops_per_token(query: TensorSpec, demand: Demand) -> float:
    """Of a causal forward pass over documents of the mean length: two products over half of the pairs."""
    heads, head_dim = query.shape[1], query.shape[-1]
    return 2.0 * demand.mean_tokens * heads * head_dim


def _attention_rate(demand: Demand, speed: Speed) -> float:
    """FLOP a second of causal attention over documents of the mean length."""
    ramp = demand.mean_tokens / (demand.mean_tokens + speed.attention_ramp_tokens)
    return speed.flops * ATTENTION_SHARE * ramp


def _loss_seconds(prices: Prices, layout: Layout, tokens: int, speed: Speed) -> float:
    """Two products with the head, each of which reads (upcasts, unpacks) it for a chunk; eight passes over logits."""
    hidden, head = prices.parts.head_spec
    vocabulary, hidden_size = head.shape[0], hidden.shape[1]
    is_packed = layout.levers.nf4_head
    num_chunks = -(-layout.tokens // layout.loss_chunk)
    head_bytes = vocabulary * hidden_size * hidden.dtype.itemsize
    read_seconds = 2 * num_chunks * speed.weight_passes * head_bytes / speed.bytes
    upcast = vocabulary * hidden_size * (6 if hidden.dtype.itemsize == 4 and not is_packed else 0)  # 16 bits to 32
    unpacked = vocabulary * hidden_size if is_packed else 0
    num_blocks = -(-unpacked // BLOCK_ELEMENTS)  # each unpacked and multiplied, twice, in four operations
    return (
        4.0 * tokens * vocabulary * hidden_size / speed.flops
        + read_seconds
        + 32.0 * tokens * vocabulary / speed.bytes
        + 2 * num_chunks * upcast / speed.bytes
        + 2 * num_chunks * unpacked / speed.unpacked_elements
        + (14 + 8 * num_blocks) * num_chunks * speed.launch_seconds
    )

"""One training step of the peer, traced: what `transformers.Trainer` holds around a model while it trains.

Imports torch and nothing else of ours but the tracker.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import peer_fakes
from qlora_trainer.planning.tracker import StorageTracker, Work

ALIGNMENT_BYTES = 512  # c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize
# Operations that only make or look at a storage.
NO_KERNEL = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::_unsafe_view"}
LossOf = Callable[[Any], Callable[[Mapping[str, Tensor]], Tensor]]


@dataclass(frozen=True, slots=True)
class Trace:
    """Bytes and work of one step.

    Attributes:
        static_bytes: alive after the step: model, optimizer state, the last batch.
        forward_bytes, backward_bytes, optimizer_bytes: the most alive in each phase.
        gemm_flops, attention_flops: of matrix products and of attention.
        moved_bytes: read and written by everything else.
        launches: kernels.
    """

    static_bytes: float
    forward_bytes: float
    backward_bytes: float
    optimizer_bytes: float
    gemm_flops: float
    attention_flops: float
    moved_bytes: float
    launches: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def trace_step(row: Mapping[str, Any], *, build: Callable[[], Any], loss_of: LossOf) -> Trace:
    """Trace the second step (the first allocates the optimizer's state).

    Args:
        row: a published row.
        build: makes the model, ready to train.
        loss_of: model -> function that computes the loss of a batch.
    """
    tracker = StorageTracker(alignment_bytes=ALIGNMENT_BYTES, record_work=True)
    shape = (row["micro_batch"], row["seq_len"])
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        tracker,
        peer_fakes.CudaAsCpu(),  # type: ignore[no-untyped-call]
        peer_fakes.module_conversion(),
        peer_fakes.cuda_dropout(),
        peer_fakes.noting_work(tracker),
        peer_fakes.cuda_autocast_flag(torch.bfloat16),
    ):
        model = build()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        moments = [torch.zeros_like(parameter) for parameter in trained for _ in range(2)]
        inputs = {name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "attention_mask", "labels")}
        compute_loss = loss_of(model)
        gc.collect()
        tracker.reset_peak()
        tracker.work.clear()
        loss = compute_loss(inputs)
        forward_bytes = tracker.peak_bytes
        tracker.reset_peak()
        loss.backward()
        loss = loss.detach()  # as `training_step` returns it
        backward_bytes = tracker.peak_bytes
        tracker.reset_peak()
        step_adamw(trained)
        optimizer_bytes = tracker.peak_bytes
        model.zero_grad()
        work = [entry for entry in tracker.work if _runs_a_kernel(entry)]
        del loss
        gc.collect()
        static_bytes = tracker.live_bytes
        del moments
    return Trace(
        static_bytes=static_bytes,
        forward_bytes=forward_bytes,
        backward_bytes=backward_bytes,
        optimizer_bytes=optimizer_bytes,
        gemm_flops=sum(entry.flops for entry in work if entry.op != peer_fakes.ATTENTION),
        attention_flops=sum(entry.flops for entry in work if entry.op == peer_fakes.ATTENTION),
        moved_bytes=sum(sum(entry.moved) for entry in work if not entry.flops),
        launches=len(work),
    )


def _runs_a_kernel(work: Work) -> bool:
    return work.op.startswith(("aten::", "peer::")) and work.op not in NO_KERNEL


def step_adamw(parameters: list[Tensor]) -> None:
    """torch.optim.AdamW, foreach: beside the state, a temporary of the size of all parameters (`exp_avg_sq_sqrt`)."""
    roots = [torch.empty_like(parameter) for parameter in parameters]
    for parameter, root in zip(parameters, roots, strict=True):
        peer_fakes.note_work((parameter, parameter, parameter.grad, *(4 * [parameter]), root, root))

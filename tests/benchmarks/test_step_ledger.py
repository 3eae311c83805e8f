"""What is written down of an operation is what it does: bytes, launches, FLOPs, waits; and nothing is hidden."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from benchmarks.step_ledger import Entry, Ledger
from benchmarks.step_operations import CannotCountError, Operation
from benchmarks.step_totals import Totals, sum_up
from qlora_trainer.hardware.python_accelerator import python_accelerator
from qlora_trainer.model.frozen import FrozenHead
from qlora_trainer.model.quantized import LogitShape
from qlora_trainer.step.loss import chunked_cross_entropy

python_accelerator()  # before any test runs: see tests/planning/conftest.py

ROWS, COLUMNS = 8, 16
FULL = 4 * ROWS * COLUMNS  # bytes of an fp32 tensor of that size


def written(work: Callable[..., Any], *shapes: tuple[int, ...], device: str = "cpu") -> list[Entry]:
    """Entries of `work` on fp32 tensors of these shapes."""
    ledger = Ledger(device)
    with FakeTensorMode():
        tensors = [torch.empty(shape, device=device) for shape in shapes]
        with ledger:
            work(*tensors)
    return list(ledger.entries())


def only(work: Callable[..., Any], *shapes: tuple[int, ...]) -> Operation:
    (entry,) = written(work, *shapes)
    return entry.operation


def totals(work: Callable[..., Any], *shapes: tuple[int, ...], device: str = "cpu") -> Totals:
    return sum_up(written(work, *shapes, device=device))[0]


@pytest.mark.parametrize(
    "work, moved_bytes",
    [
        (lambda x: x * 2.0, 2 * FULL),
        (lambda x: x.mul_(2.0), 2 * FULL),
        (lambda x: x * x, 2 * FULL),
        (lambda x: x * x[:1], 2 * FULL + 4 * COLUMNS),
        (lambda x: x[:1].expand(ROWS, COLUMNS) + 1.0, FULL + 4 * COLUMNS),  # what is expanded is there once
        (lambda x: x.sum(-1), FULL + 4 * ROWS),
        (lambda x: x.zero_(), FULL),
        (lambda x: x[:4].copy_(x[4:]), FULL),
        (lambda x: torch.add(x, x + 0.0, out=torch.empty_like(x)), 3 * FULL),
        (torch.zeros_like, FULL),
        (lambda x: x.to(torch.bfloat16), FULL + FULL // 2),
        (lambda x: x.index_select(0, torch.zeros(2, dtype=torch.int64)), None),
    ],
)
def test_bytes_are_those_that_are_touched(work: Callable[[Tensor], Any], moved_bytes: int | None) -> None:
    entries = written(work, (ROWS, COLUMNS))
    if moved_bytes is None:  # an index of 2 rows is made, then read with the rows it asks for, not all of the table
        assert entries[-1].operation.moved_bytes == 2 * 8 + 2 * 2 * 4 * COLUMNS
    else:
        assert (entries[-1].operation.moved_bytes, entries[-1].operation.launches) == (moved_bytes, 1)


@pytest.mark.parametrize("work", [lambda x: x.t(), lambda x: x[2:].view(-1), lambda x: x.detach(), torch.empty_like])
def test_views_and_empty_tensors_cost_nothing(work: Callable[[Tensor], Any]) -> None:
    assert written(work, (ROWS, COLUMNS)) == []


def test_a_product_is_told_by_its_flops_and_moves_nothing_outside_of_itself() -> None:
    found = totals(lambda x, w: x @ w, (ROWS, COLUMNS), (COLUMNS, 5))
    assert (found.gemm_flops, found.moved_bytes, found.launches) == (2 * ROWS * COLUMNS * 5, 0, 1)


@pytest.mark.parametrize("work", [lambda x: x @ x[0], lambda x: torch.dot(x[0], x[0])])
def test_a_product_without_a_formula_is_refused(work: Callable[[Tensor], Any]) -> None:
    with pytest.raises(CannotCountError, match="a product whose FLOPs are not known"):
        written(work, (ROWS, COLUMNS))


def test_an_operation_whose_body_is_not_known_is_refused() -> None:
    """Fails where an unknown operation counts as one cheap kernel."""

    @torch.library.custom_op("step_ledger_test::hidden", mutates_args=())
    def hidden(x: Tensor) -> Tensor:
        return x.exp() + 1.0

    hidden.register_fake(torch.empty_like)
    with pytest.raises(CannotCountError, match=r"step_ledger_test::hidden: .*planning/inside.py, _BODIES"):
        written(hidden, (ROWS, COLUMNS))


def test_an_operation_of_our_own_is_taken_apart() -> None:
    vocabulary, chunk = 32, 2

    def loss(hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        targets_N = torch.zeros(ROWS, dtype=torch.int64)
        head = FrozenHead(weight_VH, None)
        return chunked_cross_entropy(
            hidden_NH.requires_grad_(), targets_N, head, LogitShape(1.0, 0.0), chunk_tokens=chunk
        )

    found = totals(loss, (ROWS, COLUMNS), (vocabulary, COLUMNS))
    assert found.gemm_flops == 2 * 2 * ROWS * COLUMNS * vocabulary
    # At least: the maximum, the exponential and the quotient pass over the logits, two of them in place.
    assert found.moved_bytes > 5 * 4 * ROWS * vocabulary
    assert found.launches > 5 * ROWS // chunk


@pytest.mark.parametrize(
    "sizes, num_lists, launches",
    [
        ([1] * 64, 2, 1),
        ([1] * 65, 2, 2),
        ([1] * 49, 3, 2),
        ([320 * 65_536], 2, 1),
        ([320 * 65_536 + 1], 2, 2),
        ([319 * 65_536, 65_536, 1], 2, 2),
    ],
)
def test_lists_are_cut_as_aten_cuts_them(sizes: list[int], num_lists: int, launches: int) -> None:
    def work() -> None:
        lists = [[torch.empty(size) for size in sizes] for _ in range(num_lists)]
        if num_lists == 2:
            torch._foreach_add_(lists[0], lists[1])
        else:
            torch._foreach_addcmul_(lists[0], lists[1], lists[2])

    assert only(work).launches == launches


@pytest.mark.parametrize("work", [lambda x: x.sum().item(), lambda x: bool(x.sum() > 0), lambda x: float(x[0, 0])])
def test_a_value_that_is_asked_for_is_a_wait_and_a_copy(work: Callable[[Tensor], Any]) -> None:
    found = totals(work, (ROWS, COLUMNS))
    assert (found.waits, found.copies_to_host) == (1, 1)


@pytest.mark.parametrize("work", [lambda x: x[x[:, 0] > 0], lambda x: x.masked_select(x > 0), lambda x: x.nonzero()])
def test_a_result_whose_size_is_a_value_is_a_wait(work: Callable[[Tensor], Any]) -> None:
    assert totals(work, (ROWS, COLUMNS)).waits == 1


def test_a_question_for_nan_is_answered_with_no() -> None:
    answers = []
    written(lambda x: answers.append(bool(torch.isnan(x.sum()))), (ROWS, COLUMNS))
    written(lambda x: answers.append(bool(x.sum() > 0)), (ROWS, COLUMNS))
    assert answers == [False, True]


@pytest.mark.parametrize("non_blocking, waits", [(True, 0), (False, 1)])
def test_a_copy_between_host_and_device_is_no_kernel(non_blocking: bool, waits: int) -> None:
    device = python_accelerator()
    assert device is not None

    def to_device(_: Tensor) -> None:
        torch.empty(ROWS).to(device, non_blocking=non_blocking)

    found = totals(to_device, (1,), device=device.type)
    assert (found.copies_to_device, found.copied_bytes, found.launches) == (1, 4 * ROWS, 0)
    assert found.waits == waits


def test_an_operation_belongs_to_its_phase_and_its_place() -> None:
    def layer(x: Tensor, w: Tensor) -> Tensor:
        return (x * w).exp()

    ledger = Ledger("cpu")
    with FakeTensorMode():
        x, w = torch.empty(ROWS, COLUMNS), nn.Parameter(torch.empty(ROWS, COLUMNS))
        with ledger:
            with ledger.inside():
                checkpoint(layer, x, w, use_reentrant=False).sum().backward()
            w.data.add_(1.0)
    entries = list(ledger.entries())
    found = [(entry.operation.name, entry.phase) for entry in entries if entry.place.endswith(".layer")]
    assert found == [
        *(("aten::mul", "forward"), ("aten::exp", "forward")),
        *(("aten::mul", "recompute"), ("aten::exp", "recompute")),
        *(("aten::mul", "backward"), ("aten::mul", "backward")),  # the gradients of exp and of mul
    ]
    assert entries[-1].phase == "outside"

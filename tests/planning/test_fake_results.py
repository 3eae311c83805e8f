"""What is remembered of fake kernels is what they say, and a trace is the same with it as without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora_trainer.config.levers import Levers
from qlora_trainer.hardware.python_accelerator import python_accelerator
from qlora_trainer.model.row_ops import rms_norm, rotate_
from qlora_trainer.planning.fake_results import FakeResults
from qlora_trainer.planning.full_trace import TrainingTrace, trace_training
from qlora_trainer.planning.planner import Planner
from qlora_trainer.planning.pulled import pulled
from tests.planning.test_price import BUDGETS, NUM_LAYERS, RANK, SEQ_LEN, make_planner

ROWS, COLUMNS = 6, 8

Call = Callable[[Tensor, Tensor], Any]

# Of x [6, 8] and a weight [8, 8].
CALLS: dict[str, Call] = {
    "product": torch.mm,
    "product in place": lambda x, weight: x.addmm_(x, weight, beta=0.0, alpha=2.0),
    "part in place": lambda x, weight: x[2:].addmm_(x[2:], weight),
    "linear": torch.nn.functional.linear,
    "transposed": lambda x, weight: x.t(),
    "slice": lambda x, weight: x[1:, ::2],
    "flattened": lambda x, weight: x.flatten(),
    "not viewable": lambda x, weight: x.t().flatten(),
    "expanded": lambda x, weight: x.expand(3, -1, -1),
    "bytes": lambda x, weight: x.view(torch.uint8),
    "detached": lambda x, weight: x.detach(),
    "split": lambda x, weight: x.split([2, 1, 5], dim=1),
    "unbound": lambda x, weight: x.unbind(),
    "joined": lambda x, weight: torch.cat([x, weight, x[:1]]),
    "cast": lambda x, weight: x.to(torch.bfloat16),
    "moved": lambda x, weight: x.to("cpu"),
    "not moved": lambda x, weight: x.to(x.dtype),
    "contiguous": lambda x, weight: x.t().contiguous(),
    "empty": lambda x, weight: x.new_empty((3, 2), dtype=torch.float64),
    "like": lambda x, weight: torch.empty_like(x.t()),
    "strided": lambda x, weight: torch.empty_strided((2, 2), (8, 1), device=x.device),
    "two results": lambda x, weight: torch.topk(x, 2),
    "into another": lambda x, weight: torch.mul(x, 2.0, out=x.new_empty(x.shape)),
    "into itself": lambda x, weight: torch.mul(x, 2.0, out=x),
    "itself onto itself": lambda x, weight: x.copy_(x),
    "list in place": lambda x, weight: torch._foreach_mul_([x, weight], 2.0),
    "list": lambda x, weight: torch._foreach_mul([x, weight], 2.0),
    "sum": lambda x, weight: x.sum([0, 1]),
    "number": lambda x, weight: x.float().mean().div(3),
    "our own": lambda x, weight: rms_norm(x, weight[0], 1e-6, 0.0),
    "our own in place": lambda x, weight: rotate_(x.view(ROWS, 2, 4), x[:, :4].clone(), x[:, 4:].clone(), False),
    "resized": lambda x, weight: x.new_empty(4).resize_(2),
    "resized in place": lambda x, weight: (x.resize_(2, 8), x.unsqueeze_(0)),
    "set": lambda x, weight: x.set_(weight.untyped_storage()),
    "random": lambda x, weight: torch.rand_like(x),
    "looked up": lambda x, weight: x.index_select(0, torch.zeros(3, dtype=torch.int64, device=x.device)),
}


def told(result: Any, given: dict[int, int]) -> Any:
    """Of tensors, in lists too, the form, and whose storage it is: that of which argument, or how large a new one."""
    if isinstance(result, list | tuple):
        return [type(result).__name__, *(told(one, given) for one in result)]
    if not isinstance(result, Tensor):
        return result
    storage = result.untyped_storage()
    owner = given.get(storage._cdata, "new")
    form = (result.shape, result.stride(), result.storage_offset(), result.dtype, result.device, result.requires_grad)
    return (*form, owner, storage.nbytes(), result._version if owner != "new" else None)


def answered(call: Call, device: torch.device) -> Any:
    x, weight = torch.empty(ROWS, COLUMNS, device=device), torch.empty(COLUMNS, COLUMNS, device=device)
    given = {tensor.untyped_storage()._cdata: place for place, tensor in enumerate((x, weight))}
    result = call(x, weight)
    is_itself = [result is x, result is weight]
    return [told(result, given), is_itself, told((x, weight), given)]


@pytest.mark.parametrize("is_on_cpu", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_an_answer_is_what_the_operation_says(name: str, is_on_cpu: bool) -> None:
    device = torch.device("cpu") if is_on_cpu else python_accelerator()
    assert device is not None
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    results = FakeResults(mode)
    with mode:
        expected = answered(CALLS[name], device)
        with results:
            assert answered(CALLS[name], device) == expected
            assert answered(CALLS[name], device) == expected


def asked(results: FakeResults, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """How often a call reaches fake kernels."""
    count = 0
    dispatch = FakeTensorMode.dispatch

    def counted(mode: FakeTensorMode, func: Any, *args: Any) -> Any:
        nonlocal count
        count += func is not torch.ops.prim.device.default
        return dispatch(mode, func, *args)

    with monkeypatch.context() as patched, results:
        patched.setattr(FakeTensorMode, "dispatch", counted)
        call()
    return count


@pytest.mark.parametrize("name", ["product", "product in place", "transposed", "split", "our own", "joined"])
def test_an_operation_is_asked_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mode = FakeTensorMode()
    results = FakeResults(mode)
    with mode:
        x, weight = torch.empty(ROWS, COLUMNS), torch.empty(COLUMNS, COLUMNS)
        assert asked(results, lambda: CALLS[name](x, weight), monkeypatch) > 0
        assert asked(results, lambda: CALLS[name](x, weight), monkeypatch) == 0


def test_new_storages_are_new_each_time() -> None:
    mode = FakeTensorMode()
    with mode, FakeResults(mode):
        x = torch.empty(ROWS, COLUMNS)
        made = [x * 2.0 for _ in range(3)]
    assert len({tensor.untyped_storage()._cdata for tensor in (x, *made)}) == 4


def test_numbers_are_told_apart_by_their_types() -> None:
    mode = FakeTensorMode()
    with mode, FakeResults(mode):
        whole = torch.empty(3, dtype=torch.int64)
        assert [(whole * factor).dtype for factor in (1, 1.0, True, 1)] == [
            torch.int64, torch.float32, torch.int64, torch.int64,
        ]  # fmt: skip


def test_numbers_that_are_known_stay_known() -> None:
    mode = FakeTensorMode()
    with mode, FakeResults(mode):
        assert [(torch.tensor(number) + 1).item() for number in (3, 4)] == [4, 5]


def test_what_depends_on_values_fails_each_time() -> None:
    mode = FakeTensorMode()
    with mode, FakeResults(mode):
        x = torch.empty(ROWS)
        for _ in range(2):
            with pytest.raises(Exception, match="nonzero"):
                torch.nonzero(x)


def test_a_tensor_of_another_mode_is_not_taken_for_ours() -> None:
    own, other = FakeTensorMode(), FakeTensorMode()
    with other:
        strange = torch.empty(ROWS, COLUMNS)
    with own, FakeResults(own):
        assert (torch.empty(ROWS, COLUMNS) + 1.0).shape == (ROWS, COLUMNS)
        with pytest.raises(AssertionError, match="fake"):
            strange + 1.0


def traced(planner: Planner, levers: Levers, num_recomputed: int, num_offloaded: int) -> TrainingTrace:
    with pulled(planner.dry, levers):
        return trace_training(
            planner.dry,
            replace(planner.settings, rank=RANK),
            adapter_dtype=planner.adapter_dtype,
            num_tokens=2 * SEQ_LEN,
            document_lengths=(SEQ_LEN,),
            rows=1,
            num_recomputed=num_recomputed,
            num_offloaded=num_offloaded,
            loss_chunk_tokens=64,
            alignment_bytes=1,
        )


HALF_KEPT = (Levers(), NUM_LAYERS // 2, 1)
ALL_PULLED = (Levers(tile_tokens=SEQ_LEN, embedding_residency="host"), NUM_LAYERS, NUM_LAYERS)


@pytest.mark.parametrize(
    "name, device, overrides, how",
    [
        ("llama", "accelerator", [], ALL_PULLED),
        pytest.param("gemma2", "accelerator", [], HALF_KEPT, marks=pytest.mark.slow),
        pytest.param(
            *("qwen3", "accelerator", ["lora.use_dora=true", "lora.dropout=0.1"], ALL_PULLED), marks=pytest.mark.slow
        ),
        ("olmo3", "cpu", ["lora.modules_to_save=[embed_tokens, lm_head]"], HALF_KEPT),
    ],
)
def test_a_trace_is_the_same_where_every_operation_is_asked(
    name: str, device: str, overrides: list[str], how: tuple[Levers, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every allocation and release, in order."""
    planner = make_planner(name, BUDGETS[device], *overrides)
    remembered = traced(planner, *how)
    monkeypatch.setattr(FakeResults, "of", lambda _, func, args, kwargs: func(*args, **kwargs))
    assert traced(planner, *how) == remembered
    assert remembered.levels[-1].peak_bytes > 0

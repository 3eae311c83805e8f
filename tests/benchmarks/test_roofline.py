"""The products of a step: all are written down, and made again at their shapes. Nothing is timed here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.roofline import ratios, table
from benchmarks.roofline_products import Looks, Product, ProductRecorder, Replay, num_flops
from benchmarks.roofline_step import LEARNING_RATE, RealStep, StepSpec, told_products
from qlora_trainer.planning.tracker import StorageTracker
from qlora_trainer.step.optimizer import AdapterOptimizer
from tests.model.tiny_bases import small_config
from tests.model.tiny_models import load_for_training, prepare


def _step(folder: Path, *, is_recomputed: bool) -> RealStep:
    base, cache = prepare(folder / "base", small_config("llama"))
    spec = StepSpec(
        model="", lengths=(40, 24), micro_batch_tokens=64, rank=4, loss_chunk_tokens=16, is_recomputed=is_recomputed
    )
    return RealStep(spec, load_for_training(base, cache), base.config.vocab_size)


def _recorded(step: RealStep) -> list[Product]:
    recorder = ProductRecorder()
    with recorder:
        step.run()
    return recorder.products


def test_a_step_is_updated_as_a_run_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With loss and norm, by which the update is not done where they are not finite: a pass over the gradient."""
    step, updates, working = _step(tmp_path, is_recomputed=False), list[tuple[Any, ...]](), AdapterOptimizer.update

    def update(self: AdapterOptimizer, *arguments: Any) -> None:
        updates.append(arguments)
        working(self, *arguments)

    monkeypatch.setattr(AdapterOptimizer, "update", update)

    assert step.run() > 0.0

    ((rate, loss_and_norm),) = updates
    assert rate == LEARNING_RATE
    assert loss_and_norm.shape == (2,)
    assert (loss_and_norm > 0.0).all()


@pytest.mark.parametrize("is_recomputed", [False, True])
def test_the_products_of_a_step_are_those_that_the_planner_counts_and_the_heads(
    tmp_path: Path, is_recomputed: bool
) -> None:
    """The planner's tracker sees all but what is inside the loss, whose logits are made once and go back once."""
    step = _step(tmp_path, is_recomputed=is_recomputed)
    tracker = StorageTracker(record_work=True)
    with tracker:
        step.run()
    counted = sum(work.flops for work in tracker.work)
    head = step.model.head.weight
    heads = 2 * 2 * step.num_supervised_tokens * head.numel()

    products = _recorded(step)

    assert counted > 0
    assert num_flops(products) == counted + heads


def test_recomputing_makes_more_products(tmp_path: Path) -> None:
    kept, again = (_recorded(_step(tmp_path / str(value), is_recomputed=value)) for value in (False, True))

    assert num_flops(again) > num_flops(kept)


def test_products_are_made_again_at_their_shapes_and_layouts() -> None:
    x, weight, bias, batch = torch.randn(6, 5), torch.randn(7, 5), torch.randn(7), torch.randn(2, 3, 4)
    out = torch.zeros(6, 7)
    with ProductRecorder() as recorder, torch.no_grad():
        nn.functional.linear(x, weight)
        nn.functional.linear(x, weight, bias)
        out.addmm_(x, weight.t())
        out.addmm_(x, weight.t(), beta=0.0)
        torch.mm(x, weight.t(), out=torch.zeros(6, 14)[:, :7])
        torch.bmm(batch, batch.transpose(1, 2))
    products = recorder.products

    assert [product.kind for product in products] == ["fresh", "added", "in place", "fresh", "fresh", "fresh"]
    assert products[1].added == Looks((7,), (1,))
    assert products[4].out == Looks((6, 7), (14, 1))
    assert products[0].right == Looks((5, 7), (1, 5))
    assert [product.name for product in products][::2] == ["6 x 5 x 7T", "6 x 5 x 7T +=", "6 x 5 x 7T"]
    assert num_flops(products) == 5 * 2 * 6 * 5 * 7 + 2 * 2 * 3 * 4 * 3
    for dtype in (torch.float32, torch.bfloat16):
        replay = Replay(products, dtype, pool_bytes=1)
        with ProductRecorder() as again:
            replay.run()
        assert num_flops(again.products) == num_flops(products)
        assert {product.dtype for product in again.products} == {str(dtype).removeprefix("torch.")}
        assert [product.left for product in again.products] == [product.left for product in products]


def test_a_product_that_is_not_known_is_not_counted_as_none() -> None:
    with ProductRecorder(), pytest.raises(RuntimeError, match="aten::mv: a product that is not written down"):
        torch.mv(torch.zeros(2, 3), torch.zeros(3))


def test_tensors_of_a_kind_are_taken_in_turn() -> None:
    one = torch.zeros(8, 8)
    with ProductRecorder() as recorder:
        for _ in range(5):
            torch.mm(one, one)
    set_bytes = 3 * 64 * 4

    replay = Replay(recorder.products, torch.float32, pool_bytes=2 * set_bytes + 1)

    pointers = [call.args[0].data_ptr() for call in replay._calls]  # type: ignore[attr-defined]
    assert len(set(pointers)) == 2
    assert pointers == [pointers[0], pointers[1], pointers[0], pointers[1], pointers[0]]


def test_the_floor_is_that_of_the_faster_dtype_and_the_ratio_a_median_of_rounds() -> None:
    found = ratios(_measured())

    assert found["best_dtype"] == "bfloat16"
    assert found["ratio"] == pytest.approx(3.0)
    assert (found["ratio_from"], found["ratio_to"]) == pytest.approx((3.0, 4.0))
    assert (found["step_seconds_median"], found["step_seconds_from"], found["step_seconds_to"]) == (2.0, 1.5, 3.0)
    assert found["ratio_in_own_dtype"] == pytest.approx(1.5)
    assert found["tokens_per_second"] == pytest.approx(1000.0)


def _measured() -> dict[str, Any]:
    return {
        "step_seconds": [2.0, 3.0, 1.5],
        "floor_seconds": {"float32": [1.0, 2.0, 1.5], "bfloat16": [0.5, 1.0, 0.5]},
        "compute_dtype": "float32",
        "gflop": 10.0,
        "num_tokens": 2000,
        "products": [],
    }


def test_the_table_shows_both_policies_and_the_longest_products() -> None:
    products = [Product("fresh", Looks((2, 3), (3, 1)), Looks((3, 4), (4, 1)), Looks((2, 4), (4, 1)), None, "float32")]
    replays = {name: Replay(products, getattr(torch, name)) for name in ("float32", "bfloat16")}
    measured = _measured() | {"products": told_products(products * 2, replays)}
    report = {"machine_in_words": "2 cores", "model": "tiny", "lengths": [2], "micro_batch_tokens": 2, "rank": 1}
    report |= {"rounds": 3, "keep": measured | ratios(measured), "recompute": measured | ratios(measured)}

    text = table(report)

    assert "| keep | 2.000 [1.500 to 3.000] | float32 | 1,000 | 1.500 | 0.500 | 10 | 3.00 [3.00 to 4.00] (bf" in text
    assert "| 2 x 3 x 4 | 2 | 0.0 |" in text

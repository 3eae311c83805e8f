"""What the tracker counts, and that it counts the same on fake tensors as on real ones."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora_trainer.hardware.python_accelerator import python_accelerator
from qlora_trainer.model.activation_policy import decoder_layers, recompute_layers
from qlora_trainer.model.adapters import attach_adapters, initial_weights, trainable_parameters
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.planning.dry_model import build_dry_model
from qlora_trainer.planning.full_trace import trace_training
from qlora_trainer.planning.inside import bytes_of, inside_bytes
from qlora_trainer.planning.shallow_trace import full_micro_batch, marking
from qlora_trainer.planning.timeline import read_levels
from qlora_trainer.planning.tracker import StorageTracker, TensorSpec, args_spec, product_flops
from qlora_trainer.step.train_step import accumulate_gradients
from tests.model.tiny_bases import small_config
from tests.model.tiny_models import load_for_training, prepare

CPU = torch.device("cpu")


def accelerator() -> torch.device:
    device = python_accelerator()
    assert device is not None
    return device


def test_a_storage_is_counted_once_and_its_views_are_free() -> None:
    with StorageTracker() as tracker:
        table = torch.empty(10, 20)
        views = [table.t(), table[2:], table.view(-1), table.unsqueeze(0), *table.split(3), table.detach(), table.data]
        same = [table.contiguous(), table.to(torch.float32), table.reshape(20, 10), table.expand(4, 10, 20)]
    assert len(views) + len(same) == 14
    assert tracker.events.num_bytes == [800]
    assert tracker.live_bytes == tracker.peak_bytes == 800


def test_a_copy_is_counted() -> None:
    with StorageTracker() as tracker:
        table = torch.empty(10, 20)
        turned = table.t().contiguous()
        narrow = table.to(torch.bfloat16)
    assert turned.numel() == narrow.numel()
    assert tracker.events.num_bytes == [800, 800, 400]


def test_every_result_of_an_operation_is_counted() -> None:
    with StorageTracker() as tracker:
        values, indices = torch.topk(torch.empty(8), 2)
        doubled = torch._foreach_mul([values, values], 2.0)
    assert indices.numel() == len(doubled)
    assert tracker.events.num_bytes == [32, 8, 16, -32, 8, 8]


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.add_(1.0),
        lambda x: x.relu_(),
        lambda x: x[2:].mul_(2.0),
        lambda x: torch.mul(x, 2.0, out=x),
        lambda x: torch._foreach_add_([x], 1.0),
        lambda x: x.zero_(),
        lambda x: x.copy_(x),
    ],
)
@pytest.mark.parametrize("is_made_inside", [True, False])
def test_what_works_in_place_makes_nothing(change: Callable[[Tensor], object], is_made_inside: bool) -> None:
    tracker = StorageTracker()
    x = torch.ones(4)
    with tracker:
        if is_made_inside:
            x = torch.ones(4)
        change(x)
    assert tracker.live_bytes == (16 if is_made_inside else 0)
    assert len(tracker.events.num_bytes) == is_made_inside


def test_what_was_there_before_is_not_counted() -> None:
    before = torch.ones(4, 4)
    with StorageTracker() as tracker:
        views = before.t(), before[1:], before.detach(), before.contiguous()
        del views
    assert tracker.events.num_bytes == []


def test_a_storage_is_released_with_its_last_view() -> None:
    with StorageTracker() as tracker:
        table = torch.empty(100)
        row = table[3:4]
        del table
        assert tracker.live_bytes == 400
        other = torch.empty(10)
        del row
        assert tracker.live_bytes == 40
        del other
    assert tracker.events.num_bytes == [400, 40, -400, -40]
    assert tracker.events.allocation == [0, 1, 0, 1]
    assert tracker.peak_bytes == 440


def test_what_autograd_keeps_is_alive() -> None:
    weight = torch.ones(4, requires_grad=True)
    with StorageTracker() as tracker:
        squared = (weight * 2.0).square()  # the doubled weight is kept for backward
        assert tracker.live_bytes == 32
        squared.sum().backward()
        assert weight.grad is not None
        del squared
    assert tracker.live_bytes == 16  # the gradient


def test_releases_are_noted_after_the_tracker_is_left() -> None:
    with StorageTracker() as tracker:
        table = torch.empty(100)
    del table
    assert tracker.events.num_bytes == [400, -400]
    assert tracker.live_bytes == 0


def test_the_peak_can_be_forgotten() -> None:
    with StorageTracker() as tracker:
        kept = torch.empty(10)
        torch.empty(100)
        assert tracker.peak_bytes == 440
        tracker.reset_peak()
        assert tracker.peak_bytes == tracker.live_bytes == kept.nbytes


def test_host_and_device_are_told_apart() -> None:
    device = accelerator()
    with FakeTensorMode(), StorageTracker(device_type=device.type) as tracker:
        on_device = torch.empty(100, device=device)
        on_host = torch.empty(50)
        moved = on_device.cpu()
        with pytest.raises(RuntimeError, match="device"):
            _ = on_device[:50] + on_host
        product = on_device * 2.0
        assert (product.device.type, moved.device.type) == (device.type, "cpu")
    sizes = [num_bytes for num_bytes in tracker.events.num_bytes if num_bytes > 0]
    assert tracker.live_bytes == tracker.peak_bytes == 800
    assert list(zip(sizes, tracker.events.is_device, strict=False)) == [
        (400, True),
        (200, False),
        (400, False),
        (400, True),
    ]
    assert tracker.live_by_category()["other"] == 800
    assert tracker.live_sizes() == {"other": [400, 400]}


def test_sizes_are_rounded_up_and_told_as_they_are() -> None:
    with StorageTracker(alignment_bytes=512, inside=lambda op, _: 1 if op == "aten::neg" else None) as tracker:
        tensors = [torch.empty(size, dtype=torch.uint8) for size in (1, 512, 513)]
        assert tracker.live_bytes == 512 + 512 + 1024
        assert tracker.live_by_category()["other"] == tracker.live_bytes
        assert tracker.live_sizes() == {"other": [1, 512, 513]}
        assert tracker.events.num_bytes == [1, 512, 513]
        negated = -tensors[0]
        assert tracker.peak_bytes == 512 + 512 + 1024 + 512 + 512  # the result, and one byte inside
        del negated, tensors
    assert tracker.live_bytes == 0


def test_categories_come_from_the_operation_else_from_the_caller_else_are_other() -> None:
    packed = torch.zeros(128, 1, dtype=torch.uint8)
    absmax = torch.ones(4)
    with StorageTracker() as tracker:
        first = torch.empty(1)
        with tracker.as_category("recompute"):
            second = torch.empty(2)
            with tracker.as_category("logits"):
                third = torch.empty(3)
            fourth = torch.empty(4)
            dense = torch.ops.bitsandbytes.dequantize_4bit.default(packed, absmax, 64, "nf4", (16, 16), torch.float32)
        fifth = torch.empty(5)
    assert {name: num for name, num in tracker.live_by_category().items() if num} == {
        "other": first.nbytes + fifth.nbytes,
        "recompute": second.nbytes + fourth.nbytes,
        "logits": third.nbytes,
        "dequant_workspace": dense.nbytes,
    }


def test_a_tag_moves_a_storage_to_its_category() -> None:
    with StorageTracker() as tracker:
        table = torch.empty(10, 10)
        other = torch.empty(10)
    tracker.tag([table.t(), None], "base")
    assert tracker.live_sizes() == {"base": [400], "other": [other.nbytes]}
    del table
    assert tracker.live_sizes() == {"other": [40]}


def test_an_unknown_category_is_refused() -> None:
    tracker = StorageTracker()
    with pytest.raises(ValueError, match="not in tuple"), tracker.as_category("weights"):
        pass


def test_inside_bytes_are_a_pair_of_events_on_top_of_what_is_alive() -> None:
    asked: list[tuple[str, tuple[Any, ...]]] = []

    def inside(op: str, args: tuple[Any, ...]) -> int | None:
        asked.append((op, args_spec(args)))
        return 1000 if op == "aten::mm" else None

    left = torch.ones(2, 3)
    with StorageTracker(inside=inside) as tracker:
        product = left @ torch.ones(3, 4)
        assert tracker.live_bytes == product.nbytes
        assert tracker.peak_bytes == 48 + product.nbytes + 1000
    spec = TensorSpec((2, 3), torch.float32, CPU)
    assert ("aten::mm", (spec, TensorSpec((3, 4), torch.float32, CPU))) in asked
    assert [op for op, _ in asked] == ["aten::ones", "aten::mm"]
    (found,) = tracker.insides
    assert (found.index, found.op, found.arguments[0]) == (2, "aten::mm", spec)
    assert tracker.events.num_bytes == [48, 32, 1000, -1000, -48]
    assert tracker.events.allocation == [0, 1, 2, 2, 0]


def test_inside_bytes_of_an_unpacking_are_its_category() -> None:
    packed, absmax = torch.zeros(128, 1, dtype=torch.uint8), torch.ones(4)
    with StorageTracker(inside=lambda *_: 7) as tracker:
        torch.ops.bitsandbytes.dequantize_4bit.default(packed, absmax, 64, "nf4", (16, 16), torch.float32)
    assert len(set(tracker.events.category)) == 1


def test_recorded_arguments_keep_nothing_alive() -> None:
    tensor = torch.ones(3)
    spec = args_spec([tensor, [1, 2], None, 0.5])
    gone = weakref.ref(tensor)
    del tensor
    gc.collect()
    assert gone() is None
    assert spec == (TensorSpec((3,), torch.float32, CPU), (1, 2), None, 0.5)
    assert hash(spec) == hash(args_spec([torch.zeros(3), [1, 2], None, 0.5]))


def test_marks_divide_the_events() -> None:
    with StorageTracker() as tracker:
        tracker.mark("first")
        kept = [torch.empty(1)]
        tracker.mark(("second", 0))
        kept += [torch.empty(2), torch.empty(3)]
        tracker.mark("third")
    assert tracker.events.marks == [(0, "first"), (1, ("second", 0)), (3, "third")]


def test_work_is_flops_of_products_and_bytes_of_the_rest() -> None:
    with StorageTracker(record_work=True) as tracker:
        left, right, bias = torch.ones(5, 3), torch.ones(3, 4), torch.ones(4)
        torch.addmm(bias, left, right)
        _ = left.t()
        _ = left * 2.0
    assert [(work.op, work.flops) for work in tracker.work[3:]] == [("aten::addmm", 2 * 5 * 3 * 4), ("aten::mul", 0)]
    assert tracker.work[4].moved == (60, 60)


@pytest.mark.parametrize(
    "name, args, expected",
    [
        ("aten::mm", (torch.ones(5, 3), torch.ones(3, 4)), 120),
        ("aten::bmm", (torch.ones(2, 5, 3), torch.ones(2, 3, 4)), 240),
        ("aten::addmm_", (torch.ones(5, 4), torch.ones(5, 3), torch.ones(3, 4)), 120),
        ("aten::baddbmm", (torch.ones(2, 5, 4), torch.ones(2, 5, 3), torch.ones(2, 3, 4)), 240),
        ("aten::mul", (torch.ones(5, 3), torch.ones(5, 3)), 0),
    ],
)
def test_flops_are_two_for_each_multiply_add(name: str, args: tuple[Tensor, ...], expected: int) -> None:
    assert product_flops(name, args) == expected


@pytest.mark.parametrize("name, num_recomputed", [("llama", 1), ("gemma2", 1), ("qwen3", 2), ("olmo3", 0)])
def test_fake_tensors_give_the_same_levels_as_real_ones(name: str, num_recomputed: int, tmp_path: Path) -> None:
    lengths, chunk = (40, 24), 16
    base, cache = prepare(tmp_path / "base", small_config(name))
    model = load_for_training(base, cache)
    settings = LoraSettings(rank=4, alpha=8.0, dropout=0.1, targets=tuple(model.linears))
    attach_adapters(model, settings, initial_weights(model, settings, seed=0), dtype=torch.bfloat16)
    for parameter in trainable_parameters(model).values():
        parameter.grad = torch.zeros(parameter.shape)
    recompute_layers(model, num_recomputed)
    batch = full_micro_batch(sum(lengths), lengths, CPU)
    real = StorageTracker(device_type="cpu", inside=inside_bytes)
    final_norm: Any = model.module.base_model.norm
    layers: Sequence[Any] = decoder_layers(model)
    with real, marking(real, layers, final_norm):
        accumulate_gradients(model, [batch], num_supervised_tokens=64, loss_chunk_tokens=chunk)

    dry = build_dry_model(base.config, double_quant=True, compute_dtype=torch.float32, device=CPU, alignment_bytes=1)
    fake = trace_training(
        dry,
        settings,
        adapter_dtype=torch.bfloat16,
        num_tokens=sum(lengths),
        document_lengths=lengths,
        rows=1,
        num_recomputed=num_recomputed,
        loss_chunk_tokens=chunk,
        alignment_bytes=1,
    ).levels
    assert read_levels(real, 1, bytes_of) == fake
    assert max(level.peak_bytes for level in fake) > 0

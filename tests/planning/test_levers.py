"""Levers by trace: host and device bytes apart, and prices that a full depth confirms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

from qlora_trainer.config.levers import Levers
from qlora_trainer.hardware.input_store import NUM_BUFFERS, HostInputs
from qlora_trainer.hardware.side_stream import SideStream
from qlora_trainer.model.adapters import trainable_parameters
from qlora_trainer.model.base_stream import layer_bytes, linears_of_layers
from qlora_trainer.model.offload import keep_least
from qlora_trainer.model.tables import embeddings_of, tables_of
from qlora_trainer.planning.dry_model import attach_dry_adapters
from qlora_trainer.planning.explain import would_fit
from qlora_trainer.planning.planner import Planner
from qlora_trainer.planning.price import Layout, Usage
from qlora_trainer.planning.pulled import pulled
from qlora_trainer.planning.search import Candidate
from qlora_trainer.planning.shallow_trace import full_micro_batch
from qlora_trainer.planning.throughput import Speed
from qlora_trainer.planning.tracker import StorageTracker
from qlora_trainer.step.train_step import accumulate_gradients
from tests.planning.test_price import BUDGETS, NUM_LAYERS, RANK, SEQ_LEN, make_planner

STREAMED = Levers(base_residency="streamed")


@pytest.fixture(scope="module")
def planners() -> Callable[[str, str], Planner]:
    """One of each, traced once."""
    return cache(lambda name, device: make_planner(name, BUDGETS[device]))


def layout(num_recomputed: int, num_offloaded: int, *, tokens: int = 512, levers: Levers | None = None) -> Layout:
    return Layout(
        rank=RANK,
        tokens=tokens,
        seq_len=SEQ_LEN,
        rows=1,
        num_recomputed=num_recomputed,
        loss_chunk=64,
        num_offloaded=num_offloaded,
        levers=levers or Levers(),
    )


def priced_and_traced(planner: Planner, own: Layout) -> tuple[Usage, Usage]:
    priced = planner.price(own, "adamw_32bit")
    return priced, planner.confirmed(Candidate(own, "adamw_32bit", priced, 1.0)).usage


@pytest.mark.parametrize("device", BUDGETS)
@pytest.mark.parametrize("num_recomputed, num_offloaded", [(NUM_LAYERS, NUM_LAYERS), (NUM_LAYERS, 2), (4, 4), (3, 1)])
def test_offloaded_inputs_are_priced_as_they_are_traced(
    num_recomputed: int, num_offloaded: int, device: str, planners: Callable[[str, str], Planner]
) -> None:
    priced, traced = priced_and_traced(planners("llama", device), layout(num_recomputed, num_offloaded))
    assert (traced.phases, traced.host_bytes) == (priced.phases, priced.host_bytes)


def test_every_offloaded_input_is_on_the_host_and_two_at_most_on_the_device(
    planners: Callable[[str, str], Planner],
) -> None:
    """The one that is used, and the one that comes, in two buffers, whatever the depth."""
    planner = planners("llama", "accelerator")
    hidden_bytes = 512 * planner.dry.model.module.config.hidden_size * 2
    kept = planner.price(layout(NUM_LAYERS, 0), "adamw_32bit")
    moved = planner.price(layout(NUM_LAYERS, NUM_LAYERS), "adamw_32bit")
    assert moved.host_bytes - kept.host_bytes == NUM_LAYERS * hidden_bytes
    assert kept.phases["loss"] - moved.phases["loss"] == (NUM_LAYERS - NUM_BUFFERS) * hidden_bytes
    # Where a file takes them no host memory is counted: it is the kernel's.
    assert planners("llama", "cpu").price(layout(NUM_LAYERS, NUM_LAYERS), "adamw_32bit").host_bytes == 0


def test_a_streamed_base_takes_two_layers_of_the_device_and_all_of_the_host(
    planners: Callable[[str, str], Planner],
) -> None:
    planner = planners("llama", "accelerator")
    layers = linears_of_layers(planner.dry.model)
    whole = planner.placed(Levers())
    streamed = planner.placed(STREAMED)
    of_base = ("base", "quant_state")
    packed_bytes = sum(layer_bytes(linears) for linears in layers)
    assert streamed.host_bytes - whole.host_bytes == packed_bytes
    saved = sum(whole.device[name] - streamed.device[name] for name in of_base)
    assert saved == pytest.approx((NUM_LAYERS - NUM_BUFFERS) / NUM_LAYERS * packed_bytes, rel=0.02)
    assert {name: whole.device[name] for name in whole.device if name not in of_base} == {
        name: streamed.device[name] for name in streamed.device if name not in of_base
    }
    on_cpu = planners("llama", "cpu")
    assert on_cpu.placed(STREAMED).host_bytes == 0
    one_layer = sum(on_cpu.placed(STREAMED).device[name] for name in of_base) - _of_no_layer(on_cpu)
    assert one_layer == pytest.approx(packed_bytes / NUM_LAYERS, rel=0.05, abs=2**18)


def _of_no_layer(planner: Planner) -> int:
    """Norms, offsets and the like, which stay."""
    layers = linears_of_layers(planner.dry.model)
    return sum(planner.placed(Levers()).device[name] for name in ("base", "quant_state")) - sum(
        layer_bytes(linears) for linears in layers
    )


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_step_with_a_streamed_base_allocates_what_one_without_does(
    name: str, planners: Callable[[str, str], Planner]
) -> None:
    """On the accelerator that exists in Python only: a weight that is not on the device raises. Its buffers are all
    that is new there, and every layer is on the host."""
    dry = planners(name, "accelerator").dry
    settings = planners(name, "accelerator").settings
    peaks = {}
    for is_streamed in (False, True):
        tracker = StorageTracker(device_type=dry.model.device.type)
        with dry.fake_mode, pulled(dry, STREAMED if is_streamed else Levers()):
            attach_dry_adapters(dry, settings, dtype=torch.bfloat16)
            for parameter in trainable_parameters(dry.model).values():
                parameter.grad = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
            keep_least(dry.model, 3, 2, HostInputs(SideStream(dry.model.device)))
            batch = full_micro_batch(256, (256,), dry.model.device)
            dry.model.module.train()
            with tracker:
                accumulate_gradients(dry.model, [batch], num_supervised_tokens=256, loss_chunk_tokens=64)
            devices = {linear.packed.device.type for linear in dry.model.linears.values()}
        peaks[is_streamed] = tracker.peak_bytes
        assert devices == ({"cpu", dry.model.device.type} if is_streamed else {dry.model.device.type})
    assert peaks[True] == peaks[False]
    assert {linear.packed.device.type for linear in dry.model.linears.values()} == {dry.model.device.type}, "put back"


def test_time_counts_the_link(planners: Callable[[str, str], Planner]) -> None:
    """Beside the work, it costs nothing until it takes longer; after it, it always does."""
    planner = planners("llama", "accelerator")
    plain, offloaded = layout(NUM_LAYERS, 0), layout(NUM_LAYERS, NUM_LAYERS)
    streamed = replace(plain, levers=STREAMED)

    def at(link_bytes: float, *, overlaps: bool, own: Layout) -> float:
        speed = replace(planner.budget.speed, link_bytes=link_bytes, link_overlaps=overlaps)
        return replace(planner, budget=replace(planner.budget, speed=speed)).estimate(own)

    for own in (offloaded, streamed):
        assert at(1e15, overlaps=True, own=own) == pytest.approx(planner.estimate(plain), rel=0.06)
        assert at(1e6, overlaps=True, own=own) < 0.5 * planner.estimate(plain)
        assert at(1e9, overlaps=False, own=own) < at(1e9, overlaps=True, own=own)
        assert at(1e8, overlaps=False, own=own) < at(1e9, overlaps=False, own=own)


def test_the_host_s_budget_limits_what_waits_there(planners: Callable[[str, str], Planner]) -> None:
    planner = planners("llama", "accelerator")
    used = planner.price(layout(NUM_LAYERS, NUM_LAYERS, levers=STREAMED), "adamw_32bit")
    assert used.host_bytes > 0
    needed = planner.needed_host_bytes(used)
    for missing, fits in ((0, True), (1, False)):
        budget = replace(planner.budget, host_budget_bytes=needed - missing)
        assert replace(planner, budget=budget).is_within(used) == fits


TILED, ON_HOST = Levers(tile_tokens=64), Levers(embedding_residency="host")


@pytest.mark.parametrize("device", BUDGETS)
@pytest.mark.parametrize(
    "name, num_recomputed, tokens, tile_tokens",
    [
        ("llama", NUM_LAYERS, 512, 64),
        ("llama", 3, 512, 100),
        ("llama", 4, 512, 512),
        ("gemma2", NUM_LAYERS, 512, 256),
    ],
)
def test_tiles_are_priced_as_they_are_traced(
    name: str, num_recomputed: int, tokens: int, tile_tokens: int, device: str, planners: Callable[[str, str], Planner]
) -> None:
    """One trace, at tiles of the probe's, is good for any size of them."""
    own = layout(num_recomputed, 0, tokens=tokens, levers=Levers(tile_tokens=tile_tokens))
    priced, traced = priced_and_traced(planners(name, device), own)
    for phase, num_bytes in traced.phases.items():
        assert priced.phases[phase] == pytest.approx(num_bytes, rel=5e-3), phase
        assert priced.phases[phase] >= 0.99 * num_bytes


@pytest.mark.parametrize("device", BUDGETS)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_tables_on_the_host_are_priced_as_they_are_traced(
    name: str, device: str, planners: Callable[[str, str], Planner]
) -> None:
    planner = planners(name, device)
    whole = planner.price(layout(2, 0), "adamw_32bit")
    priced, traced = priced_and_traced(planner, layout(2, 0, levers=ON_HOST))
    assert (traced.phases, traced.host_bytes) == (priced.phases, priced.host_bytes)
    table_bytes = sum(table.nbytes for table in tables_of(planner.dry.model))
    saved = whole.resident["embedding"] - priced.resident["embedding"]
    if device == "cpu":  # the pages of a block stay
        assert 0 <= saved < table_bytes
        assert priced.host_bytes == 0
    else:
        assert saved == pytest.approx(table_bytes, rel=1e-3)
        assert priced.host_bytes - whole.host_bytes == table_bytes


@pytest.mark.parametrize("device", BUDGETS)
@pytest.mark.parametrize("is_on_host", [False, True])
def test_a_head_in_nf4_is_priced_as_it_is_traced(
    is_on_host: bool, device: str, planners: Callable[[str, str], Planner]
) -> None:
    """It takes 0.516 of a byte an element, wherever it lives; its scales are on the device."""
    planner = planners("llama", device)
    residency = ON_HOST if is_on_host else Levers()
    dense = planner.price(layout(2, 0, levers=residency), "adamw_32bit")
    priced, traced = priced_and_traced(planner, layout(2, 0, levers=replace(residency, nf4_head=True)))
    assert (traced.phases, traced.host_bytes) == (priced.phases, priced.host_bytes)
    head = planner.dry.model.head
    assert head.weight.dtype == torch.bfloat16, "put back"
    num_elements = head.out_features * head.in_features
    saved = {name: dense.resident[name] - priced.resident[name] for name in dense.resident}
    scales_bytes = num_elements // 64 + num_elements // 64 // 256 * 4
    assert -saved.pop("quant_state") == pytest.approx(scales_bytes, abs=2 * 512)
    of_tables = saved.pop("embedding")
    assert set(saved.values()) == {0}
    on_host = dense.host_bytes - priced.host_bytes
    if is_on_host:
        assert of_tables == 0  # on a CPU a block of the larger table, which is the embedding
        assert on_host == (0 if device == "cpu" else 1.5 * num_elements)
    else:
        assert (of_tables, on_host) == (1.5 * num_elements, 0)


def test_a_head_in_nf4_is_unpacked_once_more_for_each_chunk(planners: Callable[[str, str], Planner]) -> None:
    """And of one on the host a quarter goes over the link."""
    planner = planners("llama", "accelerator")
    packed = layout(2, 0, levers=Levers(nf4_head=True))

    def at(own: Layout, speed: Speed) -> float:
        return replace(planner, budget=replace(planner.budget, speed=speed)).estimate(own)

    fast = planner.budget.speed
    slow = replace(fast, unpacked_elements=fast.unpacked_elements / 1000)
    lost = {name: 1 / at(own, slow) - 1 / at(own, fast) for name, own in (("dense", layout(2, 0)), ("packed", packed))}
    assert lost["packed"] > lost["dense"]
    few, many = (1 / at(replace(packed, loss_chunk=chunk), slow) for chunk in (512, 64))
    assert many > few
    on_host = [replace(own, levers=replace(own.levers, embedding_residency="host")) for own in (layout(2, 0), packed)]
    dense_speed, packed_speed = (at(own, replace(fast, link_bytes=1e6)) for own in on_host)
    assert packed_speed == pytest.approx(4 * dense_speed, rel=0.01)


def test_a_table_that_is_on_the_host_unknown_to_its_module_fails(planners: Callable[[str, str], Planner]) -> None:
    """A tensor on the wrong device is told by the accelerator, as by a GPU."""
    planner = planners("llama", "accelerator")
    model = planner.dry.model
    with pulled(planner.dry, ON_HOST), planner.dry.fake_mode:
        model.head.is_on_host = False
        for embedding in embeddings_of(model):
            embedding.device = None
        attach_dry_adapters(planner.dry, planner.settings, dtype=torch.bfloat16)
        with pytest.raises(RuntimeError, match="device"):
            accumulate_gradients(
                model,
                [full_micro_batch(64, (64,), model.device)],
                num_supervised_tokens=64,
                loss_chunk_tokens=64,
            )


def test_an_optimizer_on_the_host_takes_nothing_of_the_device(planners: Callable[[str, str], Planner]) -> None:
    planner = planners("llama", "accelerator")
    whole = planner.price(layout(2, 0), "adamw_32bit")
    moved = planner.price(layout(2, 0, levers=Levers(optimizer_on_host=True)), "adamw_32bit")
    assert moved.resident["optimizer"] == 0
    assert moved.host_bytes - whole.host_bytes == pytest.approx(whole.resident["optimizer"], rel=1e-3)
    assert moved.resident["adapter"] == whole.resident["adapter"]  # bf16: they were there before
    assert moved.phases["optimizer"] < whole.phases["optimizer"]


def test_levers_are_given_up_in_their_order(planners: Callable[[str, str], Planner]) -> None:
    """Mutation tried: a head in NF4 among what a plan may pull."""
    pullable = ["tile_tokens", "optimizer_on_host", "embedding_residency", "base_residency"]
    for device, expected in (("accelerator", pullable), ("cpu", [pullable[0], *pullable[2:]])):
        planner = planners("llama", device)
        assert list(planner.pullable()) == expected
        assert [lever.name for lever in planner.levers()] == ["offload", *expected]
        memory = planner.config.memory.model_copy(update={"tile_tokens": 64, "base_residency": "device"})
        pinned = replace(planner, config=planner.config.model_copy(update={"memory": memory}))
        assert [lever.name for lever in pinned.levers()] == ["offload", *expected[1:-1]]
        assert pinned.space(RANK, SEQ_LEN).levers == Levers(tile_tokens=64)


def offered(planner: Planner, own: Layout) -> list[str]:
    """Where any single change is enough."""
    least = Candidate(own, "paged_adamw_32bit", planner.price(own, "paged_adamw_32bit"), 1.0)
    changes = would_fit(least, planner, process_bytes=2**34, host_bytes=0)
    return [change.knob for change in changes]


def test_what_would_fit_is_offered_in_the_order_of_giving_up(
    planners: Callable[[str, str], Planner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What costs time before what is learned otherwise; that before what was asked to be learned."""
    used = planners("llama", "accelerator").price(layout(2, 0), "adamw_32bit")
    monkeypatch.setattr(Planner, "price", lambda *_: used)  # what each of them takes is others' to test
    of_optimizer_and_head = ["training.optimizer", "quantization.head"]
    levers = ["tile_tokens", "optimizer_residency", "embedding_residency", "base_residency", "loss_chunk_tokens"]
    expected = [f"memory.{key}" for key in ("micro_batch_tokens", "activation_checkpointing", *levers)]
    expected += [*of_optimizer_and_head, "data.seq_len", "lora.rank", "--vram"]
    planner = planners("llama", "accelerator")
    kept = replace(layout(0, 0, tokens=1024), loss_chunk=256)
    assert offered(planner, kept) == expected
    recomputed = replace(kept, num_recomputed=NUM_LAYERS)
    expected[1] = "memory.activation_offload"
    assert offered(planner, recomputed) == expected
    # Not where it would save nothing, is there already, or there is none.
    for without, own in (
        (planner, replace(recomputed, levers=ON_HOST)),
        (planner, replace(recomputed, levers=Levers(nf4_head=True))),
        (planners("gemma2", "accelerator"), recomputed),
    ):
        assert "quantization.head" not in offered(without, own)

"""What is put together from the parts of a shallow trace, against a trace at full depth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedConfig

from qlora_trainer.config.levers import NO_LEVERS
from qlora_trainer.config.load import load_config
from qlora_trainer.hardware.device_memory import cpu_memory
from qlora_trainer.planning.budget import Budget, gpu_budget
from qlora_trainer.planning.document_lengths import DocumentLengths
from qlora_trainer.planning.full_trace import without_collector
from qlora_trainer.planning.planner import Planner
from qlora_trainer.planning.price import PHASES, Layout, Usage, usage
from qlora_trainer.planning.search import Candidate, layout_of
from qlora_trainer.planning.state_trace import StateTrace
from qlora_trainer.planning.timeline import Level
from qlora_trainer.planning.tracker import CATEGORIES
from qlora_trainer.planning.trained import trained_at
from tests.model.tiny_bases import CONFIGS, small_config

NUM_LAYERS, SEQ_LEN, RANK = 6, 256, 16
GPU = gpu_budget(None, 2**33)
CPU = replace(GPU, kind="cpu", compute_dtype="float32", memory=cpu_memory(), host_budget_bytes=2**33)
BUDGETS = {"accelerator": GPU, "cpu": CPU}


def cases(*fast: tuple[str, str]) -> pytest.MarkDecorator:
    """Every architecture on either device: these, and the others when there is time."""
    every = [(name, device) for name in CONFIGS for device in BUDGETS]
    return pytest.mark.parametrize(
        "name, device", [pytest.param(*case, marks=() if case in fast else pytest.mark.slow) for case in every]
    )


# Norms behind the products (olmo3, gemma3) keep something of a layer that only the next one's recomputation shows.
MAX_MIXED, MAX_RECOMPUTED = {"olmo3": 0.012}, {"olmo3": 0.007, "gemma3": 0.005}


def config_of(name: str) -> PreTrainedConfig:
    """Six layers, the kinds in turns where an architecture has two."""
    config = small_config(name, num_hidden_layers=NUM_LAYERS, hidden_size=256, intermediate_size=512, vocab_size=2048)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        config.layer_types = [kinds[0], kinds[-1]] * (NUM_LAYERS // 2)
    if hasattr(config, "no_rope_layers"):
        config.no_rope_layers = [1, 1, 1, 0, 1, 1]
    return config


def make_planner(name: str, budget: Budget, *overrides: str) -> Planner:
    config = load_config(None, ["model.base=x", "data.train=x.jsonl", f"data.seq_len={SEQ_LEN}", *overrides])
    with without_collector():
        documents = DocumentLengths.of_full_length(SEQ_LEN, global_batch_size=16)
        return Planner.of(config, budget, config_of(name), documents, packing=True)


@pytest.fixture(scope="module")
def planners() -> Callable[[str, str], Planner]:
    """One of each, traced once."""
    return cache(lambda name, device: make_planner(name, BUDGETS[device]))


def priced_and_traced(
    planner: Planner, tokens: int, num_recomputed: int, loss_chunk: int, optimizer: str = "adamw_32bit"
) -> tuple[Usage, Usage]:
    layout = layout_of(planner.space(RANK, SEQ_LEN), tokens, loss_chunk, num_recomputed)
    priced = planner.price(layout, optimizer)
    return priced, planner.confirmed(Candidate(layout, optimizer, priced, 1.0)).usage


def require_equal_bytes(priced: Usage, traced: Usage) -> None:
    assert priced.phases == traced.phases
    assert priced.peak_phase == traced.peak_phase
    assert priced.resident == traced.resident


@cases(("llama", "cpu"), ("gemma2", "accelerator"))
def test_every_layer_recomputed(name: str, device: str, planners: Callable[[str, str], Planner]) -> None:
    priced, traced = priced_and_traced(planners(name, device), 256, NUM_LAYERS, 64)
    if name in MAX_RECOMPUTED:
        assert priced.peak_bytes == pytest.approx(traced.peak_bytes, rel=MAX_RECOMPUTED[name])
    else:
        require_equal_bytes(priced, traced)


@cases(("llama", "cpu"), ("phi", "cpu"), ("gemma2", "accelerator"))
def test_every_layer_kept(name: str, device: str, planners: Callable[[str, str], Planner]) -> None:
    priced, traced = priced_and_traced(planners(name, device), 1024, 0, 64)
    require_equal_bytes(priced, traced)


@cases(("llama", "cpu"))
@pytest.mark.parametrize("tokens, num_recomputed, loss_chunk", [(512, 3, 256), (1024, 1, 1024)])
def test_some_layers_recomputed(
    name: str,
    device: str,
    tokens: int,
    num_recomputed: int,
    loss_chunk: int,
    planners: Callable[[str, str], Planner],
) -> None:
    priced, traced = priced_and_traced(planners(name, device), tokens, num_recomputed, loss_chunk)
    assert priced.peak_bytes == pytest.approx(traced.peak_bytes, rel=MAX_MIXED.get(name, 0.0))


TARGETS = {
    "mlp": "[gate_proj, up_proj, down_proj]",
    "o_proj": "[o_proj]",
    "down_proj": "[down_proj]",
    "upper": r"'.*\.[2-5]\..*'",
    "upper-mlp": r"'.*\.[1-5]\.mlp\..*'",
    "scattered": r"'.*\.[24]\..*'",
    "last": r"'.*\.5\.self_attn\.v_proj'",
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("accelerator", marks=pytest.mark.slow)])
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_targets_that_leave_the_first_layers_attention_untrained(targets: str, device: str) -> None:
    """Where no gradient comes, nothing is kept and nothing goes back, recomputed or not.

    Fails where the query is looked for in the first layer's backward, or layers below the first adapter are taken for
    layers between adapters.
    """
    planner = make_planner("llama", BUDGETS[device], f"lora.target_modules={targets}")
    for num_recomputed in (0, 1, 3, NUM_LAYERS):
        priced, traced = priced_and_traced(planner, 512, num_recomputed, 64)
        require_equal_bytes(priced, traced)


@pytest.mark.parametrize(
    "targets, passes",
    [("mlp", [(1.0, 3.5), (2.0, 4.5)]), ("last", [(1.0, 1.0), (1.0, 1.0)]), (None, [(3.5, 3.5), (4.5, 4.5)])],
)
def test_attention_is_timed_as_often_as_it_is_computed(targets: str | None, passes: list[tuple[float, float]]) -> None:
    """Of the first two layers, kept and recomputed. Fails where every layer is taken for one with a backward."""
    overrides = [] if targets is None else [f"lora.target_modules={TARGETS[targets]}"]
    parts = make_planner("llama", CPU, *overrides).prices(RANK, NO_LEVERS).parts
    found = [
        tuple(parts.of_layer(index, policy).attention_passes for index in (0, 1)) for policy in ("keep", "recompute")
    ]
    assert found == passes


def test_a_length_that_is_no_multiple_of_the_documents(planners: Callable[[str, str], Planner]) -> None:
    """The longest document decides; a shorter one at the end needs less."""
    priced, traced = priced_and_traced(planners("llama", "cpu"), 640, NUM_LAYERS, 64)
    assert priced.peak_bytes == traced.peak_bytes


def require_consistent(used: Usage) -> None:
    assert tuple(used.phases) == PHASES
    assert used.peak_bytes == max(used.phases.values()) == used.phases[used.peak_phase]
    assert tuple(used.breakdown) == tuple(used.resident) == CATEGORIES
    assert sum(used.breakdown.values()) == used.peak_bytes
    assert min(*used.breakdown.values(), *used.resident.values(), *used.phases.values()) >= 0
    resident_bytes = sum(used.resident.values())
    assert all(num_bytes >= resident_bytes for phase, num_bytes in used.phases.items() if phase != "load")


@pytest.mark.parametrize("device", BUDGETS)
@pytest.mark.parametrize("optimizer", ["adamw_32bit", "adamw_8bit", "paged_adamw_32bit"])
def test_sums_are_sums_and_the_peak_is_the_largest_phase(
    device: str, optimizer: str, planners: Callable[[str, str], Planner]
) -> None:
    planner = planners("gemma2" if device == "accelerator" else "llama", device)
    space = planner.space(RANK, SEQ_LEN)
    for tokens in (256, 1024, 4096):
        for num_recomputed in (0, 2, NUM_LAYERS):
            for loss_chunk in (64, 4096):
                used = planner.price(layout_of(space, tokens, loss_chunk, num_recomputed), optimizer)
                require_consistent(used)
                if used.peak_phase in ("loss", "backward"):
                    assert used.breakdown["saved_activation"] > 0


def test_what_grows_with_a_knob(planners: Callable[[str, str], Planner]) -> None:
    planner = planners("llama", "cpu")
    layout = layout_of(planner.space(RANK, SEQ_LEN), 512, 64, 3)

    def peak_bytes(changed: Layout, optimizer: str = "adamw_32bit") -> int:
        return planner.price(changed, optimizer).peak_bytes

    assert peak_bytes(replace(layout, tokens=576)) > peak_bytes(layout)
    assert peak_bytes(replace(layout, num_recomputed=4)) < peak_bytes(layout)
    assert peak_bytes(replace(layout, rank=64)) > peak_bytes(layout)
    assert peak_bytes(replace(layout, loss_chunk=512)) > peak_bytes(layout)
    # Master (32 bits) and two moments, of 32 or of 8 bits and a scale for 256 elements.
    num_elements = planner.trained(RANK).num_elements
    saved = peak_bytes(layout) - peak_bytes(layout, "adamw_8bit")
    assert saved == pytest.approx(6 * num_elements - 8 * num_elements / 256, abs=4096)


def test_an_fp32_adapter_is_its_own_master(planners: Callable[[str, str], Planner]) -> None:
    planner = planners("llama", "cpu")
    layout = layout_of(planner.space(RANK, SEQ_LEN), 256, 64, NUM_LAYERS)
    num_elements = sum(math.prod(shape) for shape in planner.trained(RANK).shapes.values())
    in_16_bits = planner.price(layout, "adamw_32bit").resident
    of_32_bits = partial(
        trained_at,
        dry=planner.dry,
        settings=planner.settings,
        memory=planner.budget.memory,
        adapter_dtype=torch.float32,
    )
    wide = replace(planner, adapter_dtype=torch.float32, trained=of_32_bits)
    in_32_bits = wide.price(layout, "adamw_32bit").resident
    assert (in_16_bits["adapter"], in_32_bits["adapter"]) == (2 * num_elements, 0)
    assert in_16_bits["gradient"] == in_32_bits["gradient"] == 4 * planner.trained(RANK).num_elements


BYTES = st.integers(0, 2**40)


@given(
    resident=st.dictionaries(st.sampled_from(["base", "quant_state", "adapter", "optimizer"]), BYTES),
    load=BYTES,
    others=st.lists(st.dictionaries(st.sampled_from(CATEGORIES), BYTES), min_size=7, max_size=7),
)
def test_phases_are_put_on_top_of_what_stays(resident: dict[str, int], load: int, others: list[dict[str, int]]) -> None:
    load = max(load, sum(resident.values()))
    levels = {
        phase: Level(phase, sum(split.values()), dict.fromkeys(CATEGORIES, 0) | split)
        for phase, split in zip(PHASES[1:], others, strict=True)
    }
    of_state = {phase: levels[phase] for phase in ("optimizer", "save", "resume")}
    of_steps = {phase: level for phase, level in levels.items() if phase not in of_state}
    used = usage(resident, load, of_steps, StateTrace((), (), 0, of_state))
    require_consistent(used)
    assert used.phases["load"] == load
    assert used.phases["eval"] == sum(resident.values()) + levels["eval"].peak_bytes


def test_a_planner_is_traced_on_the_device_of_its_budget(planners: Callable[[str, str], Planner]) -> None:
    assert planners("gemma2", "accelerator").dry.model.device.type != "cpu"
    on_cpu = planners("llama", "cpu").dry.model
    assert (on_cpu.device.type, on_cpu.compute_dtype) == ("cpu", torch.float32)

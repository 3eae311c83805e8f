"""What a step costs stays what it was: counted again on two layers of Llama 3.1 8B, compared with a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.step_cost import (
    GOLDEN,
    GOLDEN_CASE,
    LEVER_CASE,
    OTHER_MODELS,
    POLICIES,
    Row,
    ideal,
    our_steps,
    package_versions,
    rows,
)
from benchmarks.step_trace import traced
from qlora_trainer.model.vocabulary_blocks import BLOCK_ELEMENTS
from qlora_trainer.planning.model_config import read_model_config
from qlora_trainer.step.optimizer import CPU_PIECE_ELEMENTS

HOW = "If that is meant: `python -m benchmarks.step_cost --update-golden`, and say in the commit why it is dearer."


@pytest.fixture(scope="module")
def now() -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    return our_steps((GOLDEN_CASE.model, *OTHER_MODELS))


@pytest.fixture(scope="module")
def ours(now: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """model -> policy -> totals, as they are now."""
    return now[0]


@pytest.fixture(scope="module")
def with_levers(now: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """lever -> totals and where the host waits, as they are now."""
    return now[1]


def differences(what: str, golden: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What is counted now and is not what the file says, a line a figure."""
    lines = []
    for name in sorted(golden.keys() | found.keys()):
        before, now = golden.get(name, {}), found.get(name, {})
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                lines.append(f"{what}, {name}, {key}: was {before.get(key)}, is {now.get(key)}")
    return lines


def golden_file() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(GOLDEN.read_text())
    return found


def test_our_step_costs_what_it_did(ours: dict[str, dict[str, Any]]) -> None:
    """Mutations tried: a clone of a linear's output, a float(loss) in the step, a weight unpacked twice."""
    found = differences("ours", golden_file()["ours"], ours[GOLDEN_CASE.model])
    assert not found, "\n".join(["a step's cost has changed:", *found, HOW])


def test_our_step_of_other_models_costs_what_it_did(ours: dict[str, dict[str, Any]]) -> None:
    """Whatever the architecture: no wait inside the step, and a weight is unpacked once forward and once backward.

    Of the first layer no gradient of the input is needed, so its q, k and v are not unpacked for one.
    """
    golden = golden_file()["others"]
    lines = [line for model in OTHER_MODELS for line in differences(model, golden[model], ours[model])]
    assert not lines, "\n".join(["a step's cost has changed:", *lines, HOW])
    num_linears = 7 * GOLDEN_CASE.num_layers
    for steps in ours.values():
        for totals in steps.values():
            assert (totals["waits"], totals["copies_to_host"]) == (0, 0)
        unpacked = steps["keep"]["dequantizations"]
        assert (unpacked["forward"], unpacked["recompute"], unpacked["backward"]) == (num_linears, 0, num_linears - 3)


def test_our_step_with_a_lever_costs_what_it_did(with_levers: dict[str, dict[str, Any]]) -> None:
    """Mutations tried: blocking copies on the side stream, a streamed layer fetched although a buffer holds it, every
    block of the head copied twice."""
    lines = differences("with a lever", golden_file()["levers"], with_levers)
    assert not lines, "\n".join(["a step's cost has changed:", *lines, HOW])


def test_a_lever_copies_what_it_must_and_waits_where_that_is_meant(with_levers: dict[str, dict[str, Any]]) -> None:
    """Five tensors of a micro-batch come to the device; and what a lever copies, worked out from its description."""
    layers, rows = LEVER_CASE.num_layers, LEVER_CASE.num_tokens
    config: Any = read_model_config(LEVER_CASE.model)[0]
    copies = {lever: (step["copies_to_device"] - 5, step["copies_to_host"]) for lever, step in with_levers.items()}
    num_blocks = -(-config.vocab_size // (BLOCK_ELEMENTS // config.hidden_size))
    num_chunks = -(-(rows - 1) // LEVER_CASE.loss_chunk_tokens)
    q_size, kv_size = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    ends = 2 * (q_size + kv_size) + 3 * config.intermediate_size + 7 * config.hidden_size  # of a layer's seven linears
    num_pieces = -(-layers * LEVER_CASE.rank * ends // CPU_PIECE_ELEMENTS)
    assert num_pieces > 1
    assert copies == {
        "layer inputs offloaded, tiles": (layers, layers),
        "base streamed": (layers + layers - 2, 0),  # in backward two layers are still there
        # Forward and gradient of every chunk; rows of the embedding come instead of the tokens' numbers.
        "tables on the host": (2 * num_blocks * num_chunks, 0),
        "optimizer on the host": (num_pieces, num_pieces + 1),  # and whether the step counts
    }
    for lever, step in with_levers.items():
        unpacked = step["dequantizations"]
        # In tiles the first layer's q and k are projected once more, to be known from before the norms of their heads.
        not_needed = 1 if "tiles" in lever else 3
        assert (unpacked["forward"], unpacked["backward"]) == (7 * layers, 7 * layers - not_needed)
        # Inside of forward and backward, none; the update on the host waits for each piece of the gradient, and first
        # for whether loss and norm are finite: it computes with their values.
        assert step["waits"] == sum(step["waits_in"].values())
        on_host = {
            "AdapterOptimizer._beside_the_master (aten::copy_)": num_pieces,
            "AdapterOptimizer.update (aten::_to_copy)": 1,
        }
        assert step["waits_in"] == (on_host if lever == "optimizer on the host" else {})


@pytest.mark.slow
def test_the_peers_step_costs_what_it_did() -> None:
    golden = golden_file()
    assert golden["peer_packages"] == package_versions(), HOW
    cases = [replace(GOLDEN_CASE, is_recomputed=policy == "recompute") for policy in POLICIES]
    steps = traced("peer", cases)["steps"]
    totals = {policy: step["totals"] for policy, step in zip(POLICIES, steps, strict=True)}
    found = differences("peer", golden["peer"], totals)
    assert not found, "\n".join(["the peer's step is counted otherwise:", *found, HOW])


@pytest.mark.parametrize("policy", POLICIES)
def test_the_peer_multiplies_what_must_be_multiplied_and_the_head_once_more(policy: str) -> None:
    """The ideal against a step that is not ours: TRL's head forms its logits again in backward, all else is needed.

    With recomputation, each layer's input has a gradient there, also the first one's; and torch recomputes no layer's
    last product, since nothing of it was kept.
    """
    case = replace(GOLDEN_CASE, is_recomputed=policy == "recompute")
    config: Any = read_model_config(case.model)[0]
    least, found = ideal(config, case), golden_file()["peer"][policy]
    head = 2 * (case.num_tokens - 1) * config.hidden_size * config.vocab_size
    q_size, kv_size = config.hidden_size, config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    first_inputs = 2 * case.num_tokens * config.hidden_size * (q_size + 2 * kv_size + 3 * case.rank)
    last_products = case.num_layers * 2 * case.num_tokens * case.rank * config.hidden_size
    beyond = head + (first_inputs - last_products if case.is_recomputed else 0)
    assert found["gemm_flops"] == least.gemm_flops + beyond
    assert found["attention_flops"] == least.attention_flops


def test_a_bound_is_missed_beyond_it_only() -> None:
    assert Row(name="", ours=2.0, peer=9.0, bound=2).is_met
    assert not Row(name="", ours=2.1, peer=9.0, bound=2).is_met
    assert Row(name="", ours=4.5, peer=9.0, bound=0.5, is_relative=True).is_met
    assert not Row(name="", ours=4.6, peer=9.0, bound=0.5, is_relative=True).is_met


def test_every_bound_of_the_table_is_judged() -> None:
    golden = golden_file()
    least = ideal(read_model_config(GOLDEN_CASE.model)[0], GOLDEN_CASE)
    ours, peer = golden["ours"]["recompute"], golden["peer"]["recompute"]
    bounded = [row.name for row in rows("recompute", ours, peer, least, 14) if row.bound is not None]
    assert bounded == [
        "GEMM FLOPs / ideal",
        "both / ideal",
        "dequantizations a linear",
        "GB outside of GEMMs",
        "kernel launches",
        "calls that wait for the device",
    ]

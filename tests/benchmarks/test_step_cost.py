"""What a step costs stays what it was: counted again on two layers of Llama 3.1 8B, compared with a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.step_cost import GOLDEN, GOLDEN_CASE, POLICIES, Row, ideal, package_versions, rows
from benchmarks.step_trace import Side, traced
from qlora_trainer.planning.model_config import read_model_config

HOW = "If that is meant: `python -m benchmarks.step_cost --update-golden`, and say in the commit why it is dearer."


def differences(side: Side, golden: Mapping[str, Any]) -> list[str]:
    """What is counted now and is not what the file says, a line a figure."""
    cases = [replace(GOLDEN_CASE, is_recomputed=policy == "recompute") for policy in POLICIES]
    found = traced(side, cases)["steps"]
    lines = []
    for policy, step in zip(POLICIES, found, strict=True):
        before, now = golden[side][policy], step["totals"]
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                lines.append(f"{side}, {policy}, {key}: was {before.get(key)}, is {now.get(key)}")
    return lines


def golden_file() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(GOLDEN.read_text())
    return found


def test_our_step_costs_what_it_did() -> None:
    """Mutations tried: a clone of a linear's output, a float(loss) in the step, a weight unpacked twice."""
    found = differences("ours", golden_file())
    assert not found, "\n".join(["a step's cost has changed:", *found, HOW])


@pytest.mark.slow
def test_the_peers_step_costs_what_it_did() -> None:
    golden = golden_file()
    assert golden["peer_packages"] == package_versions(), HOW
    found = differences("peer", golden)
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

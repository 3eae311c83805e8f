"""Plans of LoRA's variants: what is put together from a shallow trace is what a full trace and a real model have."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import pytest

from qlora_trainer.config.levers import NO_LEVERS
from qlora_trainer.errors import ConfigError
from qlora_trainer.planning.make_plan import choose, choose_rank
from qlora_trainer.planning.planner import Planner
from qlora_trainer.planning.search import layout_of
from tests.planning.test_price import (
    BUDGETS,
    CPU,
    NUM_LAYERS,
    RANK,
    make_planner,
    priced_and_traced,
    require_equal_bytes,
)

VARIANTS = {
    "rslora": ["lora.use_rslora=true"],
    "ranks": [r"lora.rank_pattern={q_proj: 64, 'layers\.[23]\..*': 2}", "lora.alpha_pattern={v_proj: 3}"],
    "ranks-dropout": ["lora.rank_pattern={up_proj: 33, v_proj: 5}", "lora.dropout=0.1"],
    "dora": ["lora.use_dora=true"],
    "dora-all": ["lora.use_dora=true", "lora.rank_pattern={q_proj: 64, down_proj: 3}", "lora.dropout=0.1"],
    "biases": ["lora.bias=all", "lora.target_modules=[q_proj, up_proj]"],
    "lora_bias": ["lora.lora_bias=true", "lora.target_modules=[q_proj, up_proj]"],
    "layers": ["lora.layers_to_transform=[1, 4]"],
    "head": ["lora.modules_to_save=[lm_head]"],
    "tables": ["lora.modules_to_save=[embed_tokens, lm_head]", "lora.layers_to_transform=[1, 4]"],
    "untied head": ["lora.untie_tables=true", "lora.modules_to_save=[lm_head]"],
    "untied tables": ["lora.untie_tables=true", "lora.modules_to_save=[embed_tokens, lm_head]"],
    "head alone": ["lora.target_modules=[]", "lora.modules_to_save=[lm_head]"],
    "biases of norms": ["lora.bias=all", "lora.target_modules=[q_proj]", "lora.layers_to_transform=[4]"],
    "biases alone": ["lora.bias=all", "lora.target_modules=[]"],
    "norms": ["lora.modules_to_save=[input_layernorm, q_norm, norm]", "lora.layers_to_transform=[2]"],
    "a norm alone": ["lora.modules_to_save=[layers.3.post_attention_layernorm]", "lora.target_modules=[]"],
    "activated": ["lora.alora_invocation_tokens=[5, 6]", "lora.target_modules=[q_proj, up_proj]"],
}


@pytest.fixture(scope="module")
def planners() -> Callable[[str, str], Planner]:
    """One of each, traced once."""
    bases = {"biases": "llama-biases", "biases of norms": "phi", "biases alone": "phi"}
    bases |= {"norms": "qwen3"}
    bases |= dict.fromkeys(("untied head", "untied tables"), "llama-tied")
    return cache(lambda variant, device: make_planner(bases.get(variant, "llama"), BUDGETS[device], *VARIANTS[variant]))


@pytest.mark.parametrize("device", ["cpu", pytest.param("accelerator", marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_prices_are_those_of_a_full_trace(variant: str, device: str, planners: Callable[[str, str], Planner]) -> None:
    planner = planners(variant, device)
    for num_recomputed in (0, 3, NUM_LAYERS):
        priced, traced = priced_and_traced(planner, 512, num_recomputed, 64)
        require_equal_bytes(priced, traced)


def test_ranks_of_a_pattern_count_as_they_are(planners: Callable[[str, str], Planner]) -> None:
    planner = planners("ranks", "cpu")
    shapes = planner.trained(RANK).shapes
    ranks = {name: shape[0] for name, shape in shapes.items() if name.endswith("lora_A")}
    assert ranks["model.layers.0.self_attn.q_proj.lora_A"] == ranks["model.layers.2.self_attn.q_proj.lora_A"] == 64
    assert ranks["model.layers.2.mlp.up_proj.lora_A"] == 2
    assert ranks["model.layers.0.mlp.up_proj.lora_A"] == RANK
    plan = choose(planner, choose_rank(planner))
    # Rows and columns of each: hidden size 256, four heads of 16, two of them for keys.
    sizes = {"q_proj": 320, "k_proj": 288, "v_proj": 288, "o_proj": 320}
    sizes |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 768)
    expected = sum(
        sizes[leaf] * (64 if leaf == "q_proj" else 2 if layer in (2, 3) else RANK)
        for layer in range(NUM_LAYERS)
        for leaf in sizes
    )
    assert plan.trainable_parameters == expected


@pytest.mark.parametrize("dtype,item_bytes", [("bfloat16", 2), ("float32", 0)])
def test_magnitudes_are_fp32_and_have_a_norm_beside_them(dtype: str, item_bytes: int) -> None:
    resident = {}
    for name in ("plain", "dora"):
        planner = make_planner("llama", CPU, f"lora.use_dora={str(name == 'dora').lower()}", f"lora.dtype={dtype}")
        layout = layout_of(planner.space(RANK, 256), 256, 64, NUM_LAYERS)
        resident[name] = planner.price(layout, "adamw_32bit").resident
        count = sum(math.prod(shape) for shape in planner.trained(RANK).shapes.values())
    rows = NUM_LAYERS * (64 + 32 + 32 + 256 + 512 + 512 + 256)
    assert resident["dora"]["adapter"] - resident["plain"]["adapter"] == 4 * rows
    assert resident["dora"]["adapter"] == item_bytes * (count - rows) + 4 * rows
    padded = 256 * sum(-(-size // 256) for size in NUM_LAYERS * [64, 32, 32, 256, 512, 512, 256])
    assert resident["dora"]["gradient"] - resident["plain"]["gradient"] == 4 * padded
    assert resident["dora"]["optimizer"] - resident["plain"]["optimizer"] == 12 * padded


def test_a_bias_of_b_is_fp32_and_priced_whole() -> None:
    resident = {}
    for with_it in ("false", "true"):
        planner = make_planner("llama", CPU, f"lora.lora_bias={with_it}", "lora.target_modules=[k_proj, up_proj]")
        layout = layout_of(planner.space(RANK, 256), 256, 64, NUM_LAYERS)
        resident[with_it] = planner.price(layout, "adamw_32bit").resident
    rows = NUM_LAYERS * (256 + 512)  # of up to 256 elements each in the optimizer
    added = {key: resident["true"][key] - resident["false"][key] for key in ("gradient", "optimizer")}
    assert added == {"gradient": 4 * rows, "optimizer": 12 * rows}
    assert resident["true"]["adapter"] == resident["false"]["adapter"]  # its own master, as a magnitude is


def test_a_table_that_is_trained_takes_the_place_of_the_frozen_one(planners: Callable[[str, str], Planner]) -> None:
    """A copy in 16 bits, its gradient in 32 and its state in 96; and it stays on the device."""
    plain, head = planners("rslora", "cpu"), planners("head", "cpu")
    layouts = [layout_of(planner.space(RANK, 256), 256, 64, NUM_LAYERS) for planner in (plain, head)]
    frozen, trained = (
        planner.price(layout, "adamw_32bit").resident for planner, layout in zip((plain, head), layouts, strict=True)
    )
    table = math.prod(head.trained(RANK).shapes["lm_head.weight"])
    assert trained["embedding"] == frozen["embedding"] - 2 * table
    assert trained["adapter"] == frozen["adapter"] + 2 * table
    assert trained["gradient"] == frozen["gradient"] + 4 * table
    assert trained["optimizer"] == frozen["optimizer"] + 12 * table
    assert "embedding_residency" in plain.pullable()
    assert "embedding_residency" not in head.pullable()


def test_a_table_that_serves_two_stays_until_both_are_trained(planners: Callable[[str, str], Planner]) -> None:
    """Mutation tried: it is counted no more as soon as the head is trained."""
    resident, table = {}, 0
    for name in ("untied head", "untied tables"):
        planner = planners(name, "cpu")
        layout = layout_of(planner.space(RANK, 256), 256, 64, NUM_LAYERS)
        resident[name] = planner.price(layout, "adamw_32bit").resident
        table = math.prod(planner.trained(RANK).shapes["lm_head.weight"])
    tied = make_planner("llama-tied", CPU)
    layout = layout_of(tied.space(RANK, 256), 256, 64, NUM_LAYERS)
    frozen = tied.price(layout, "adamw_32bit").resident
    assert resident["untied head"]["embedding"] == frozen["embedding"]
    assert resident["untied tables"]["embedding"] == frozen["embedding"] - 2 * table
    assert resident["untied head"]["gradient"] == frozen["gradient"] + 4 * table
    assert resident["untied tables"]["gradient"] == frozen["gradient"] + 8 * table


def test_another_rank_leaves_those_of_a_pattern(planners: Callable[[str, str], Planner]) -> None:
    planner = planners("ranks", "cpu")
    layouts = [planner.space(rank, 256) for rank in (8, 128)]
    assert [layout.rank for layout in layouts] == [8, 128]
    adapters = [planner.trained(rank).shapes for rank in (8, 128)]
    name = "model.layers.0.self_attn.q_proj.lora_A"
    assert adapters[0][name] == adapters[1][name] == (64, 256)
    assert planner.prices(8, NO_LEVERS) is planner.prices(8, NO_LEVERS) is not planner.prices(128, NO_LEVERS)


@pytest.mark.parametrize(
    "override,where,found",
    [
        ("lora.rank_pattern={w_proj: 4}", "lora.rank_pattern", "which means no linear with an adapter"),
        ("lora.alpha_pattern={lm_head: 4}", "lora.alpha_pattern", "which means no linear with an adapter"),
        ("lora.bias=all", "lora.bias", "no module of this base with a bias"),
        ("lora.layers_to_transform=[0, 6]", "lora.layers_to_transform", "6, a layer without"),
    ],
)
def test_what_means_nothing_is_refused(override: str, where: str, found: str) -> None:
    with pytest.raises(ConfigError, match=found) as error:
        make_planner("llama", CPU, override)
    assert str(error.value).startswith(where)


def test_a_table_that_is_trained_stays_on_the_device_and_norms_do_not_keep_it_there() -> None:
    on_host = "memory.embedding_residency=host"
    for names, leaf in (("lm_head", "lm_head"), ("embed_tokens, input_layernorm", "embed_tokens")):
        expected = rf"found host, and {leaf} in lora\.modules_to_save; expected auto or device"
        with pytest.raises(ConfigError, match=expected):
            make_planner("llama", CPU, f"lora.modules_to_save=[{names}]", on_host)
    assert (
        len(make_planner("llama", CPU, "lora.modules_to_save=[input_layernorm]", on_host).settings.norms) == NUM_LAYERS
    )
    make_planner("llama", CPU, "lora.modules_to_save=[lm_head]", "memory.embedding_residency=device")

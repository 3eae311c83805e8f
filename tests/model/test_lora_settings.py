"""Ranks and scales of each module are what PEFT makes of the same fields."""

from __future__ import annotations

import json
from dataclasses import replace

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.adapter_config import adapter_config, settings_of
from qlora_trainer.model.lora_settings import LoraSettings, in_layers, require_patterns

LINEARS = tuple(
    f"model.layers.{layer}.{part}" for layer in range(12) for part in ("attn.q_proj", "attn.xq_proj", "mlp.up_proj")
)
PATTERNS = (
    "q_proj",
    r".*_proj",
    r"layers\.1\..*",
    r"layers.1.attn.q_proj",
    "attn",
    r"model\.layers\.(0|11)\.mlp.up_proj",
    "q",
)


@settings(max_examples=200)
@given(keys=st.permutations(PATTERNS), count=st.integers(0, 3), name=st.sampled_from(LINEARS))
def test_the_first_pattern_that_fits_decides_as_in_peft(keys: list[str], count: int, name: str) -> None:
    chosen = {key: 10 + number for number, key in enumerate(keys[:count])}
    lora = LoraSettings(4, 8.0, 0.0, LINEARS, rank_pattern=tuple(chosen.items()), alpha_pattern=tuple(chosen.items()))
    key = get_pattern_key(list(chosen), name)
    assert lora.rank_of(name) == chosen.get(key, 4)
    assert lora.alpha_of(name) == chosen.get(key, 8.0)


def test_each_module_is_scaled_by_its_own_rank_and_alpha() -> None:
    lora = LoraSettings(4, 8.0, 0.0, LINEARS, rank_pattern=(("q_proj", 16),), alpha_pattern=(("up_proj", 6.0),))
    q, xq, up = LINEARS[:3]
    assert [lora.scale_of(name) for name in (q, xq, up)] == [0.5, 2.0, 1.5]
    stabilized = replace(lora, use_rslora=True)
    assert [stabilized.scale_of(name) for name in (q, xq, up)] == [2.0, 4.0, 3.0]


@settings(max_examples=200)
@given(
    layers=st.one_of(st.integers(0, 12), st.lists(st.integers(0, 12))),
    pattern=st.sampled_from([None, "layers", ["h", "layers"], "h", []]),
    targets=st.lists(st.sampled_from(["q_proj", "up_proj", LINEARS[3], LINEARS[-1]]), min_size=1, unique=True),
)
def test_layers_are_those_that_peft_transforms(
    layers: int | list[int], pattern: str | list[str] | None, targets: list[str]
) -> None:
    config = peft.LoraConfig(target_modules=targets, layers_to_transform=layers)
    config.layers_pattern = pattern
    expected = tuple(name for name in LINEARS if check_target_module_exists(config, name))
    fields = {"r": 4, "lora_alpha": 8, "target_modules": targets}
    read = [layers] if isinstance(layers, int) else layers  # as `read_config_fields` gives it
    fields |= {"layers_to_transform": read, "layers_pattern": pattern}
    assert settings_of(fields, linear_names=LINEARS, tables=None).targets == expected


@settings(max_examples=200)
@given(keys=st.permutations(PATTERNS), count=st.integers(0, 4))
def test_a_written_pattern_may_be_sorted(keys: list[str], count: int) -> None:
    """As PEFT does when it saves a folder that it has read; every name keeps its rank and alpha."""
    pattern = tuple((key, 10 + number) for number, key in enumerate(keys[:count]))
    lora = LoraSettings(4, 8.0, 0.0, LINEARS, rank_pattern=pattern, alpha_pattern=pattern)
    written = json.loads(adapter_config(lora, linear_names=LINEARS, base_name="base", revision=None))
    again = settings_of(json.loads(json.dumps(written, sort_keys=True)), linear_names=LINEARS, tables=None)
    for name in LINEARS:
        assert (again.rank_of(name), again.alpha_of(name)) == (lora.rank_of(name), lora.alpha_of(name))


def test_layers_are_counted_in_the_first_list_of_a_name() -> None:
    assert in_layers(["model.layers.1.experts.0.up"], {1}) == ("model.layers.1.experts.0.up",)
    assert in_layers(["model.layers.1.experts.0.up"], {0}) == ()


@pytest.mark.parametrize(
    "pattern,found", [("k_proj", "which means no linear"), ("q_(", "a broken regular expression"), ("", "no linear")]
)
def test_a_pattern_that_changes_nothing_is_refused(pattern: str, found: str) -> None:
    with pytest.raises(ConfigError, match=found) as error:
        require_patterns(["q_proj", pattern], LINEARS, where="lora.rank_pattern")
    assert str(error.value).startswith("lora.rank_pattern: ")
    assert repr(pattern) in str(error.value)
    require_patterns(["q_proj", r"layers\.3\..*"], LINEARS, where="lora.rank_pattern")

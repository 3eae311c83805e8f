"""Regular expressions of files of others: usual ones are taken, those that would hang are refused before any match."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_trainer.cli.app import main
from qlora_trainer.errors import ConfigError
from qlora_trainer.model.expressions import MOST_BITS, bits_of_ways
from qlora_trainer.model.lora_settings import pattern_fits, require_expressions
from tests.run.told import complaint

NAME = "model.layers.10.self_attn.some_long_q_proj_name"
USUAL = [
    "q_proj",
    r".*\.(q|k)_proj",
    r"(.*\.)?layers\.(0|1)\..*",
    r"model\.layers\.\d+\.self_attn\.[qkv]_proj",
    r"layers\.([0-9]|1[0-9]|2[0-9])\..*q_proj",
    r"^(?!.*visual)(?=.*(?:language|text)).*(?:self_attn|mlp)\.(?:q_proj|k_proj|v_proj)$",
    # Unsloth's `get_peft_regex`
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj|v_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj)))",
]
ENDLESS = [
    "(.*)*(.*)*(.*)*x",
    "(.*.*)*(.*.*)*x",
    "(a|aa)*x",
    "(.?.?)*x",
    "(?P<name>.*?)+x",
    "(?i:(.*)*)x",
    "(?=(.*)*x)",
    "(a)?(?(1)(.*)*|b)",
    ".?" * 40 + "x",
    "(.|a){40}x",
    "((.*){2}){8}x",
    ".*" * 12 + "x",
]


def test_usual_ones_are_taken() -> None:
    require_expressions(USUAL, where="here")
    assert pattern_fits(USUAL[1], "model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize("pattern", ENDLESS)
def test_what_would_hang_is_refused_in_a_line(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"^here: found .* can be matched in more ways than can be tried"):
        require_expressions([*USUAL, pattern], where="here")


def test_what_is_taken_ends_soon() -> None:
    """The costliest: as many `.*` as may be, over a long name that they do not fit."""
    pattern = ".*?" * 6 + "x"
    assert bits_of_ways(pattern) == MOST_BITS
    started = time.perf_counter()
    assert not pattern_fits(pattern, NAME)
    assert time.perf_counter() - started < 20  # 0.4 s where nothing else runs
    assert bits_of_ways("(.*)*") == math.inf
    with pytest.raises(re.error):
        bits_of_ways("(q_proj")


@pytest.mark.parametrize(
    "fields",
    [
        {"rank_pattern": {ENDLESS[0]: 3}},
        {"alpha_pattern": {ENDLESS[0]: 3}},
        {"exclude_modules": ENDLESS[1]},
        {"target_modules": ENDLESS[1]},
        {"layers_to_transform": [0], "layers_pattern": ENDLESS[0]},
        {"layers_to_transform": [0], "layers_pattern": ["layers", "("]},
    ],
    ids=", ".join,
)
def test_a_file_that_has_one_is_refused(
    fields: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain: dict[str, object] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(plain | fields))
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(2, 8)}, tmp_path / "adapter_model.safetensors")
    assert main(["export", str(tmp_path), "--to", str(tmp_path / "to"), "--model", "smollm2-135m"]) == 2
    where = f"{tmp_path / 'adapter_config.json'}, {list(fields)[-1]}: found "
    assert where in complaint(capsys)

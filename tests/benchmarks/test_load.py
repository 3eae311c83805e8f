"""The loading benchmark runs, and its promise holds at its smallest size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.load import ALLOWANCE_BYTES, Loading, main, print_table, write_checkpoint


def test_the_generated_checkpoint_is_one_that_transformers_loads(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "tiny")

    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    model, report = loaded

    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    stored = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    parameters = dict(model.named_parameters())
    assert stored.keys() == parameters.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, parameters[name])
        assert float(tensor.float().std()) == pytest.approx(0.02, rel=0.2)


@pytest.mark.slow
def test_a_cold_and_a_warm_load_stay_within_the_promise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exit_code = main(["--size", "tiny", "--folder", str(tmp_path), "--json"])

    printed = json.loads(capsys.readouterr().out)
    assert exit_code == 0
    assert printed["size"] == "tiny"
    cold, warm = printed["loadings"]
    assert (cold["cache"], warm["cache"]) == ("cold", "warm")
    for figures in (cold, warm):
        assert 2**20 < figures["quantized_bytes"] < 4 * 2**20  # 1.3 million weights in 4 bits, two tables in 16
        assert 100 * 2**20 < figures["interpreter_bytes"] < figures["peak_bytes"]
        assert 0 < figures["margin_bytes"] < ALLOWANCE_BYTES + figures["quantized_bytes"]
    assert list(tmp_path.iterdir()) == []


def test_a_broken_promise_shows_as_a_negative_margin(capsys: pytest.CaptureFixture[str]) -> None:
    loading = Loading("cold", 2**28, 2**29, 2**28 + 2**29 + ALLOWANCE_BYTES + 2**20, 1.0, 2.0, 3.0)

    assert loading.margin_bytes == -(2**20)
    print_table([loading], "tiny")
    assert "-1" in capsys.readouterr().out

"""A base some of whose layers are there several times: which one each is, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_trainer.config.values import LayerRanges
from qlora_trainer.errors import ConfigError
from qlora_trainer.export.portable import require_portable
from qlora_trainer.model.adapter_folder import read_adapter_folder
from qlora_trainer.model.base import resolve_base
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.nf4_cache import prepare_nf4_cache
from qlora_trainer.model.repeated_layers import stored_weights, with_repeated_layers
from qlora_trainer.model.streamed import DiskWeights
from tests.export.made_adapters import make_adapter
from tests.model.tiny_bases import CONFIGS, small_config, write_base

RANGES = ((0, 2), (1, 2))
LINEARS = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(3)]


def test_each_is_the_layer_that_is_meant(tmp_path: Path) -> None:
    path = write_base(tmp_path / "base", CONFIGS["qwen3"])
    base = resolve_base(str(path), layer_replication=RANGES)
    assert (base.config.num_hidden_layers, CONFIGS["qwen3"].num_hidden_layers) == (3, 2)
    assert base.config.layer_types == ["full_attention"] * 3
    stored = {name: own for file in path.glob("*.safetensors") for name, own in load_file(file).items()}
    disk = DiskWeights.of(path, RANGES)
    for layer, own in enumerate((0, 1, 1)):
        weight = disk.dense(f"model.layers.{layer}.mlp.up_proj.weight")
        assert torch.equal(weight, stored[f"model.layers.{own}.mlp.up_proj.weight"])
    assert torch.equal(disk.dense("model.embed_tokens.weight"), stored["model.embed_tokens.weight"])
    assert len(disk.files) == len(stored) + sum(".layers.1." in name for name in stored)
    keys = {prepare_nf4_cache(one, double_quant=True).key for one in (base, resolve_base(str(path)))}
    assert len(keys) == 2


def test_only_lists_by_layer_get_longer() -> None:
    """Of two layers, and with two of each token: those stay."""
    tokens = {"eos_token_id": [2, 3], "pad_token_id": 0, "architectures": ["LlamaForCausalLM", "Other"]}
    found = with_repeated_layers(small_config("qwen3", **tokens), RANGES)
    assert {name: getattr(found, name) for name in tokens} == tokens
    assert found.layer_types == ["full_attention"] * 3
    one = small_config("llama", num_hidden_layers=1, architectures=["LlamaForCausalLM"])
    assert with_repeated_layers(one, ((0, 1), (0, 1))).architectures == ["LlamaForCausalLM"]


def test_a_layer_that_is_left_out_is_not_there() -> None:
    files = {f"model.layers.{layer}.x": Path("a") for layer in range(12)} | {"lm_head.weight": Path("b")}
    found = stored_weights(files, ((10, 12), (1, 2)))
    assert {name: stored for name, (_, stored) in found.items()} == {
        "model.layers.0.x": "model.layers.10.x",
        "model.layers.1.x": "model.layers.11.x",
        "model.layers.2.x": "model.layers.1.x",
        "lm_head.weight": "lm_head.weight",
    }


@pytest.mark.parametrize(
    "name, ranges, message",
    [
        ("llama", ((0, 3),), r"found \[\[0, 3\]\]; expected \[first, end\] of a base of 2 layers"),
        ("llama", ((1, 1),), "of a base of 2 layers"),
        ("llama", ((-1, 1),), "of a base of 2 layers"),
        ("llama", ((0, 2),) * 1000, "of a base of 2 layers"),
        ("gemma2", ((0, 2), (0, 2)), r"found a base whose layers differ \(layer_types\)"),
    ],
    ids=str,
)
def test_what_cannot_be_repeated_is_refused(name: str, ranges: LayerRanges, message: str) -> None:
    """Attention of several kinds: PEFT's copies keep theirs, transformers masks by the number of the layer."""
    with pytest.raises(ConfigError, match=f"lora.layer_replication: .*{message}"):
        with_repeated_layers(CONFIGS[name], ranges)


def test_what_copies_share_in_peft_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", small_config("llama-biases"))
    asked = {"layer_replication": [(0, 2), (1, 2)], "target_modules": ["q_proj"]}
    make_adapter(tmp_path / "biases", base, bias="all", **asked)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="and biases, which copies of a layer share in PEFT"):
        read_adapter_folder(tmp_path / "biases", linear_names=LINEARS)
    make_adapter(tmp_path / "plain", base, **asked)  # type: ignore[arg-type]
    config = tmp_path / "plain" / "adapter_config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"init_lora_weights": "pissa"}))
    with pytest.raises(ConfigError, match="and pissa, which copies of a layer share in PEFT"):
        read_adapter_folder(tmp_path / "plain", linear_names=LINEARS)
    for ranges in (3, [3], [[0, 1, 2]], [[0, "1"]], [[0, True]]):
        config.write_text(json.dumps(fields | {"layer_replication": ranges}))
        with pytest.raises(ConfigError, match=r"layer_replication = .*pairs of numbers of layers"):
            read_adapter_folder(tmp_path / "plain", linear_names=LINEARS)


def test_portable_readers_know_no_repeated_layers(tmp_path: Path) -> None:
    settings = LoraSettings(2, 4.0, 0.0, (LINEARS[0],), layer_replication=RANGES)
    with pytest.raises(ConfigError, match="an adapter with repeated layers; expected LoRA alone"):
        require_portable(settings, tmp_path)

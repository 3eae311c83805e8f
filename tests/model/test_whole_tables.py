"""Embedding and head trained whole: gradients as PEFT has them, and folders in both directions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.adapter_folder import WEIGHTS_FILE, read_adapter_folder
from qlora_trainer.model.adapters import attach_adapters, trainable_parameters
from qlora_trainer.model.base import Base
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.nf4_cache import NF4Cache
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.model.table_names import asked_tables
from qlora_trainer.model.trained_tables import base_tables_of, table_parameters, with_updated_tables
from qlora_trainer.run.export import export_adapter
from qlora_trainer.step.document import Document
from qlora_trainer.step.train_step import accumulate_gradients
from tests.model.peft_oracle import (
    adapter_parameters,
    load_adapter,
    load_oracle,
    logits,
    moved_by_peft,
    oracle_step,
    with_adapters,
    wrap,
)
from tests.model.tiny_bases import CONFIGS
from tests.model.tiny_models import (
    load_for_training,
    lora_settings,
    our_step,
    packed,
    packed_logits,
    prepare,
    random_adapter,
    relative_error,
    tiny_documents,
)

DOCUMENTS = tiny_documents(33, 21)
TOLERANCE = 1e-5
HEAD, EMBEDDING = ["lm_head"], ["embed_tokens"]
BOTH = [*HEAD, *EMBEDDING]
# Two tables; a head with a bias; one table for both, with a scale on the embedding and a cap on the logits.
CASES = [("llama", HEAD), ("llama", EMBEDDING), ("llama", BOTH), ("phi", BOTH), ("gemma2", BOTH), ("qwen3", BOTH)]
# Tables of a base that ties them, each trained for itself.
UNTIED = [("qwen3", HEAD), ("qwen3", EMBEDDING), ("gemma2", BOTH)]
EVERY = [*((*case, False) for case in CASES), *((*case, True) for case in UNTIED)]

Prepared = dict[str, tuple[Base, NF4Cache]]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    made = {}
    for name in dict.fromkeys(name for name, _ in CASES):
        folder = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
            made[name] = prepare(folder / "base", CONFIGS[name])
    return made


def settings_for(model: QuantizedModel, wanted: list[str], *, unties: bool = False) -> LoraSettings:
    modules_to_save, tied_head = asked_tables(wanted, base_tables_of(model), unties=unties)
    return replace(lora_settings(model), modules_to_save=modules_to_save, tied_head=tied_head)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("name, wanted, unties", EVERY, ids=str)
def test_loss_and_gradients_equal_peft(name: str, wanted: list[str], unties: bool, prepared: Prepared) -> None:
    base, cache = prepared[name]
    model = load_for_training(base, cache)
    settings = settings_for(model, wanted, unties=unties)
    weights = random_adapter(model, settings, b_size=0.05)
    found = our_step(model, settings, weights, DOCUMENTS)
    expected = oracle_step(with_adapters(load_oracle(cache.folder, torch.float32), settings, weights), DOCUMENTS)
    assert found.loss == pytest.approx(expected.loss, rel=TOLERANCE)
    assert found.gradients.keys() == expected.gradients.keys() > {f"{settings.modules_to_save[0]}.weight"}
    errors = {key: relative_error(found.gradients[key], own) for key, own in expected.gradients.items()}
    assert max(errors.values()) <= TOLERANCE, errors


def test_the_row_of_the_padding_token_has_its_gradient(prepared: Prepared) -> None:
    """Where that is the stop token, too, `nn.Embedding` would never train it. Mutation tried: `padding_idx` there."""
    base, cache = prepared["llama"]
    documents = [Document(0, DOCUMENTS[0].input_ids_T.copy(), DOCUMENTS[0].labels_T)]
    documents[0].input_ids_T[5] = base.config.pad_token_id
    model = load_for_training(base, cache)
    settings = settings_for(model, EMBEDDING)
    weights = random_adapter(model, settings, b_size=0.05)
    found = our_step(model, settings, weights, documents).gradients["model.embed_tokens.weight"]
    oracle = load_oracle(cache.folder, torch.float32)
    assert oracle.get_input_embeddings().padding_idx == base.config.pad_token_id
    oracle.get_input_embeddings().padding_idx = None
    expected = oracle_step(with_adapters(oracle, settings, weights), documents).gradients["model.embed_tokens.weight"]
    assert relative_error(found, expected) <= TOLERANCE
    assert float(found[base.config.pad_token_id].norm()) > 0.0


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_cut_and_chunk_do_not_change_the_gradients(
    name: str, dtype: torch.dtype, tolerance: float, prepared: Prepared
) -> None:
    """The head's are added up in the loss's forward, in fp32: each product of a chunk is rounded, their sum is not.

    Mutation tried: without the factor in `gradient_scale` those of the head are as many times larger as there are
    supervised tokens.
    """
    gradients = []
    for chunk, parts in ((1000, [DOCUMENTS]), (5, [[one] for one in DOCUMENTS])):
        model = load_for_training(*prepared[name], dtype)
        settings = settings_for(model, BOTH)
        attach_adapters(model, settings, random_adapter(model, settings, b_size=0.05), dtype=dtype)
        for parameter in trainable_parameters(model).values():
            parameter.grad = torch.zeros(parameter.shape)
        num_supervised_tokens = sum(document.num_supervised_tokens for document in DOCUMENTS)
        accumulate_gradients(
            model,
            [packed(part) for part in parts],
            num_supervised_tokens=num_supervised_tokens,
            loss_chunk_tokens=chunk,
        )
        gradients.append({key: parameter.grad for key, parameter in table_parameters(model).items()})
    whole, cut = gradients
    assert len(whole) == (2 if name == "llama" else 1)
    for key, expected in whole.items():
        assert expected is not None
        assert cut[key] is not None
        assert relative_error(cut[key], expected) <= tolerance  # type: ignore[arg-type]  # told above


def export(folder: Path, model: QuantizedModel, settings: LoraSettings) -> None:
    linear_names, weights = list(model.linears), trainable_parameters(model)
    export_adapter(folder, weights, settings, linear_names=linear_names, base_name="base", revision=None)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("name, wanted, unties", EVERY, ids=str)
def test_peft_reads_our_folder(name: str, wanted: list[str], unties: bool, prepared: Prepared, tmp_path: Path) -> None:
    """Logits and gradients of what PEFT makes of it are ours; read back by us, it is what was written."""
    base, cache = prepared[name]
    model = load_for_training(base, cache)
    settings = settings_for(model, wanted, unties=unties)
    weights = random_adapter(model, settings, b_size=0.05)
    attach_adapters(model, settings, weights, dtype=torch.float32)
    export(tmp_path / "adapter", model, settings)
    theirs = load_adapter(load_oracle(cache.folder, torch.float32), tmp_path / "adapter")
    with torch.no_grad():
        assert relative_error(packed_logits(model, DOCUMENTS), logits(theirs, DOCUMENTS)) <= TOLERANCE
    tables = [key for key in weights if ".lora_" not in key]
    assert {key for key in adapter_parameters(theirs) if ".lora_" not in key} == set(tables)
    for parameter in adapter_parameters(theirs).values():
        parameter.requires_grad_(True)
    expected = oracle_step(theirs, DOCUMENTS)
    found = our_step(model, settings, weights, DOCUMENTS)
    for key in tables:
        assert relative_error(found.gradients[key], expected.gradients[key]) <= TOLERANCE
    read = read_adapter_folder(tmp_path / "adapter", linear_names=list(model.linears), tables=base_tables_of(model))
    assert read.settings == settings
    assert read.weights.keys() == weights.keys()
    assert all(torch.equal(own, weights[key]) for key, own in read.weights.items())


# What PEFT is asked for -> the head is that of the embedding, and what is trained.
OF_PEFT: list[tuple[str, list[str], bool]] = [
    ("llama", HEAD, False),
    ("phi", BOTH, False),
    ("qwen3", HEAD, False),  # unties it
    ("qwen3", EMBEDDING, False),
    ("qwen3", BOTH, False),
    ("qwen3", HEAD, True),
    ("gemma2", BOTH, True),
]


@pytest.mark.parametrize("name, wanted, ties", OF_PEFT, ids=str)
def test_we_read_a_folder_of_peft(
    name: str, wanted: list[str], ties: bool, prepared: Prepared, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    base, cache = prepared[name]
    config = peft.LoraConfig(
        r=3,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=list(wanted),
        ensure_weight_tying=ties,
        task_type="CAUSAL_LM",
    )
    wrapped = wrap(load_oracle(cache.folder, torch.float32), config).train()
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter_parameters(wrapped).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    with torch.no_grad():
        theirs_TV = logits(wrapped, DOCUMENTS)
        without_TV = logits(load_oracle(cache.folder, torch.float32), DOCUMENTS)
    wrapped.save_pretrained(tmp_path / "adapter")
    recwarn.clear()  # of PEFT, that this unties two tables
    model = load_for_training(base, cache)
    read = read_adapter_folder(tmp_path / "adapter", linear_names=list(model.linears), tables=base_tables_of(model))
    assert (read.settings.tied_head is not None) == ties
    attach_adapters(model, read.settings, read.weights, dtype=torch.float32)
    assert relative_error(packed_logits(model, DOCUMENTS), theirs_TV) <= TOLERANCE
    assert relative_error(without_TV, theirs_TV) > 1e-3


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], r".*(q_proj|lm_head)"], ids=str)
def test_a_table_is_trained_whole_where_lora_was_meant_too(
    targets: list[str] | str, prepared: Prepared, tmp_path: Path
) -> None:
    """PEFT puts no LoRA there, and writes the table twice more, since the config names it among the targets."""
    base, cache = prepared["llama"]
    wrapped = moved_by_peft(cache.folder, target_modules=targets, modules_to_save=["lm_head"])
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with torch.no_grad():
        theirs_TV = logits(load_adapter(load_oracle(cache.folder, torch.float32), tmp_path / "adapter"), DOCUMENTS)
    model = load_for_training(base, cache)
    read = read_adapter_folder(
        tmp_path / "adapter", linear_names=list(model.linears), tables=base_tables_of(model), may_change_base=True
    )
    assert read.settings.modules_to_save[-1] == "lm_head"
    read = with_updated_tables(model, read)
    attach_adapters(model, read.settings, read.weights, dtype=torch.float32)
    assert relative_error(packed_logits(model, DOCUMENTS), theirs_TV) <= TOLERANCE


def test_two_tables_that_were_to_be_one_are_refused(prepared: Prepared, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = load_for_training(*prepared["qwen3"])
    settings = settings_for(model, BOTH)
    attach_adapters(model, settings, random_adapter(model, settings, b_size=0.05), dtype=torch.float32)
    export(tmp_path / "adapter", model, settings)
    path = tmp_path / "adapter" / WEIGHTS_FILE
    tensors = load_file(path)
    tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.lm_head.weight"] + 1
    save_file(tensors, path)
    with pytest.raises(ConfigError, match="different tables for embedding and head"):
        read_adapter_folder(tmp_path / "adapter", linear_names=list(model.linears), tables=base_tables_of(model))


@pytest.mark.parametrize(
    "name, wanted, found, fix",
    [
        ("llama", ["q_proj"], "'q_proj', which names no embedding, head or norm", "Correct"),
        (
            "qwen3",
            HEAD,
            "lm_head alone, of a base in which embedding and head are one table",
            "[embed_tokens, lm_head]",
        ),
        ("qwen3", EMBEDDING, "embed_tokens alone, of a base in which", "[embed_tokens, lm_head]"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(
    name: str, wanted: list[str], found: str, fix: str, prepared: Prepared
) -> None:
    with pytest.raises(ConfigError) as error:
        asked_tables(wanted, base_tables_of(load_for_training(*prepared[name])))
    message = str(error.value)
    assert message.startswith("lora.modules_to_save: found ")
    assert found in message
    assert fix in message


@pytest.mark.parametrize("name, wanted", [("llama", HEAD), ("qwen3", [])], ids=str)
def test_where_nothing_is_tied_nothing_is_untied(name: str, wanted: list[str], prepared: Prepared) -> None:
    with pytest.raises(
        ConfigError, match=r"lora\.untie_tables: found true, and no table that the base ties is trained"
    ):
        asked_tables(wanted, base_tables_of(load_for_training(*prepared[name])), unties=True)


def test_one_table_is_one_parameter_and_fp32_only_where_it_is_asked(prepared: Prepared) -> None:
    for name, count in (("qwen3", 1), ("llama", 2)):
        for dtype in (torch.bfloat16, torch.float32):
            model = load_for_training(*prepared[name])
            settings = settings_for(model, BOTH)
            attach_adapters(model, settings, random_adapter(model, settings, b_size=0.05), dtype=dtype)
            tables = table_parameters(model)
            assert len(tables) == count
            assert {table.dtype for table in tables.values()} == {dtype}
            assert {table.grad_dtype for table in tables.values()} == {torch.float32}
            embedding: Any = model.module.get_input_embeddings()
            assert (embedding.weight is model.head.weight) == (name == "qwen3")
            assert all(isinstance(weight, nn.Parameter) for weight in (embedding.weight, model.head.weight))

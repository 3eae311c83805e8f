"""Adapter folders go both ways between PEFT and us, and what is not plain LoRA is refused by name."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import asdict
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.adapter_config import short_target_modules
from qlora_trainer.model.adapter_fields import PLAIN, READ, UNUSED
from qlora_trainer.model.adapter_folder import read_adapter_fields, read_adapter_folder
from qlora_trainer.model.adapters import attach_adapters, trainable_parameters
from qlora_trainer.model.base import Base
from qlora_trainer.model.lora_settings import select_targets
from qlora_trainer.model.nf4_cache import NF4Cache
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.model.table_names import BaseTables
from qlora_trainer.run.export import export_adapter
from tests.model.peft_oracle import adapter_parameters, load_adapter, load_oracle, logits, wrap
from tests.model.tiny_bases import CONFIGS
from tests.model.tiny_models import (
    load_for_training,
    lora_settings,
    packed_logits,
    prepare,
    random_adapter,
    relative_error,
    tiny_documents,
)

DOCUMENTS = tiny_documents(33, 21)
NAMES = ["llama", "gemma2", "phi3"]
PEFT_DEFAULTS = asdict(peft.LoraConfig(peft_type=peft.PeftType.LORA, target_modules=["q_proj"]))
TARGETS: list[str | list[str]] = ["all-linear", ["o_proj", "down_proj"], r"model\.layers\.1\..*_proj"]


def _write(
    folder: Path, base: Base, model: QuantizedModel, target_modules: str | list[str] = "all-linear"
) -> dict[str, torch.Tensor]:
    settings = lora_settings(model, target_modules)
    weights = random_adapter(model, settings, b_size=0.05)
    attach_adapters(model, settings, weights, dtype=torch.float32)
    export_adapter(
        folder,
        trainable_parameters(model),
        settings,
        linear_names=list(model.linears),
        base_name=str(base.folder),
        revision=None,
    )
    return weights


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target_modules", TARGETS, ids=str)
def test_peft_loads_ours_and_gives_our_logits(name: str, target_modules: str | list[str], tmp_path: Path) -> None:
    base, cache = prepare(tmp_path / "base", CONFIGS[name])
    model = load_for_training(base, cache)
    _write(tmp_path / "adapter", base, model, target_modules)
    ours_TV = packed_logits(model, DOCUMENTS)
    oracle = load_oracle(cache.folder, torch.float32)
    with torch.no_grad():
        without_TV = logits(oracle, DOCUMENTS)
        theirs_TV = logits(load_adapter(oracle, tmp_path / "adapter"), DOCUMENTS)
    assert relative_error(ours_TV, theirs_TV) <= 1e-5
    assert relative_error(without_TV, theirs_TV) > 1e-2  # the adapter does something


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target_modules", TARGETS, ids=str)
def test_we_load_what_peft_saved_and_give_its_logits(
    name: str, target_modules: str | list[str], tmp_path: Path
) -> None:
    base, cache = prepare(tmp_path / "base", CONFIGS[name])
    wrapped = _save_with_peft(tmp_path / "adapter", cache, target_modules)
    with torch.no_grad():
        theirs_TV = logits(wrapped, DOCUMENTS)
    model = load_for_training(base, cache)
    adapter = read_adapter_folder(tmp_path / "adapter", linear_names=list(model.linears))
    attach_adapters(model, adapter.settings, adapter.weights, dtype=torch.float32)
    assert relative_error(packed_logits(model, DOCUMENTS), theirs_TV) <= 1e-5


@pytest.mark.parametrize("excluded", [["k_proj", "model.layers.0.mlp.up_proj"], r".*layers\.1\..*", [], ""], ids=str)
def test_what_peft_left_out_is_left_out(excluded: str | list[str], tmp_path: Path) -> None:
    """Mutations tried: an expression that need not match the whole name; the end of a name without its dot."""
    base, cache = prepare(tmp_path / "base", CONFIGS["llama"])
    wrapped = _save_with_peft(tmp_path / "adapter", cache, "all-linear", exclude_modules=excluded)
    model = load_for_training(base, cache)
    adapter = read_adapter_folder(tmp_path / "adapter", linear_names=list(model.linears))
    assert (len(adapter.settings.targets) < len(model.linears)) == bool(excluded)
    attach_adapters(model, adapter.settings, adapter.weights, dtype=torch.float32)
    with torch.no_grad():
        theirs_TV = logits(wrapped, DOCUMENTS)
    assert relative_error(packed_logits(model, DOCUMENTS), theirs_TV) <= 1e-5


@pytest.mark.parametrize("excluded", ["(", ["q_proj"], r".*", 5, [1]], ids=str)
def test_what_leaves_nothing_or_means_nothing_is_refused(excluded: object, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exclude_modules"):
        read_adapter_folder(
            _plain_folder(tmp_path / "adapter", exclude_modules=excluded), linear_names=["layers.0.q_proj"]
        )


def _save_with_peft(folder: Path, cache: NF4Cache, target_modules: str | list[str], **fields: Any) -> Any:
    oracle = load_oracle(cache.folder, torch.float32)
    asked: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": target_modules, **fields}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **asked)
    wrapped = wrap(oracle, config).train()
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter_parameters(wrapped).values():
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(folder)
    return wrapped


def test_the_folder_is_what_other_readers_expect(tmp_path: Path) -> None:
    base, cache = prepare(tmp_path / "base", CONFIGS["llama"])
    model = load_for_training(base, cache)
    weights = _write(tmp_path / "adapter", base, model, ["q_proj", "down_proj"])
    text = (tmp_path / "adapter" / "adapter_config.json").read_text()
    fields = json.loads(text)
    assert '"lora_alpha": 8,' in text  # a whole number, as PEFT writes it: not every reader takes 8.0
    # The fields that PEFT has had since 0.9; an older one fails on any that it does not know.
    assert fields == {
        "base_model_name_or_path": str(base.folder),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 8.0,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "rank_pattern": {},
        "alpha_pattern": {},
        "revision": None,
        "target_modules": ["down_proj", "q_proj"],
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
        "use_dora": False,
    }
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors.keys() == {f"base_model.model.{name}.weight" for name in weights}
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (4, 64)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_what_we_write_we_read(tmp_path: Path) -> None:
    base, cache = prepare(tmp_path / "base", CONFIGS["qwen2"])
    model = load_for_training(base, cache)
    weights = _write(tmp_path / "adapter", base, model)
    adapter = read_adapter_folder(tmp_path / "adapter", linear_names=list(model.linears))
    assert (adapter.base_name, adapter.revision, adapter.settings) == (str(base.folder), None, lora_settings(model))
    assert adapter.weights.keys() == weights.keys()
    assert all(torch.equal(adapter.weights[name], weights[name]) for name in weights)


def test_an_adapter_of_another_base_names_the_first_five_differences(tmp_path: Path) -> None:
    base, cache = prepare(tmp_path / "base", CONFIGS["llama"])
    _write(tmp_path / "adapter", base, load_for_training(base, cache))
    other = load_for_training(*prepare(tmp_path / "other", CONFIGS["qwen3"]))
    adapter = read_adapter_folder(tmp_path / "adapter", linear_names=list(other.linears))
    with pytest.raises(ConfigError) as error:
        attach_adapters(other, adapter.settings, adapter.weights, dtype=torch.float32)
    message = str(error.value)
    assert message.count("adapter (") == 5
    assert "q_proj.lora_B: adapter (64, 4), base (128, 4)" in message


def _plain_folder(folder: Path, **changes: object) -> Path:
    """A readable adapter folder, with some fields of its config changed."""
    folder.mkdir()
    fields: dict[str, object] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(fields | changes))
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(2, 8)}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    "field,value",
    [
        ("bias", "some"),
        ("layer_replication", [[0, 1, 2]]),
        ("alora_invocation_tokens", 1),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", True),
        ("monteclora_config", [8]),
        ("lora_bias", "yes"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "PiSSA"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("target_parameters", ["experts"]),
        ("use_bdlora", {"nblocks": -2}),
        ("use_qalora", "yes"),
        ("enable_lora", [True, False, True]),
        ("peft_type", "IA3"),
        ("use_tomorrows_lora", True),
        ("tomorrows_config", {"depth": 2}),
        ("tomorrows_way", "deep"),
    ],
)
def test_variants_are_refused_by_name(field: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read_adapter_fields(_plain_folder(tmp_path / "adapter", **{field: value}))
    if field == "init_lora_weights":
        way = "merge_and_unload), and take" if value == "loftq" else "path_initial_model_for_weight_conversion"
        assert way in str(error.value)
    assert f"{field} = {value!r}" in str(error.value)


def test_what_is_refused_is_told_in_a_line_with_what_it_depends_on(tmp_path: Path) -> None:
    loftq = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 5}}
    with pytest.raises(ConfigError, match=r"'loftq', loftq_config = \{'loftq_bits': 4, 'loftq_iter': 5\}; expected"):
        read_adapter_fields(_plain_folder(tmp_path / "loftq", **loftq))
    with pytest.raises(ConfigError) as error:
        read_adapter_fields(_plain_folder(tmp_path / "long", init_lora_weights="x" * 5000))
    assert len(str(error.value)) < 1000


def test_every_field_of_peft_is_known(tmp_path: Path) -> None:
    """A PEFT that has another one fails here, and in a file it is refused. Mutation tried: `velora_config` left out."""
    fields = {field.name for field in fields_of(peft.LoraConfig)}
    assert fields <= READ | UNUSED | PLAIN.keys()
    assert len(READ | UNUSED | PLAIN.keys()) == len(READ) + len(UNUSED) + len(PLAIN)
    changes: dict[str, object] = {name: {"a": 1} for name in sorted(UNUSED)}
    assert (
        read_adapter_fields(_plain_folder(tmp_path / "adapter", **changes, new_field=None, other={}, size=16))["r"] == 2
    )


PLAIN_IN_EFFECT: list[dict[str, Any]] = [
    {"bias": "all"},
    {"bias": "lora_only"},
    {"fan_in_fan_out": True},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": False},
    {"target_modules": ["q_proj", "W_pack", "query_key_value"]},
]


@pytest.mark.parametrize("fields", PLAIN_IN_EFFECT, ids=str)
def test_what_is_plain_lora_in_effect_is_read(fields: dict[str, Any], tmp_path: Path) -> None:
    """Biases that the base does not have, a layout that PEFT looks at for Conv1D only, starts, names of other bases."""
    base, cache = prepare(tmp_path / "base", CONFIGS["llama"])
    wrapped = _save_with_peft(tmp_path / "adapter", cache, **{"target_modules": ["q_proj", "up_proj"], **fields})
    model = load_for_training(base, cache)
    adapter = read_adapter_folder(tmp_path / "adapter", linear_names=list(model.linears))
    attach_adapters(model, adapter.settings, adapter.weights, dtype=torch.float32)
    with torch.no_grad():
        theirs_TV = logits(wrapped, DOCUMENTS)
    assert relative_error(packed_logits(model, DOCUMENTS), theirs_TV) <= 1e-5


@pytest.mark.parametrize("field", list(PEFT_DEFAULTS))
def test_the_defaults_of_peft_are_plain_lora(field: str, tmp_path: Path) -> None:
    value = json.loads(json.dumps(PEFT_DEFAULTS[field], default=str))
    assert read_adapter_fields(_plain_folder(tmp_path / "adapter", **{field: value}))[field] == value


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0},
        {"r": -1},
        {"r": "8"},
        {"r": True},
        {"r": 2.5},
        {"lora_alpha": "16"},
        {"lora_alpha": None},
        {"lora_dropout": "0.1"},
        {"target_modules": None},
        {"target_modules": 3},
        {"target_modules": [3]},
        {"use_rslora": "yes"},
        {"use_dora": 1},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"q_proj": 2.0}},
        {"rank_pattern": ["q_proj"]},
        {"rank_pattern": {"q_(": 2}},
        {"alpha_pattern": {"q_proj": "8"}},
        {"layers_to_transform": ["0"]},
        {"layers_pattern": 3},
        {"modules_to_save": "lm_head"},
        {"base_model_name_or_path": 3},
        {"base_model_name_or_path": ["owner/name"]},
        {"revision": 5},
        {"revision": "../x"},
        {"lora_alpha": 1e308},
        {"alpha_pattern": {"q_proj": 10**400}},
    ],
    ids=str,
)
def test_fields_of_a_wrong_type_are_refused(changes: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        read_adapter_fields(_plain_folder(tmp_path / "adapter", **changes))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", '{"r": 4}', "[" * 100_000, "\udcff"])
def test_broken_configs_are_refused(content: str, tmp_path: Path) -> None:
    folder = _plain_folder(tmp_path / "adapter")
    (folder / "adapter_config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match="no adapter config"):
        read_adapter_fields(folder)


def test_pickled_adapters_are_refused(tmp_path: Path) -> None:
    folder = _plain_folder(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no adapter_model\.safetensors"):
        read_adapter_fields(folder)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(ConfigError, match=r"only adapter_model\.bin, a pickle, which is never read"):
        read_adapter_fields(folder)


@pytest.mark.parametrize("content", [b"", b"12345678", b"\xff" * 100])
def test_broken_weights_are_refused(content: bytes, tmp_path: Path) -> None:
    folder = _plain_folder(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="no safetensors file"):
        read_adapter_folder(folder, linear_names=["q_proj"])


@pytest.mark.parametrize(
    "weight,found",
    [
        (torch.full((2, 8), float("nan")), "a number in q_proj.lora_A that is not finite"),
        (torch.full((2, 8), -float("inf")).half(), "a number in q_proj.lora_A that is not finite"),
        (torch.ones(2, 8, dtype=torch.int8), "q_proj.lora_A of int8"),
        (torch.ones(2, 8, dtype=torch.complex64), "q_proj.lora_A of complex64"),
    ],
    ids=["NaN", "infinity", "int8", "complex64"],
)
def test_weights_that_are_no_numbers_to_compute_with_are_refused(
    weight: torch.Tensor, found: str, tmp_path: Path
) -> None:
    """Of an export too, which never looks at them otherwise: all four were written on as they were."""
    folder = _plain_folder(tmp_path / "adapter")
    save_file({"base_model.model.q_proj.lora_A.weight": weight}, folder / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=re.escape(f"adapter_model.safetensors: found {found}")):
        read_adapter_folder(folder, linear_names=["q_proj"])


def test_weights_in_8_bits_are_read_as_the_numbers_that_they_are(tmp_path: Path) -> None:
    folder = _plain_folder(tmp_path / "adapter")
    weight = torch.linspace(-3, 3, 16).view(2, 8).to(torch.float8_e4m3fn)
    save_file({"base_model.model.q_proj.lora_A.weight": weight}, folder / "adapter_model.safetensors")
    (found,) = read_adapter_folder(folder, linear_names=["q_proj"]).weights.values()
    assert found.dtype == torch.float32
    assert torch.equal(found, weight.float())


def test_a_weight_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    folder = _plain_folder(tmp_path / "adapter")
    names = ("base_model.model.q_proj.lora_A.weight", "q_proj.lora_A.weight")
    save_file({name: torch.zeros(2, 8) for name in names}, folder / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="a weight twice"):
        read_adapter_folder(folder, linear_names=["q_proj"])


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_a_module_that_can_have_none_is_named_with_the_file(field: str, tmp_path: Path) -> None:
    folder = _plain_folder(tmp_path / "adapter", **{field: ["score"]})
    with pytest.raises(ConfigError) as error:
        read_adapter_folder(
            folder, linear_names=["q_proj"], tables=BaseTables(("model.embed_tokens",), "lm_head", False)
        )
    assert str(error.value).startswith(f"{folder / 'adapter_config.json'}: found {field} with 'score'")
    assert "Correct" not in str(error.value)


def test_modules_that_were_trained_whole_are_refused_where_they_cannot_be_used(tmp_path: Path) -> None:
    folder = _plain_folder(tmp_path / "adapter", modules_to_save=["lm_head"])
    with pytest.raises(ConfigError, match=r"modules_to_save = \['lm_head'\].*qlora-trainer merge"):
        read_adapter_folder(folder, linear_names=["q_proj"])
    read = read_adapter_folder(
        folder, linear_names=["q_proj"], tables=BaseTables(("model.embed_tokens",), "lm_head", False)
    )
    assert read.settings.modules_to_save == ("lm_head",)


@pytest.mark.parametrize("fields", [{"target_modules": ["q_proj", "lm_head"]}, {"trainable_token_indices": [3]}])
def test_updates_of_tables_are_refused_where_they_cannot_be_used(fields: dict[str, object], tmp_path: Path) -> None:
    folder = _plain_folder(tmp_path / "adapter", **fields)
    rows, parts = torch.zeros(1, 8), {"lora_A": torch.zeros(2, 8), "lora_B": torch.zeros(20, 2)}
    added = {f"base_model.model.lm_head.{leaf}.weight": part for leaf, part in parts.items()}
    if "trainable_token_indices" in fields:
        added = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": rows}
        with pytest.raises(ConfigError, match=r"trainable_token_indices = \[3\]"):
            read_adapter_folder(folder, linear_names=["q_proj"])
    save_file(added, folder / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"changes (lm_head|model\.embed_tokens) other than as a whole.*init_from"):
        read_adapter_folder(
            folder, linear_names=["q_proj"], tables=BaseTables(("model.embed_tokens",), "lm_head", False)
        )


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no adapter_model\.safetensors"):
        read_adapter_fields(tmp_path / "nowhere")


LINEARS = [
    f"model.layers.{layer}.{part}" for layer in range(3) for part in ("attn.q_proj", "attn.proj", "mlp.proj", "mlp.up")
]


@settings(max_examples=200)
@given(chosen=st.sets(st.sampled_from(LINEARS), min_size=1))
def test_short_names_mean_the_same_linears(chosen: set[str]) -> None:
    targets = tuple(name for name in LINEARS if name in chosen)
    assert select_targets(LINEARS, short_target_modules(targets, LINEARS)) == targets

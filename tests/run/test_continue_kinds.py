"""`lora.init_from` of every kind of adapter that PEFT makes: tables, biases, norms, variants, repeated layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig
from safetensors.torch import load_file

from qlora_trainer.cli.app import main
from qlora_trainer.errors import ConfigError
from qlora_trainer.run.adapted_base import find_adapters, load_adapters
from qlora_trainer.run.continue_from import filled_in
from qlora_trainer.run.records import Preparing
from tests.export.made_adapters import base_with_tokenizer, make_adapter, model_logits
from tests.export.made_adapters import peft_logits as made_logits
from tests.model.tiny_bases import small_config
from tests.model.tiny_models import packed_logits, relative_error, tiny_documents
from tests.run.peft_runs import begun_with, peft_folder, peft_logits, refusal, require_same_after_a_cut
from tests.run.tiny_run import run_to_end, run_until_step, tiny_config, write_base

pytestmark = pytest.mark.usefixtures("plans_made_once")


TABLES: list[tuple[bool, list[str], dict[str, Any], str]] = [
    (False, ["lm_head"], {}, "lm_head"),
    (False, ["embed_tokens"], {"trainable_token_indices": {"lm_head": [3, 7]}}, "embed_tokens, lm_head"),
    (True, ["embed_tokens"], {"ensure_weight_tying": True}, "embed_tokens, lm_head"),
    (True, [], {"trainable_token_indices": [3, 7]}, "embed_tokens, lm_head"),
]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("is_tied, tables, fields, whole", TABLES, ids=str)
def test_a_run_begins_with_whole_tables_where_peft_has_trained_parts(
    is_tied: bool,
    tables: list[str],
    fields: dict[str, Any],
    whole: str,
    tmp_path: Path,
    bases: dict[bool, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not unless the config says so: whole tables take memory. Mutation tried: the tables of the base instead."""
    base = bases[is_tied]
    folder = peft_folder(tmp_path / "theirs", base, *tables, **fields)
    message = refusal(begun_with(tmp_path, base, folder), capsys)
    assert "lora.modules_to_save: found [], and an adapter with LoRA or rows of its own on" in message
    assert f"Write lora.modules_to_save: [{whole}]" in message
    options = ("lora.dtype=float32", f"lora.modules_to_save=[{whole}]", "training.max_steps=2")
    config = begun_with(tmp_path, base, folder, *options)
    run_until_step(config, 1)
    run_to_end(config, resume="auto")
    found, expected = (peft_logits(base, path) for path in (tmp_path / "run" / "adapter", folder))
    assert relative_error(peft_logits(base, None), expected) > 1e-3
    assert relative_error(found, expected) <= 1e-5


# PEFT's tables with LoRA, other fields, and what becomes whole, of a base that ties embedding and head.
UNTIED: list[Any] = [
    (["lm_head"], {}, "embed_tokens, lm_head"),  # the file has the table of both, too
    ([], {"modules_to_save": ["lm_head"]}, "lm_head"),
    pytest.param([], {"modules_to_save": ["embed_tokens", "lm_head"]}, "embed_tokens, lm_head", marks=pytest.mark.slow),
    pytest.param([], {"trainable_token_indices": {"lm_head": [3]}}, "lm_head", marks=pytest.mark.slow),
]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("tables, fields, whole", UNTIED, ids=str)
def test_a_run_goes_on_with_tables_that_an_adapter_has_untied(
    tables: list[str], fields: dict[str, Any], whole: str, tmp_path: Path, base: Path
) -> None:
    """As PEFT makes two tables of one, they are trained: exported, PEFT has our logits; a resume changes nothing."""
    folder = peft_folder(tmp_path / "theirs", base, *tables, **fields)
    options = ["lora.dtype=float32", "training.max_steps=2"]
    options += [f"lora.modules_to_save=[{whole}]"] * ("modules_to_save" not in fields)
    config = begun_with(tmp_path, base, folder, *options)
    assert filled_in(config).lora.untie_tables
    run_to_end(config)
    found, expected = (peft_logits(base, path) for path in (tmp_path / "run" / "adapter", folder))
    assert relative_error(peft_logits(base, None), expected) > 1e-3
    assert relative_error(found, expected) <= 1e-5
    require_same_after_a_cut(tmp_path, base, folder, *options)
    begun, learned = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("run", "whole"))
    assert begun.keys() == learned.keys()
    names = [f"base_model.model.{'model.' * (own == 'embed_tokens')}{own}.weight" for own in whole.split(", ")]
    assert all(not torch.equal(begun[name], learned[name]) for name in names)
    if len(names) == 2:
        assert not torch.equal(*(learned[name] for name in names))


NO_LINEAR: list[tuple[bool, dict[str, Any], str]] = [
    (False, {"target_modules": ["lm_head", "embed_tokens"], "rank_pattern": {"lm_head": 2}}, "embed_tokens, lm_head"),
    (False, {"target_modules": ["lm_head"]}, "lm_head"),
    (True, {"target_modules": "dummy-target-modules", "trainable_token_indices": [3, 7]}, "embed_tokens, lm_head"),
]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("is_tied, fields, whole", NO_LINEAR, ids=str)
def test_a_run_goes_on_with_tables_alone(
    is_tied: bool, fields: dict[str, Any], whole: str, tmp_path: Path, bases: dict[bool, Path]
) -> None:
    """No LoRA on a linear. Of a head alone, no gradient goes through any layer: it learns, and a resume is the same."""
    base = bases[is_tied]
    folder = peft_folder(tmp_path / "theirs", base, **fields)
    options = ("lora.dtype=float32", f"lora.modules_to_save=[{whole}]", "training.max_steps=3")
    run_to_end(begun_with(tmp_path, base, folder, *options))
    expected, found = (peft_logits(base, path) for path in (folder, tmp_path / "run" / "adapter"))
    assert relative_error(peft_logits(base, None), expected) > 1e-3
    assert relative_error(found, expected) <= 1e-5
    if whole != "lm_head":
        return
    require_same_after_a_cut(tmp_path, base, folder, *options)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    before, after = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("run", "whole"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


# By the fields of a PEFT adapter of a base whose attention has biases: how many are in its file.
BIASES: list[tuple[dict[str, Any], int]] = [
    ({"bias": "all"}, 8),
    ({"target_modules": ["q_proj", "up_proj"], "lora_bias": True, "bias": "lora_only"}, 6),
]
# Of a base whose norms and head have biases: all of them, with LoRA on no linear.
PHI_BIASES: list[tuple[dict[str, Any], int]] = [({"target_modules": "dummy-target-modules", "bias": "all"}, 16)]


# PEFT takes a bias of B for a shard, and says that it cannot be merged without one of the linear.
@pytest.mark.filterwarnings("ignore:Adapter 'default'", "ignore:`lora_bias=True` was passed but")
@pytest.mark.parametrize(
    "is_phi, fields, num_biases", [*((False, *own) for own in BIASES), *((True, *own) for own in PHI_BIASES)], ids=str
)
def test_a_run_trains_the_biases_on_that_peft_has_trained(
    is_phi: bool, fields: dict[str, Any], num_biases: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutation tried: biases that begin with the base's."""
    base = write_base(tmp_path / "base", has_biases=True)
    if is_phi:
        base = base_with_tokenizer(tmp_path / "phi", small_config("phi", vocab_size=320), base)
    folder = peft_folder(tmp_path / "theirs", base, **fields)
    wanted = fields.get("bias", "none")
    assert filled_in(begun_with(tmp_path, base, folder)).lora.lora_bias is fields.get("lora_bias", False)
    assert filled_in(begun_with(tmp_path, base, folder)).lora.bias == wanted
    other = "lora_only" if wanted == "all" else "all"
    message = refusal(begun_with(tmp_path, base, folder, f"lora.bias={other}"), capsys)
    assert f"lora.bias: found '{other}'; expected '{wanted}', as " in message
    options = ("lora.dtype=float32", "training.max_steps=2")
    records = run_to_end(begun_with(tmp_path, base, folder, *options))
    told = f", and with the {num_biases} biases that it has trained"
    assert any(isinstance(one, Preparing) and one.what.endswith(told) for one in records)
    found, expected = (peft_logits(base, path) for path in (tmp_path / "run" / "adapter", folder))
    assert relative_error(found, expected) <= 1e-5
    require_same_after_a_cut(tmp_path, base, folder, *options)
    before, after = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("run", "whole"))
    biases = [name for name in before if name.endswith(".bias")]
    assert len(biases) == num_biases
    assert all(not torch.equal(before[name], after[name]) for name in biases)


def test_two_words_for_the_same_biases_are_both_taken(tmp_path: Path) -> None:
    """Every linear with a bias has LoRA, as in Qwen 2 with q, k and v: the file's own word is its own, and a run's."""
    base = write_base(tmp_path / "base", has_biases=True)
    every = ["q_proj", "k_proj", "v_proj", "o_proj"]
    for stated in ("all", "lora_only"):
        folder = peft_folder(tmp_path / stated, base, target_modules=every, bias=stated)
        assert filled_in(begun_with(tmp_path, base, folder)).lora.bias == stated
        for asked in ("all", "lora_only"):
            assert filled_in(begun_with(tmp_path, base, folder, f"lora.bias={asked}")).lora.bias == asked
        with pytest.raises(ConfigError, match=r"lora\.bias: found 'none'; expected"):
            filled_in(begun_with(tmp_path, base, folder, "lora.bias=none"))


# PEFT's fields -> what is told of them, and the rank as plain LoRA.
VARIANTS: dict[str, tuple[dict[str, Any], str, int]] = {
    "pissa": ({"init_lora_weights": "pissa"}, "PiSSA, of twice the rank", 6),
    "pissa of all ranks": ({"init_lora_weights": "pissa", "r": 100}, "PiSSA, of twice the rank", 200),  # 64 are there
    "olora": ({"init_lora_weights": "olora"}, "OLoRA, of twice the rank", 6),
    "kasa": ({"kasa_config": KasaConfig()}, "KaSA, of twice the rank", 6),
    "bdlora": ({"use_bdlora": BdLoraConfig(["down_proj"], ["q_proj"], nblocks=2), "r": 4}, "BD-LoRA, whose zeros", 4),
    "monteclora": ({"monteclora_config": MontecloraConfig()}, "MonteCLoRA as it is evaluated", 3),
    "weights": ({"target_parameters": ["v_proj.weight"], "alpha_pattern": {"v_proj.weight": 9}}, "LoRA on weights", 3),
}

QUICK_VARIANTS = ("pissa", "weights")  # .ci/run has the others, too


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")  # of a weight; PEFT takes it
@pytest.mark.parametrize(
    "variant",
    [*QUICK_VARIANTS, *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS if name not in QUICK_VARIANTS)],
)
def test_a_run_goes_on_from_a_variant_as_plain_lora(variant: str, tmp_path: Path, base: Path) -> None:
    """Of what rank it takes, with PEFT's logits over the base as it was published; `chat` has the same ones."""
    folder, (fields, told, rank) = tmp_path / "theirs", VARIANTS[variant]
    make_adapter(folder, base, target_modules=["q_proj", "down_proj"], **fields)
    options = ("lora.dtype=float32", "training.max_steps=2")
    records = [
        one.what for one in run_to_end(begun_with(tmp_path, base, folder, *options)) if isinstance(one, Preparing)
    ]
    assert any(one.startswith(f"read as plain LoRA: {told}") for one in records)
    assert any(one.endswith(f"what {variant.split(maxsplit=1)[0]} has taken from it") for one in records) == (rank > 4)
    found, expected = (made_logits(base, path, tiny_documents(20)) for path in (tmp_path / "run" / "adapter", folder))
    assert relative_error(found, expected) <= 1e-5
    assert relative_error(model_logits(base, tiny_documents(20)), expected) > 1e-2
    targets = {"run": tmp_path / "run" / "adapter", "theirs": folder}
    adapters = load_adapters(find_adapters(targets, base=str(base)), compute_dtype="float32")
    used = {}
    for name in targets:
        adapters.activate(name)
        used[name] = packed_logits(adapters.model, tiny_documents(20))
    assert relative_error(used["run"], used["theirs"]) <= 1e-5
    assert filled_in(begun_with(tmp_path, base, folder)).lora.rank == rank
    if variant not in ("pissa", "bdlora"):
        return
    require_same_after_a_cut(tmp_path, base, folder, *options)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:.*embedding layers")
@pytest.mark.parametrize(
    "fields",
    [{"init_lora_weights": "pissa"}, pytest.param({"kasa_config": KasaConfig()}, marks=pytest.mark.slow)],
    ids=str,
)
def test_a_run_goes_on_from_what_a_start_has_left_of_a_head(
    fields: dict[str, Any], tmp_path: Path, bases: dict[bool, Path]
) -> None:
    """Whether the head is in the file or not: then the part is found again in the base's."""
    base, options = bases[False], ("lora.dtype=float32", "training.max_steps=2", "lora.modules_to_save=[lm_head]")
    made = make_adapter(tmp_path / "with", base, target_modules=["q_proj", "lm_head"], **fields)
    made.save_pretrained(tmp_path / "without", save_embedding_layers=False)
    for name in ("with", "without"):
        folder, to = tmp_path / name, tmp_path / f"run of {name}"
        run_to_end(begun_with(tmp_path, base, folder, *options, f"output.dir={to}"))
        found, expected = (made_logits(base, path, tiny_documents(20)) for path in (to / "adapter", folder))
        assert relative_error(found, expected) <= 1e-5
        assert relative_error(model_logits(base, tiny_documents(20)), expected) > 1e-2


@pytest.mark.parametrize(
    "fields",
    [
        {},
        pytest.param({"use_dora": True, "rank_pattern": {r"layers\.3\..*": 5}}, marks=pytest.mark.slow),
        pytest.param({"modules_to_save": ["lm_head"]}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_goes_on_with_repeated_layers(fields: dict[str, Any], tmp_path: Path, bases: dict[bool, Path]) -> None:
    """PEFT's copies share their weights, ours do not: trained, exported, used and merged, the logits are PEFT's.

    Mutation tried: layers by their own number in place of the repeated one's.
    """
    base, folder = bases[False], tmp_path / "theirs"
    asked: dict[str, Any] = {"layer_replication": [(0, 2), (1, 2), (0, 1)], **fields}
    make_adapter(folder, base, target_modules=["q_proj", "down_proj"], **asked)
    options = ("lora.dtype=float32", "training.max_steps=2")
    run_to_end(begun_with(tmp_path, base, folder, *options))
    found, expected = (made_logits(base, path, tiny_documents(20)) for path in (tmp_path / "run" / "adapter", folder))
    assert relative_error(found, expected) <= 1e-5
    assert relative_error(model_logits(base, tiny_documents(20)), expected) > 1e-2
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "run" / "adapter", folder))
    assert {name for name in theirs if ".original_module." not in name} == ours.keys()
    assert sum(".layers.3." in name for name in ours) == sum(".layers.0." in name for name in ours) > 0
    assert main(["merge", str(folder), "--to", str(tmp_path / "merged"), "--dtype", "fp32", "--force"]) == 0
    assert relative_error(model_logits(tmp_path / "merged", tiny_documents(20)), expected) <= 1e-5
    require_same_after_a_cut(tmp_path, base, folder, *options)


@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": ["norm"]},
        pytest.param(
            {"modules_to_save": ["norm", "lm_head"], "layer_replication": [(0, 2), (1, 2)]}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_a_run_goes_on_with_norms_that_an_adapter_has_trained(
    fields: dict[str, Any], tmp_path: Path, bases: dict[bool, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of it is to be named; trained, exported, used and merged, the logits are PEFT's."""
    base, folder = bases[False], tmp_path / "theirs"
    make_adapter(folder, base, target_modules=["q_proj", "down_proj"], **fields)
    options = ("lora.dtype=float32", "training.max_steps=2")
    run_to_end(begun_with(tmp_path, base, folder, *options, "training.learning_rate=1e-12"))
    found, expected = (made_logits(base, path, tiny_documents(20)) for path in (tmp_path / "run" / "adapter", folder))
    assert relative_error(found, expected) <= 1e-5
    assert relative_error(model_logits(base, tiny_documents(20)), expected) > 1e-2
    assert main(["merge", str(folder), "--to", str(tmp_path / "merged"), "--dtype", "fp32", "--force"]) == 0
    assert relative_error(model_logits(tmp_path / "merged", tiny_documents(20)), expected) <= 1e-5
    capsys.readouterr()
    assert main(["export", str(folder), "--to", str(tmp_path / "portable"), "--portable"]) != 0
    assert "norms" in capsys.readouterr().err
    require_same_after_a_cut(tmp_path, base, folder, *options)
    begun, learned = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("run", "whole"))
    names = [name for name in begun if name.endswith("norm.weight")]
    assert len(names) == 5 + 2 * ("layer_replication" in fields)
    assert all(not torch.equal(begun[name], learned[name]) for name in names)


@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": ["layers.1.self_attn", "lm_head"]},
        pytest.param({"modules_to_save": ["k_proj"], "layer_replication": [(0, 2), (1, 2)]}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_goes_on_with_linears_that_an_adapter_has_trained_whole(
    fields: dict[str, Any], tmp_path: Path, bases: dict[bool, Path]
) -> None:
    """As LoRA of full rank beside NF4; merged, they are what they were."""
    base, folder = bases[False], tmp_path / "theirs"
    made = make_adapter(folder, base, target_modules=["q_proj", "down_proj"], **fields)
    options = ("lora.dtype=float32", "training.max_steps=2")
    config = begun_with(tmp_path, base, folder, *options, "training.learning_rate=1e-12")
    assert "lora.rank_pattern" not in config.lora.model_fields_set
    run_to_end(config)
    found, expected = (made_logits(base, path, tiny_documents(20)) for path in (tmp_path / "run" / "adapter", folder))
    assert relative_error(found, expected) <= 1e-5
    assert relative_error(model_logits(base, tiny_documents(20)), expected) > 1e-2
    assert main(["merge", str(folder), "--to", str(tmp_path / "merged"), "--dtype", "fp32", "--force"]) == 0
    whole = {
        name.replace(".modules_to_save.default.", ".").removeprefix("base_model.model."): own
        for name, own in made.named_parameters()
        if ".modules_to_save.default." in name
    }
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert whole
    assert all(relative_error(merged[name], own.detach()) <= 1e-6 for name, own in whole.items())
    require_same_after_a_cut(tmp_path, base, folder, *options)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_new_run_trains_repeated_layers_and_a_head_that_it_unties(tmp_path: Path, base: Path) -> None:
    """What it exports PEFT makes the same model of, over the same base in NF4."""
    options = ("lora.layer_replication=[[0, 2], [0, 2]]", "lora.modules_to_save=[lm_head]", "lora.untie_tables=true")
    run_to_end(tiny_config(tmp_path, base, *options, "lora.dtype=float32", "training.learning_rate=5e-3"))
    folder = tmp_path / "run" / "adapter"
    adapters = load_adapters(find_adapters({"ours": folder}, base=None), compute_dtype="float32")
    adapters.activate("ours")
    found, expected = packed_logits(adapters.model, tiny_documents(20)), peft_logits(base, folder)
    assert relative_error(found, expected) <= 1e-5
    assert relative_error(peft_logits(base, None), expected) > 1e-2


def test_over_nf4_repeated_layers_are_those_of_peft(tmp_path: Path, base: Path) -> None:
    folder = peft_folder(tmp_path / "theirs", base, layer_replication=[[0, 2], [0, 2]])
    adapters = load_adapters(find_adapters({"theirs": folder}, base=str(base)), compute_dtype="float32")
    adapters.activate("theirs")
    assert relative_error(packed_logits(adapters.model, tiny_documents(20)), peft_logits(base, folder)) <= 1e-5

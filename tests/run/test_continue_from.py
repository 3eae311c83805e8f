"""`lora.init_from`: a run that begins with an adapter of ours or of PEFT's, and refuses what it cannot begin with."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_trainer.cli.app import main
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.config.yaml_lines import write_yaml
from qlora_trainer.errors import ConfigError
from qlora_trainer.model.base import resolve_base
from qlora_trainer.model.nf4_cache import prepare_nf4_cache
from qlora_trainer.run import continue_from
from qlora_trainer.run.adapted_base import find_adapters, load_adapters
from qlora_trainer.run.continue_from import filled_in, initial_folder
from qlora_trainer.run.records import Preparing
from tests.export.made_adapters import base_with_tokenizer, make_adapter, model_logits
from tests.export.made_adapters import peft_logits as made_logits
from tests.model.peft_oracle import load_adapter, load_oracle, logits, wrap
from tests.model.tiny_bases import small_config
from tests.model.tiny_models import packed_logits, relative_error, tiny_documents
from tests.run.tiny_run import course, run_to_end, run_until_step, tiny_config, write_base
from tests.run.told import complaint

pytestmark = pytest.mark.usefixtures("plans_made_once")

# What PEFT makes, and we must take from its folder: each changes the result.
FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 2}, "use_rslora": True},
    "dora": {"use_dora": True},
    "layers": {"layers_to_transform": 0},  # a number, which is false
}


def peft_folder(folder: Path, base: Path, *tables: str, **fields: Any) -> Path:
    """An adapter of rank 3, with LoRA on these tables, too, that changes the logits, as PEFT saves it."""
    cache = prepare_nf4_cache(resolve_base(str(base)), double_quant=True)
    asked = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj", *tables], **fields}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **asked)
    wrapped = wrap(load_oracle(cache.folder, torch.float32), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))  # two may be one
    wrapped.save_pretrained(folder)
    return folder


def peft_logits(base: Path, adapter: Path | None) -> Tensor:
    """Of PEFT's adapter, if any, over our cache of the base."""
    oracle = load_oracle(prepare_nf4_cache(resolve_base(str(base)), double_quant=True).folder, torch.float32)
    with torch.no_grad():
        return logits(oracle if adapter is None else load_adapter(oracle, adapter), tiny_documents(20))


def begun_with(tmp_path: Path, base: Path, folder: Path, *options: str) -> RunConfig:
    """As `tiny_config`, but the rank is left open; nothing is learned."""
    config = tiny_config(tmp_path, base, f"lora.init_from={folder}", "training.learning_rate=1e-30", *options)
    section = config.lora.model_copy()
    fields = {key: getattr(section, key) for key in section.model_fields_set - {"rank"}}
    return config.model_copy(update={"lora": type(section).model_validate(fields)})


def require_same_after_a_cut(tmp_path: Path, base: Path, folder: Path, *options: str) -> None:
    """A run that learns, into `whole`, and one that is cut off after a step and resumed, into `cut`: bit for bit."""
    whole, cut = (
        begun_with(tmp_path, base, folder, *options, "training.learning_rate=5e-3", f"output.dir={tmp_path / name}")
        for name in ("whole", "cut")
    )
    run_to_end(whole)
    run_until_step(cut, 1)
    run_to_end(cut, resume="auto")
    assert course(tmp_path / "cut") == course(tmp_path / "whole")


@pytest.mark.parametrize("variant", FIELDS)
def test_a_run_begins_with_what_peft_has_trained(variant: str, tmp_path: Path, base: Path) -> None:
    folder = peft_folder(tmp_path / "theirs", base, **FIELDS[variant])
    config = begun_with(tmp_path, base, folder, "lora.dtype=float32", "training.max_steps=1")
    records = run_to_end(config)
    assert any(isinstance(one, Preparing) and f"beginning with the adapter {folder}" in one.what for one in records)
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "run" / "adapter", folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    found, expected = (peft_logits(base, path) for path in (tmp_path / "run" / "adapter", folder))
    assert torch.equal(found, expected)


TABLES: list[tuple[bool, list[str], dict[str, Any], str]] = [
    (False, ["lm_head"], {}, "lm_head"),
    (False, ["embed_tokens"], {"trainable_token_indices": {"lm_head": [3, 7]}}, "embed_tokens, lm_head"),
    (True, ["embed_tokens"], {"ensure_weight_tying": True}, "embed_tokens, lm_head"),
    (True, [], {"trainable_token_indices": [3, 7]}, "embed_tokens, lm_head"),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, base: Path) -> dict[bool, Path]:
    """By whether they tie embedding and head."""
    return {True: base, False: write_base(tmp_path_factory.mktemp("untied"), is_tied=False)}


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
UNTIED: list[tuple[list[str], dict[str, Any], str]] = [
    (["lm_head"], {}, "embed_tokens, lm_head"),  # the file has the table of both, too
    ([], {"modules_to_save": ["lm_head"]}, "lm_head"),
    ([], {"modules_to_save": ["embed_tokens", "lm_head"]}, "embed_tokens, lm_head"),
    ([], {"trainable_token_indices": {"lm_head": [3]}}, "lm_head"),
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

QUICK_VARIANTS = ("pissa", "bdlora", "weights")  # .ci/run has the others, too


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


@pytest.mark.parametrize("excluded", [["layers.0.self_attn.q_proj"], ["v_proj"], r".*layers\.1\..*"], ids=str)
@pytest.mark.parametrize("beside", [{}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_what_peft_was_to_leave_out_stays_out(
    beside: dict[str, Any], excluded: str | list[str], tmp_path: Path, bases: dict[bool, Path]
) -> None:
    """The config has no such key: the linears that were left are named."""
    base = bases[False]
    folder = peft_folder(
        tmp_path / "theirs", base, target_modules=["q_proj", "v_proj"], exclude_modules=excluded, **beside
    )
    assert run_to_end(begun_with(tmp_path, base, folder, "lora.dtype=float32", "training.max_steps=1"))
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "run" / "adapter", folder))
    assert {name for name in ours if ".lora_" in name} == {name for name in theirs if ".lora_" in name}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_names_of_other_bases_among_the_targets_are_passed_over(tmp_path: Path, base: Path) -> None:
    folder = peft_folder(tmp_path / "theirs", base, "W_pack")
    assert run_to_end(begun_with(tmp_path, base, folder, "training.max_steps=1"))


def test_a_run_goes_on_from_a_run_and_a_resume_of_it_is_the_same(tmp_path: Path, base: Path) -> None:
    run_to_end(tiny_config(tmp_path, base, "lora.use_rslora=true", f"output.dir={tmp_path / 'first'}"))
    options = (f"lora.init_from={tmp_path / 'first'}", "lora.dropout=0.1")
    whole = tiny_config(tmp_path, base, *options, f"output.dir={tmp_path / 'whole'}")
    run_to_end(whole)
    first = [json.loads(line) for line in (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()]
    second = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert second[0]["loss"] < first[0]["loss"]  # same documents: it begins where the other one ended
    cut = tiny_config(tmp_path, base, *options)
    run_until_step(cut, 3)
    run_to_end(cut, resume="auto")
    assert course(tmp_path / "run") == course(tmp_path / "whole")
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "last" / "manifest.json").read_text())
    assert len(manifest["fingerprints"]["initial adapter"]) == 64


def test_a_resume_refuses_another_adapter_under_the_same_name(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = peft_folder(tmp_path / "theirs", base)
    config = begun_with(tmp_path, base, folder)
    run_until_step(config, 3)
    tensors = load_file(folder / "adapter_model.safetensors")
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(changed, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="another initial adapter than this run began with"):
        run_to_end(config, resume="auto")
    other = shutil.copytree(folder, tmp_path / "other")
    with pytest.raises(ConfigError, match=r"lora\.init_from at --resume"):
        run_to_end(begun_with(tmp_path, base, other), resume="auto")


def test_what_the_config_leaves_open_is_taken_from_the_adapter(tmp_path: Path, base: Path) -> None:
    folder = peft_folder(tmp_path / "theirs", base, **FIELDS["patterns"], **FIELDS["layers"], lora_dropout=0.3)
    lora = filled_in(begun_with(tmp_path, base, folder)).lora
    assert (lora.rank, lora.alpha, lora.use_rslora, lora.use_dora) == (3, 5, True, False)
    assert set(lora.target_modules) == {"q_proj", "v_proj", "down_proj"}
    assert (lora.layers_to_transform, lora.rank_pattern, lora.alpha_pattern) == (
        (0,),
        (("q_proj", 5),),
        (("v_proj", 2),),
    )
    assert lora.dropout == 0.0  # how it is trained is not taken
    agreeing = (
        "lora.rank=3",
        "lora.alpha=5",
        "lora.use_rslora=true",
        "lora.target_modules=[v_proj, q_proj, down_proj]",
    )
    config = tiny_config(tmp_path, base, f"lora.init_from={folder}", *agreeing)
    assert filled_in(config).lora.rank == 3
    assert run_to_end(tiny_config(tmp_path, base, f"lora.init_from={folder}", *agreeing, "training.max_steps=1"))


@pytest.mark.parametrize(
    "option,where",
    [
        ("lora.rank=4", "lora.rank: found 4; expected 3, as "),
        ("lora.rank=max", "lora.rank: found 'max'; expected 3, as "),
        ("lora.alpha=6", "lora.alpha: found 6.0; expected 5, as "),
        ("lora.use_dora=true", "lora.use_dora: found True; expected False, as "),
        ("lora.target_modules=all-linear", "lora.target_modules: found 14 linears, 8 of them"),
        ("lora.layers_to_transform=[0]", "lora.target_modules: found 3 linears, 3 of them"),
        ("lora.rank_pattern={q_proj: 4}", "lora.rank_pattern: found rank 4 of model.layers.0.self_attn.q_proj"),
        ("lora.alpha_pattern={q_proj: 4}", "lora.alpha_pattern: found alpha 4.0 of model.layers.0.self_attn.q_proj"),
    ],
)
def test_what_the_config_asks_otherwise_is_refused(
    option: str, where: str, tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = peft_folder(tmp_path / "theirs", base)
    options = [option] if option.startswith("lora.rank=") else ["lora.rank=3", option]
    assert where in refusal(tiny_config(tmp_path, base, f"lora.init_from={folder}", *options), capsys)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    "changes, options, told",
    [
        ({"lora_alpha": 0}, ("lora.rank=3",), "found lora_alpha = 0;"),
        ({"lora_alpha": -0.0}, ("lora.rank=3",), "found lora_alpha = -0.0;"),
        (
            {"init_lora_weights": "pissa"},
            ("lora.rank=3",),
            "lora.rank: found 3; expected 6, as .* has it \\(read as plain LoRA: PiSSA, of twice the rank\\)",
        ),
        ({"modules_to_save": ["score"]}, (), "modules_to_save with 'score', which names no embedding, head or norm"),
    ],
    ids=str,
)
def test_what_is_wrong_is_told_as_the_file_has_it(
    changes: dict[str, Any], options: tuple[str, ...], told: str, tmp_path: Path, base: Path
) -> None:
    folder = peft_folder(tmp_path / "theirs", base)
    path, weights = folder / "adapter_config.json", load_file(folder / "adapter_model.safetensors")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    saved = {f"base_model.model.model.{name}.weight": torch.ones(8) for name in changes.get("modules_to_save", [])}
    save_file(weights | saved, folder / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=told):
        filled_in(tiny_config(tmp_path, base, f"lora.init_from={folder}", *options))


def refusal(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says of a file that has those keys alone which `config` was given."""
    path = Path(config.output.dir).with_suffix(".yaml")
    path.write_text(write_yaml(config.model_dump(mode="json", exclude_unset=True)))
    capsys.readouterr()
    assert main(["train", str(path)]) == 2
    return complaint(capsys)


def damaged(folder: Path, how: str, canary: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = next(iter(tensors))
    if how == "missing":
        del tensors[first]
    elif how == "shape":
        tensors = {name: tensor[:, :5].contiguous() for name, tensor in tensors.items()}
    elif how == "infinite":
        tensors[first][0, 0] = float("inf")
    save_file(tensors, weights, {"format": "pt"})
    if how == "pickle":
        weights.unlink()
        (folder / "adapter_model.bin").write_bytes(pickle.dumps(_Canary(canary)))
    elif how == "renamed":
        weights.write_bytes(pickle.dumps(_Canary(canary)))
    elif how in ("saved", "negative"):
        config = folder / "adapter_config.json"
        change = {"init_lora_weights": "corda"} if how == "saved" else {"lora_alpha": -4}
        config.write_text(json.dumps(json.loads(config.read_text()) | change))


class _Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


@pytest.mark.parametrize(
    "how,found",
    [
        ("missing", "1 weights that do not fit the base (model.layers.0.mlp.down_proj.lora_A: adapter has none"),
        ("shape", "6 weights that do not fit the base"),
        ("infinite", "that is not finite"),
        ("pickle", "only adapter_model.bin, a pickle, which is never read"),
        ("renamed", "no safetensors file"),
        ("saved", "init_lora_weights = 'corda'"),
        ("negative", "lora_alpha = -4"),
    ],
)
def test_an_adapter_that_cannot_be_begun_with_is_refused_before_weights(
    how: str,
    found: str,
    tmp_path: Path,
    base: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = peft_folder(tmp_path / "theirs", base)
    damaged(folder, how, tmp_path / "canary")
    monkeypatch.setattr("qlora_trainer.run.prepare.load_quantized", None)
    message = refusal(begun_with(tmp_path, base, folder), capsys)
    assert found in message
    assert message.count("adapter (") <= 5
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("name", ["nowhere", "../../etc", "/" + "x" * 300, "a" * 300, "/dev/null", "./a/b"])
def test_a_name_of_nothing_is_refused(name: str, tmp_path: Path, base: Path) -> None:
    with pytest.raises(ConfigError, match="a PEFT adapter folder"):
        filled_in(tiny_config(tmp_path, base, f"lora.init_from={name}"))


def snapshot(tmp_path: Path, base: Path, commit: str) -> Path:
    """As the hub's cache names what it has fetched."""
    return peft_folder(tmp_path / "snapshots" / commit, base)


class Hub:
    """In the place of `snapshot_download`: what was asked for, and the folder of a branch or a commit."""

    def __init__(self, folders: dict[str | None, Path]) -> None:
        self.folders = folders
        self.asked: list[tuple[str, str | None, list[str]]] = []

    def __call__(self, name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((name, revision, allow_patterns))
        if revision not in self.folders:
            raise OSError("no network")
        return str(self.folders[revision])


def test_of_a_hub_repository_only_the_adapter_is_fetched(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub({None: peft_folder(tmp_path / "theirs", base)})
    monkeypatch.setattr(continue_from, "snapshot_download", hub)
    assert initial_folder("owner/name") == tmp_path / "theirs"
    assert hub.asked == [("owner/name", None, ["adapter_config.json", "adapter_model.safetensors"])]
    with pytest.raises(ConfigError, match=r"lora\.init_from: found 'owner/name@v2', no folder, .*no network"):
        initial_folder("owner/name@v2")


def test_a_hub_id_is_pinned_to_its_commit(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch that moves on is another adapter: a resume refuses it, and takes the commit by its name."""
    old, new = "a" * 40, "b" * 40
    folder = snapshot(tmp_path, base, old)
    hub = Hub({None: folder, "main": folder, old: folder})
    monkeypatch.setattr(continue_from, "snapshot_download", hub)
    for name in ("owner/name", "owner/name@main", f"owner/name@{old}"):
        assert filled_in(begun_with(tmp_path, base, Path(name))).lora.init_from == f"owner/name@{old}"
    assert [revision for _, revision, _ in hub.asked] == [None, "main", old]
    config = begun_with(tmp_path, base, Path("owner/name"))
    run_until_step(config, 3)
    state = json.loads((tmp_path / "run" / "checkpoints" / "last" / "state.json").read_text())
    assert state["config"]["lora"]["init_from"] == f"owner/name@{old}"
    hub.folders[None] = hub.folders[new] = snapshot(tmp_path, base, new)
    found = rf"lora\.init_from at --resume: found 'owner/name@{new}'; expected 'owner/name@{old}'"
    with pytest.raises(ConfigError, match=found):
        run_to_end(config, resume="auto")
    run_to_end(begun_with(tmp_path, base, Path(f"owner/name@{old}")), resume="auto")


@pytest.mark.parametrize("revision", ["", "../x", "a..b", "-x", "a b", "x/", "a//b", "x" * 300, "a@b"])
def test_what_can_be_no_revision_is_refused(
    revision: str, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continue_from, "snapshot_download", None)
    with pytest.raises(ConfigError, match=r"lora\.init_from: found .* expected owner/name@revision"):
        filled_in(tiny_config(tmp_path, base, f"lora.init_from='owner/name@{revision}'"))

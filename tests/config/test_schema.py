from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from qlora_trainer.config.did_you_mean import DOTTED_KEYS
from qlora_trainer.config.schema import LoraSection, RunConfig

REQUIRED: dict[str, dict[str, Any]] = {"model": {"base": "owner/name"}, "data": {"train": "train.jsonl"}}


def config_with(dotted: str, value: object) -> RunConfig:
    section, key = dotted.split(".")
    return RunConfig.model_validate({**REQUIRED, section: {**REQUIRED.get(section, {}), key: value}})


def value_of(config: RunConfig, dotted: str) -> object:
    section, key = dotted.split(".")
    value: object = getattr(getattr(config, section), key)
    return value


def test_defaults() -> None:
    config = RunConfig.model_validate(REQUIRED)
    assert config.model_dump() == {
        "model": {"base": "owner/name", "revision": None},
        "quantization": {"double_quant": True, "head": "bfloat16", "compute_dtype": "auto"},
        "lora": {
            "rank": 16,
            "alpha": "auto",
            "dropout": 0.0,
            "dtype": "auto",
            "target_modules": "all-linear",
            "layers_to_transform": None,
            "layer_replication": (),
            "use_rslora": False,
            "use_dora": False,
            "rank_pattern": (),
            "alpha_pattern": (),
            "modules_to_save": (),
            "untie_tables": False,
            "bias": "none",
            "lora_bias": False,
            "alora_invocation_tokens": (),
            "init_from": None,
        },
        "data": {
            "train": "train.jsonl",
            "eval": None,
            "revision": None,
            "eval_fraction": 0.05,
            "format": None,
            "columns": None,
            "chat_template": None,
            "train_on": "assistant",
            "seq_len": "auto",
            "overlong": "drop",
            "max_dropped_share": 0.05,
            "on_bad_row": "stop",
            "streaming": False,
            "stream_rows": 10_000,
            "packing": True,
        },
        "training": {
            "epochs": 1.0,
            "max_steps": None,
            "global_batch_size": 16,
            "learning_rate": 2e-4,
            "loraplus_lr_ratio": 1.0,
            "schedule": "cosine",
            "warmup_ratio": 0.03,
            "optimizer": "auto",
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "seed": 0,
            "save_every": "auto",
            "eval_every": "auto",
            "early_stopping_patience": None,
        },
        "memory": {
            "budget": "auto",
            "host_budget": "auto",
            "micro_batch_tokens": "auto",
            "activation_checkpointing": "auto",
            "loss_chunk_tokens": "auto",
            "activation_offload": "auto",
            "tile_tokens": "auto",
            "embedding_residency": "auto",
            "optimizer_residency": "auto",
            "base_residency": "auto",
            "paging_dir": None,
        },
        "output": {"dir": "runs/default", "trackers": (), "keep_checkpoints": 3, "sample_questions": 3},
    }


@pytest.mark.parametrize(
    "dotted,value",
    [
        ("quantization.compute_dtype", "float16"),
        ("lora.alpha", 32),
        ("lora.alpha", 0.5),
        ("lora.dropout", 0),
        ("lora.target_modules", r".*\.(q|v)_proj"),
        ("lora.layers_to_transform", (3, 0)),
        ("lora.layer_replication", ((0, 2), (1, 2))),
        ("lora.rank_pattern", (("q_proj", 32), (".*_proj", 8))),
        ("lora.alpha_pattern", (("q_proj", 0.5),)),
        ("data.train", ("a.jsonl", "b/*.csv")),
        ("data.columns", (("completion", "reply"), ("prompt", "query"))),
        ("data.seq_len", 8),
        ("data.eval_fraction", 0),
        ("training.epochs", 0.25),
        ("training.epochs", 3),
        ("training.max_grad_norm", None),
        ("training.warmup_ratio", 1),
        ("training.optimizer", "paged_adamw_8bit"),
        ("memory.activation_checkpointing", False),
        ("memory.activation_checkpointing", 12),
        ("memory.activation_checkpointing", "auto"),
        ("output.sample_questions", 0),
    ],
)
def test_accepts(dotted: str, value: object) -> None:
    assert value_of(config_with(dotted, value), dotted) == value


@pytest.mark.parametrize(
    "dotted,values",
    [
        ("model.base", ["", " ", "a\0b", 3, None]),
        ("model.revision", ["", 1.5]),
        ("quantization.double_quant", ["true", 1, None]),
        ("quantization.head", ["bf16", "auto", True, None]),
        ("quantization.compute_dtype", ["bf16", None]),
        ("lora.rank", [0, -1, "16", 16.0, True, None]),
        ("lora.alpha", [0, -2, "double", float("nan"), float("inf"), True]),
        ("lora.dropout", [1, -0.1, "0"]),
        ("lora.dtype", ["float16"]),
        ("lora.target_modules", ["", "[", ["q", "q"], ["q", 3], [" "], 3, None, {"q": 1}]),
        ("lora.layers_to_transform", [[], 0, [-1], [0, 0], ["0"], [True], [1.0], "0"]),
        ("lora.layer_replication", [0, [0, 2], [[0]], [[0, 1, 2]], [[1, 1]], [[-1, 1]], [["0", 1]], [[False, True]]]),
        ("lora.untie_tables", ["true", 1, None]),
        ("lora.use_rslora", ["true", 1, None]),
        ("lora.use_dora", ["true", 1, None]),
        ("lora.bias", ["some", True, None]),
        ("lora.init_from", ["", 3, "a\0b"]),
        ("lora.rank_pattern", [["q"], {"q": 0}, {"q": "8"}, {"q": 8.0}, {"q": True}, {"": 8}, {3: 8}, [["q", 1, 2]]]),
        ("lora.rank_pattern", [[["q", 1], ["q", 2]], "q", 3, None]),
        ("lora.alpha_pattern", [{"q": 0}, {"q": "8"}, {"q": float("inf")}, {"q": float("nan")}, {"q": True}]),
        ("data.train", ["", None, [], [3], ["a", "a"], ["a", ""]]),
        ("data.eval", ["", 3, [None]]),
        ("data.revision", ["", 3]),
        ("data.format", ["openai", "auto"]),
        ("data.columns", ["prompt", ["prompt"], {"prompts": "x"}, {"prompt": ""}, {"prompt": 3}, {}]),
        ("data.eval_fraction", [1, -0.1]),
        ("data.seq_len", [7, 0, -8, "many", 512.0]),
        ("data.chat_template", ["", 3]),
        ("data.train_on", ["user", None]),
        ("data.overlong", ["cut", None]),
        ("data.max_dropped_share", [-0.1, 1.1, "5%"]),
        ("data.packing", ["yes", 1]),
        ("training.epochs", [0, -1, float("inf")]),
        ("training.max_steps", [0, 1.5]),
        ("training.global_batch_size", [0]),
        ("training.learning_rate", [0, -1e-4, float("nan"), "1e-4"]),
        ("training.loraplus_lr_ratio", [0, -1, "16", None, float("inf")]),
        ("training.schedule", ["cosine_with_restarts"]),
        ("training.warmup_ratio", [1.1, -0.1]),
        ("training.optimizer", ["adamw", "sgd"]),
        ("training.weight_decay", [-0.1]),
        ("training.max_grad_norm", [0, -1]),
        ("training.seed", [-1, 2**63, 0.5]),
        ("training.save_every", [0, None]),
        ("training.eval_every", [0, "epoch"]),
        ("training.early_stopping_patience", [0]),
        ("memory.budget", ["8 bananas", 0, -1, 2**63, 1.5, True, None, "8G"]),
        ("memory.host_budget", ["lots", 0]),
        ("memory.micro_batch_tokens", [7, "8GiB"]),
        ("memory.activation_checkpointing", ["selective", -1]),
        ("memory.loss_chunk_tokens", [0]),
        ("memory.activation_offload", ["all", -1, 1.5]),
        ("memory.tile_tokens", [1, 7, -1, True]),
        ("memory.embedding_residency", ["disk", "streamed", True]),
        ("memory.optimizer_residency", ["disk", 8]),
        ("memory.base_residency", ["host", None]),
        ("memory.paging_dir", [""]),
        ("output.dir", ["", "a\0"]),
        ("output.trackers", ["tensorboard", [1], ["wandb", "wandb"], [""]]),
        ("output.keep_checkpoints", [1]),
        ("output.sample_questions", [-1, 21]),
    ],
)
def test_refuses(dotted: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(ValidationError) as caught:
            config_with(dotted, value)
        assert {".".join(str(part) for part in error["loc"][:2]) for error in caught.value.errors()} == {dotted}, value


def test_sizes_become_bytes() -> None:
    assert config_with("memory.budget", "8GiB").memory.budget == 8 * 2**30
    assert config_with("memory.host_budget", 10**9).memory.host_budget == 10**9


def test_lists_become_tuples_so_that_a_config_can_be_hashed() -> None:
    assert hash(config_with("data.train", ["a", "b"]))
    assert hash(config_with("data.columns", {"prompt": "query"}))
    assert hash(config_with("lora.rank_pattern", {"q": 4}))
    config = config_with("lora.target_modules", ["q_proj", "v_proj"])
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert hash(config) == hash(config_with("lora.target_modules", ["q_proj", "v_proj"]))


@pytest.mark.parametrize("dotted", DOTTED_KEYS)
def test_frozen(dotted: str) -> None:
    section, key = dotted.split(".")
    config = RunConfig.model_validate(REQUIRED)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(getattr(config, section), key, value_of(config, dotted))


def test_a_pattern_keeps_its_order_through_files_that_sort_keys() -> None:
    config = config_with("lora.rank_pattern", {"q_proj": 32, ".*_proj": 8})
    assert config.lora.rank_pattern == (("q_proj", 32), (".*_proj", 8))
    written = json.loads(json.dumps(config.model_dump(mode="json"), sort_keys=True))
    assert RunConfig.model_validate(written) == config


def test_auto_alpha_is_twice_the_rank() -> None:
    assert LoraSection().alpha_for(8) == 16.0
    assert LoraSection(alpha=5).alpha_for(8) == 5.0


def test_a_micro_batch_holds_the_longest_document() -> None:
    sections = {**REQUIRED, "data": {"train": "a", "seq_len": 512}}
    assert RunConfig.model_validate({**sections, "memory": {"micro_batch_tokens": 512}}).data.seq_len == 512
    assert RunConfig.model_validate({**sections, "memory": {"micro_batch_tokens": "auto"}}).data.seq_len == 512
    with pytest.raises(ValidationError, match=r"data\.seq_len = 512"):
        RunConfig.model_validate({**sections, "memory": {"micro_batch_tokens": 511}})


def test_early_stopping_needs_an_evaluation() -> None:
    training = {"training": {"early_stopping_patience": 2}}
    with pytest.raises(ValidationError, match="evaluate"):
        RunConfig.model_validate({**REQUIRED, **training, "data": {"train": "a", "eval_fraction": 0}})
    held_out = {**REQUIRED, **training, "data": {"train": "a", "eval": "b", "eval_fraction": 0}}
    assert RunConfig.model_validate(held_out).training.early_stopping_patience == 2


def test_keys_that_other_parts_of_the_project_promise() -> None:
    promised = """model.base quantization.double_quant quantization.head quantization.compute_dtype
        lora.rank lora.alpha lora.dropout lora.dtype lora.target_modules data.train data.eval data.seq_len data.packing
        training.epochs training.max_steps
        training.global_batch_size training.learning_rate training.schedule training.warmup_ratio training.optimizer
        training.max_grad_norm training.seed training.save_every training.eval_every memory.budget memory.host_budget
        memory.micro_batch_tokens memory.activation_checkpointing output.dir"""
    assert set(promised.split()) <= set(DOTTED_KEYS)


@pytest.mark.parametrize(
    "lora, what",
    [
        ({"target_modules": []}, "some linears, unless"),
        ({"target_modules": [], "bias": "lora_only"}, "some linears, unless"),
        ({"lora_bias": True, "use_dora": True}, "false beside lora.use_dora"),
        ({"bias": "all", "layer_replication": [[0, 1]]}, "none beside lora.layer_replication"),
        ({"alora_invocation_tokens": [1], "use_dora": True}, r"\[\] beside lora.use_dora or lora.lora_bias"),
        ({"alora_invocation_tokens": [1], "target_modules": [], "bias": "all"}, r"\[\] without lora.target_modules"),
        ({"alora_invocation_tokens": [2**31]}, "a list of numbers of tokens"),
        (
            {"lora_bias": True, "target_modules": [], "modules_to_save": ["lm_head"]},
            "false without lora.target_modules",
        ),
    ],
    ids=str,
)
def test_something_is_trained_and_all_of_it_is_defined(lora: dict[str, Any], what: str) -> None:
    sections = {"model": {"base": "x"}, "data": {"train": "x"}}
    with pytest.raises(ValidationError, match=what):
        RunConfig.model_validate(sections | {"lora": lora})


@pytest.mark.parametrize("beside", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"init_from": "x"}], ids=str)
def test_without_lora_something_else_is_trained(beside: dict[str, Any]) -> None:
    sections = {"model": {"base": "x"}, "data": {"train": "x"}, "lora": {"target_modules": [], **beside}}
    assert RunConfig.model_validate(sections).lora.target_modules == ()

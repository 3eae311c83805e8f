"""Every key of the config belongs to one class: refused at a resume, changed with a flag only, or changed and told."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import ConfigError
from qlora_trainer.run.config_changes import (
    FLAGGED_KEYS,
    LOGGED_KEYS,
    PLANNED_KEYS,
    REFUSED_KEYS,
    Change,
    changes_between,
    check_allowed,
    merged,
    require_allowed,
)

BEGAN_WITH: dict[str, Any] = {
    "lora": {"rank": "max", "alpha": "auto"},
    "training": {"learning_rate": 1e-3, "save_every": 5, "optimizer": "auto"},
    "memory": {"micro_batch_tokens": "auto", "activation_checkpointing": True, "budget": "1GiB"},
}
RESOLVED = {
    "lora.rank": 64,
    "lora.alpha": 128.0,
    "training.optimizer": "adamw_8bit",
    "memory.micro_batch_tokens": 256,
    "memory.activation_checkpointing": 2,
}
AT_START = {"memory.micro_batch_tokens": 512}


def asked(**values: object) -> dict[str, Any]:
    """The config of a resume: as it began, but for `section__key=value`."""
    config: dict[str, dict[str, Any]] = {section: dict(content) for section, content in BEGAN_WITH.items()}
    for name, value in values.items():
        section, _, key = name.partition("__")
        config[section][key] = value
    return config


def changed(now: dict[str, Any]) -> list[str]:
    return [change.key for change in changes_between(BEGAN_WITH, now, [RESOLVED, AT_START])]


def test_what_changes_the_course_is_refused_or_needs_a_flag() -> None:
    """Spelled out a second time: a key that is only told would make another run of this one without a word."""
    model = {f"model.{key}" for key in ("base", "revision")}
    quantization = {f"quantization.{key}" for key in ("double_quant", "head", "compute_dtype")}
    lora = {f"lora.{key}" for key in ("rank", "alpha", "dropout", "dtype", "target_modules", "layers_to_transform")}
    lora.add("lora.layer_replication")
    lora |= {f"lora.{key}" for key in ("use_rslora", "use_dora", "init_from", "rank_pattern", "alpha_pattern")}
    lora |= {"lora.modules_to_save", "lora.untie_tables", "lora.bias", "lora.lora_bias", "lora.alora_invocation_tokens"}
    read = {"train", "eval", "eval_fraction", "format", "columns", "on_bad_row", "streaming", "stream_rows"}
    learned = {"chat_template", "train_on", "seq_len", "overlong", "packing"}
    training = {f"training.{key}" for key in ("global_batch_size", "optimizer", "seed")}
    assert model | quantization | lora | {f"data.{key}" for key in read | learned} | training == REFUSED_KEYS
    course = {
        "epochs",
        "loraplus_lr_ratio",
        "max_steps",
        "learning_rate",
        "schedule",
        "warmup_ratio",
        "weight_decay",
        "max_grad_norm",
    }
    memory = {f"memory.{key}" for key in ("micro_batch_tokens", "activation_checkpointing", "loss_chunk_tokens")}
    assert {f"training.{key}" for key in course | {"early_stopping_patience"}} | memory == FLAGGED_KEYS


def test_every_key_has_one_class() -> None:
    keys = []
    for section, field in RunConfig.model_fields.items():
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, BaseModel)
        keys += [f"{section}.{key}" for key in field.annotation.model_fields]
    classes = (REFUSED_KEYS, FLAGGED_KEYS, LOGGED_KEYS)
    assert sorted(keys) == sorted(key for names in classes for key in names)
    assert PLANNED_KEYS < FLAGGED_KEYS | LOGGED_KEYS


def test_what_was_resolved_equals_what_was_asked() -> None:
    same = asked(lora__rank=64, lora__alpha=128.0, training__optimizer="adamw_8bit", memory__activation_checkpointing=2)
    for tokens in ("auto", 256, 512):  # in force now, and before memory ran out
        same["memory"]["micro_batch_tokens"] = tokens
        assert changed(same) == []
        assert merged(BEGAN_WITH, same, ()) == BEGAN_WITH
    assert changed(asked(lora__rank=32)) == ["lora.rank"]
    assert changed(asked(memory__micro_batch_tokens=128)) == ["memory.micro_batch_tokens"]


def test_all_layers_are_not_one_layer() -> None:
    assert changed(asked(memory__activation_checkpointing=1)) == ["memory.activation_checkpointing"]


def test_what_changed_is_kept_and_the_rest_is_as_it_was() -> None:
    now = asked(lora__rank=64, training__learning_rate=2e-3)
    changes = changes_between(BEGAN_WITH, now, [RESOLVED])
    assert [str(change) for change in changes] == ["training.learning_rate: 0.001 -> 0.002"]
    assert merged(BEGAN_WITH, now, changes) == asked(training__learning_rate=2e-3)


def test_a_key_that_an_older_version_did_not_have_is_a_change() -> None:
    now = asked(lora__new="x")
    changes = changes_between(BEGAN_WITH, now, [])
    assert changes == (Change("lora.new", None, "x"),)
    with pytest.raises(ConfigError, match=r"lora\.new at --resume: found 'x'; expected None"):
        require_allowed(changes, (), run="runs/a")
    assert merged(BEGAN_WITH, now, ())["lora"]["new"] == "x"


@pytest.mark.parametrize("key", sorted(REFUSED_KEYS))
def test_a_refused_key_names_both_values_and_no_flag(key: str) -> None:
    changes = [Change("training.learning_rate", 1, 2), Change(key, "old", "new"), Change("output.dir", "a", "b")]
    with pytest.raises(ConfigError) as caught:
        require_allowed(changes, {"training.learning_rate", key}, run="runs/a")
    text = str(caught.value)
    assert text.startswith(f"{key} at --resume: found 'new'; expected 'old', which the run in runs/a began with.")
    assert "--allow-change" not in text
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("key", sorted(FLAGGED_KEYS))
def test_a_flagged_key_is_refused_with_its_flag_and_allowed_by_it(key: str) -> None:
    changes = [Change(key, 3, 4)]
    with pytest.raises(ConfigError, match=f"found 4; expected 3, .*--allow-change {key}"):
        require_allowed(changes, FLAGGED_KEYS - {key}, run="runs/a")
    require_allowed(changes, {key}, run="runs/a")


def test_what_is_logged_needs_no_flag() -> None:
    require_allowed([Change(key, 3, 4) for key in LOGGED_KEYS], (), run="runs/a")


def test_a_flag_that_means_nothing_is_refused() -> None:
    check_allowed((), resume=False)
    check_allowed(FLAGGED_KEYS, resume=True)
    with pytest.raises(ConfigError, match=r"training\.schedule without --resume"):
        check_allowed(["training.schedule"], resume=False)
    with pytest.raises(ConfigError, match=r"found 'lora\.rank'; expected one of .*No other key"):
        check_allowed(["lora.rank", "training.schedule"], resume=True)
    with pytest.raises(ConfigError, match=r"found 'output\.dir'.*without the flag"):
        check_allowed(["output.dir"], resume=True)

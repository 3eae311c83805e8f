"""The architecture behind a name, without its weights: a folder, a well-known model, or a config.json from the hub."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from qlora_trainer.config.bases import BaseKind, base_kind
from qlora_trainer.errors import ConfigError
from qlora_trainer.model.acceptance import require_accepted
from qlora_trainer.model.base import fetch_config, read_config
from qlora_trainer.planning.known_models import known_config, known_names, suggest


def read_model_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """The config of `name`; well-known models and folders need no network, and nothing needs weights.

    Args:
        name: a folder with a config.json, a name or hub id of `known_models`, or another hub id.
        revision: of a hub id.

    Raises:
        ConfigError: nothing of that name, a config.json that transformers cannot read, or an architecture that cannot
            be trained.
    """
    if os.path.isdir(name):
        config = read_config(Path(name).resolve())
    elif (known := known_config(name)) is not None and revision is None:
        model_type = known.pop("model_type")
        return AutoConfig.for_model(model_type, **known)
    else:
        config = _from_hub(name, revision)
    require_accepted(config)
    return config


def _from_hub(name: str, revision: str | None) -> PreTrainedConfig:
    hint = suggest(name)
    fix = f"Did you mean {hint}?" if hint else "Give a folder with a config.json, or a hub id."
    try:
        kind = base_kind(name)
    except ConfigError as error:
        expected = f"a folder, a hub id owner/name, or one of {', '.join(known_names())}"
        raise ConfigError(where="model.base", found=f'"{name}"', expected=expected, fix=fix) from error
    if kind is BaseKind.FOLDER:
        raise ConfigError(
            where="model.base", found=f"no folder {name}", expected="a folder with a config.json", fix=fix
        )
    return read_config(fetch_config(name, revision))

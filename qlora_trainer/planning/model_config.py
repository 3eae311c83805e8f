"""The architecture behind a name, without its weights: a folder, a well-known model, or a config.json from the hub."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from qlora_trainer.config.known_models import check_name, known_config
from qlora_trainer.model.acceptance import require_accepted
from qlora_trainer.model.base import fetch_config
from qlora_trainer.model.base_config import read_config


def read_model_config(name: str, revision: str | None = None) -> tuple[PreTrainedConfig, bool]:
    """The config of `name`; well-known models and folders need no network, and nothing needs weights.

    Args:
        name: a folder with a config.json, a name or hub id of `known_models`, or another hub id.
        revision: of a hub id.

    Returns:
        The config, and whether its documents may share a row.

    Raises:
        ConfigError: nothing of that name, a config.json that transformers cannot read, or an architecture that cannot
            be trained.
    """
    if os.path.isdir(name):
        config = read_config(Path(name).resolve())
    elif (known := known_config(name)) is not None and revision is None:
        model_type = known.pop("model_type")
        return AutoConfig.for_model(model_type, **known), True  # each has been accepted: see its tests
    else:
        check_name(name)
        config = read_config(fetch_config(name, revision))
    return config, require_accepted(config)

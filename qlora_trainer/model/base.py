"""From what the user calls the base to a folder of safetensors on disk."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from qlora_trainer.config.bases import MAX_INDEX_BYTES
from qlora_trainer.config.known_models import suggest
from qlora_trainer.config.strict_json import decode, read_capped
from qlora_trainer.config.values import LayerRanges
from qlora_trainer.errors import ConfigError
from qlora_trainer.hardware.cache_folder import cache_folder
from qlora_trainer.hardware.sealed_folder import sha256_of
from qlora_trainer.model.acceptance import require_accepted
from qlora_trainer.model.base_config import read_config
from qlora_trainer.model.packaged_base import PACKAGED_BASES, unpack_packaged_base
from qlora_trainer.model.repeated_layers import with_repeated_layers
from qlora_trainer.model.safetensors_header import require_sane_header
from qlora_trainer.model.skeleton import TRANSFORMERS_ERRORS, reason_of

_INDEX = "model.safetensors.index.json"
# Everything a base needs; weights as safetensors only, so that no pickle is ever fetched.
_NO_WEIGHTS = ("*.json", "*.jinja", "*.txt", "tokenizer.model")
_ALL = ("*.safetensors", *_NO_WEIGHTS)


@dataclass(frozen=True, slots=True)
class Base:
    """A base model on disk.

    Attributes:
        name: what the user called it; adapters name their base so.
        revision: hub revision, or None.
        folder: a transformers folder with config.json and safetensors.
        config: its transformers config.
        can_pack: whether documents may share a row.
        layer_replication: the layers that `config` has, by those on disk (see `model.repeated_layers`).
    """

    name: str
    revision: str | None
    folder: Path
    config: PreTrainedConfig
    can_pack: bool = True
    layer_replication: LayerRanges = ()


def resolve_base(
    name: str, revision: str | None = None, *, with_weights: bool = True, layer_replication: LayerRanges = ()
) -> Base:
    """Find or fetch a base and check that its architecture can be trained, before any weight is fetched.

    Args:
        name: a local transformers folder, a hub id (`owner/name`), or an alias of a base that a package ships.
        revision: branch, tag or commit of a hub id.
        with_weights: false leaves the weights of a hub id where they are, until `fetch_weights`.
        layer_replication: what to make of its layers; empty leaves them as they are.

    Raises:
        ConfigError: nothing of that name, no safetensors in it, an architecture that is refused, or layers that cannot
            be repeated.
    """
    if os.path.isdir(name):  # unlike Path.is_dir, False for a name too long to be a path
        folder = Path(name).resolve()
        config = read_config(folder)
    elif name in PACKAGED_BASES:
        folder = unpack_packaged_base(name)
        config = read_config(folder)
    elif name.startswith(("/", ".", "~")):
        raise ConfigError(
            where=f"model.base {name[:200]!r}",
            found="no such folder",
            expected="a transformers folder",
            fix="Check the path; where an adapter names it, --model says where the base is.",
        )
    else:
        config = read_config(fetch_config(name, revision))
        can_pack = require_accepted(config)
        folder = _fetch_from_hub(name, revision, _ALL if with_weights else _NO_WEIGHTS)
        config = with_repeated_layers(config, layer_replication)
        return Base(name, revision, folder, config, can_pack, layer_replication)
    can_pack = require_accepted(config)
    return Base(name, None, folder, with_repeated_layers(config, layer_replication), can_pack, layer_replication)


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a base folder.

    Raises:
        ConfigError: there is none that transformers can read.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, *TRANSFORMERS_ERRORS) as error:
        raise ConfigError(
            where=str(folder),
            found=f"no tokenizer that transformers can read ({reason_of(error)})",
            expected="tokenizer.json and tokenizer_config.json beside the weights",
            fix="Copy the tokenizer files of the base into its folder.",
        ) from error
    return tokenizer


def require_tokenizer_fits(tokenizer: PreTrainedTokenizerBase, base: Base) -> None:
    """Refuse a tokenizer whose ids go beyond the embedding; a smaller one is normal, embeddings are padded.

    Raises:
        ConfigError: names the largest id and the rows of the embedding.
    """
    num_rows = base.config.get_text_config().vocab_size
    token, largest_id = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if largest_id >= num_rows:
        raise ConfigError(
            where=str(base.folder),
            found=f"a tokenizer with the id {largest_id} ({token!r})",
            expected=f"ids below {num_rows}, the rows of the embedding of {base.name}",
            fix="Copy the tokenizer files that belong to this base.",
        )


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file of `folder` that holds it.

    Raises:
        ConfigError: no safetensors, or an index that names a file outside the folder or that is not there.
    """
    index = folder / _INDEX
    if index.is_file():
        names = _read_index(index)
        for file_name in set(names.values()):
            if Path(file_name).name != file_name or not (folder / file_name).is_file():
                raise _no_weights(index, f"a weight_map that names {file_name!r}", "files beside the index")
        return {tensor: folder / file_name for tensor, file_name in names.items()}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise _no_weights(folder, "no *.safetensors file", "weights as safetensors (pickle weights are never read)")
    tensors: dict[str, Path] = {}
    for path in files:
        with open_weights(path) as file:
            tensors |= dict.fromkeys(file.keys(), path)
    return tensors


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """`safe_open` of one weight file of a base.

    Raises:
        ConfigError: the file is not safetensors, is cut short, or lacks a tensor that is asked of it.
    """
    try:
        require_sane_header(path)
    except (OSError, ValueError) as error:
        raise _no_weights(path, f"a weight file that cannot be read ({error})", "whole safetensors") from error
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise _no_weights(path, f"a weight file that cannot be read ({error})", "whole safetensors") from error


def content_hash(folder: Path) -> str:
    """SHA-256 over config.json and every weight file of a base.

    A file's own hash is remembered under its path, size and modification time, so that 15 GB are read once.
    """
    remembered_in = cache_folder() / "hashes.json"
    remembered = _read_remembered(remembered_in)
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(set(weight_files(folder).values()))]:
        status = path.stat()
        key = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"
        if key not in remembered:
            remembered[key] = sha256_of(path)
        digest.update(f"{path.name}:{remembered[key]}\n".encode())
    # A name of its own: two runs that start at once must not write one temporary file.
    with tempfile.NamedTemporaryFile("w", dir=remembered_in.parent, prefix=".hashes-", delete=False) as file:
        json.dump(remembered, file)
    Path(file.name).replace(remembered_in)
    return digest.hexdigest()


def _read_remembered(path: Path) -> dict[str, str]:
    try:
        remembered = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return remembered if isinstance(remembered, dict) else {}


def fetch_config(name: str, revision: str | None) -> Path:
    """A folder with the config.json of a hub id; no weights are fetched.

    Raises:
        ConfigError: nothing could be fetched.
    """
    return _fetch_from_hub(name, revision, ("config.json",))


def fetch_weights(base: Base) -> Base:
    """The same base with its weights on disk."""
    if os.path.isdir(base.name) or base.name in PACKAGED_BASES:
        return base
    return replace(base, folder=_fetch_from_hub(base.name, base.revision, _ALL))


def _fetch_from_hub(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    try:
        if patterns == ("config.json",):
            return Path(hf_hub_download(name, "config.json", revision=revision)).parent
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        hint = suggest(name)
        raise ConfigError(
            where=f"model.base {name!r}",
            found=f"nothing that could be fetched from the hub ({str(error).splitlines()[0]})",
            expected="a local folder, a hub id that you may read, or one of " + ", ".join(PACKAGED_BASES),
            fix=f"{f'Did you mean {hint}? ' if hint else ''}Check the name, the network and your hub token.",
        ) from error


def _read_index(index: Path) -> dict[str, str]:
    try:
        names: dict[str, str] = decode(read_capped(index, MAX_INDEX_BYTES))["weight_map"]
        if not all(isinstance(file_name, str) for file_name in names.values()):
            raise TypeError("a file name that is no text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"no index of weights ({type(error).__name__}: {error})"
        raise _no_weights(index, found, 'JSON with a "weight_map" of tensor names to file names') from error
    return names


def _no_weights(where: Path, found: str, expected: str) -> ConfigError:
    return ConfigError(where=str(where), found=found, expected=expected, fix="Point model.base at a whole folder.")

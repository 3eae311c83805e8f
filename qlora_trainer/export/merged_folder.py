"""A transformers folder of a merged model: shards written one tensor at a time, config, tokenizer and template."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_trainer.config.bases import CHAT_TEMPLATE_FILE, INDEX_NAME
from qlora_trainer.config.strict_json import decode, read_capped
from qlora_trainer.data.known_tokenizer import tokenizer_hash
from qlora_trainer.errors import ConfigError
from qlora_trainer.export.new_folder import differs, write_checked, write_tensors_checked
from qlora_trainer.export.source import Source
from qlora_trainer.model.base import read_tokenizer, weight_files
from qlora_trainer.model.base_config import read_config
from qlora_trainer.run.checkpoint.storage import Storage
from qlora_trainer.run.records import Preparing

SHARD_BYTES = 4 * 2**30  # a shard is full when it has so many; one tensor is never cut
# Copied as they are, where a base has them: converters and older libraries want the slow tokenizers' files too.
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    CHAT_TEMPLATE_FILE,
)
# Keys of config.json that a merge may change, and one that transformers fills in.
_CHANGED = ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config", "auto_map", "_name_or_path")
_MAX_COPIED_BYTES = 2**28  # the largest tokenizer.json has some 40 MB


def plan_shards(shapes: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES) -> dict[str, dict[str, Tensor]]:
    """File name -> the tensors of that shard, on meta; neighbours stay together."""
    groups: list[dict[str, Tensor]] = [{}]
    for name, tensor in shapes.items():
        if groups[-1] and sum(own.nbytes for own in groups[-1].values()) + tensor.nbytes > shard_bytes:
            groups.append({})
        groups[-1][name] = tensor
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors": group for number, group in enumerate(groups)}


def write_weights(
    folder: Path, weights: Mapping[str, Tensor], shards: Mapping[str, Mapping[str, Tensor]], storage: Storage
) -> Generator[Preparing]:
    """Write the shards, and their index where there are several, while telling how far it is.

    Args:
        folder: is there, empty.
        weights: asked for one after the other.
        shards: as `plan_shards` gives them.
        storage: where to write.

    Raises:
        StorageError: what is read back is not what was written.
        OSError: the disk refused.
    """
    for number, (file_name, shapes) in enumerate(shards.items()):
        yield Preparing(what=f"merging and checking shard {number + 1} of {len(shards)}")
        write_tensors_checked(folder / file_name, weights, shapes, storage)
    if len(shards) > 1:
        total_bytes = sum(tensor.nbytes for shapes in shards.values() for tensor in shapes.values())
        weight_map = {name: file_name for file_name, shapes in shards.items() for name in shapes}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_checked(folder / INDEX_NAME, (json.dumps(index, indent=1) + "\n").encode(), storage)
    found = weight_files(folder)
    if found != {name: folder / file_name for file_name, shapes in shards.items() for name in shapes}:
        raise differs(folder, "other weights than were written")


def write_beside(
    folder: Path,
    source: Source,
    *,
    dtype: torch.dtype,
    unties: bool,
    added_fields: Mapping[str, bool],
    storage: Storage,
) -> None:
    """Write config, generation config, tokenizer and template.

    Args:
        folder: is there.
        source: whose base they are of, and whose template they get.
        dtype: of the weights.
        unties: whether the head has become its own.
        added_fields: of the config, for biases that the base has none of (see `export.added_biases`).
        storage: where to write.

    Raises:
        ConfigError: a file of the base is not what it should be.
        StorageError: what is read back is not what was written.
        OSError: the disk refused.
    """
    base = source.base.folder
    own = decode(read_capped(base / "config.json"))
    if source.base.layer_replication:  # each a layer of its own now, of the kind that it was
        stored = read_config(base).to_dict()
        own |= {name: one for name, one in source.base.config.to_dict().items() if stored.get(name) != one}
    config = {**merged_config(own, dtype=dtype, unties=unties), **added_fields}
    write_checked(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode(), storage)
    for name in _COPIED:
        if (base / name).is_file() and not (name == CHAT_TEMPLATE_FILE and source.chat_template is not None):
            write_checked(folder / name, _copied(base / name, source), storage)
    if source.chat_template is not None:
        write_checked(folder / CHAT_TEMPLATE_FILE, source.chat_template.encode(), storage)
    _require_same(folder, source, added_fields)


def merged_config(config: Mapping[str, Any], *, dtype: torch.dtype, unties: bool) -> dict[str, Any]:
    """The base's `config.json` for weights of another dtype.

    Args:
        config: of the base.
        dtype: of the weights.
        unties: whether the head has become its own.
    """
    # No code of others goes along, and nothing is quantized.
    out = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    name = str(dtype).removeprefix("torch.")
    out |= {"dtype": name} | ({"torch_dtype": name} if "torch_dtype" in config else {})
    return out | ({"tie_word_embeddings": False} if unties else {})


def _copied(path: Path, source: Source) -> bytes:
    """A file of the base; a template that the run had its own of is taken out of the tokenizer's config."""
    try:
        data = read_capped(path, _MAX_COPIED_BYTES)
        if path.name != "tokenizer_config.json" or source.chat_template is None:
            return data
        fields = decode(data)
    except (OSError, ValueError) as error:
        raise ConfigError(
            where=str(path),
            found=f"a file that cannot be read ({error})",
            expected="a file of the base",
            fix="Fetch the base again.",
        ) from error
    fields.pop("chat_template", None)
    return (json.dumps(fields, indent=2) + "\n").encode()


def _require_same(folder: Path, source: Source, added_fields: Mapping[str, bool]) -> None:
    """Read the folder as transformers does."""
    found, expected = read_config(folder).to_dict(), {**source.base.config.to_dict(), **added_fields}
    if any(found.get(key) != expected.get(key) for key in found.keys() | expected.keys() if key not in _CHANGED):
        raise differs(folder / "config.json", "another config than the base's")
    tokenizer = read_tokenizer(source.base.folder)
    if source.chat_template is not None:
        tokenizer.chat_template = source.chat_template
    if tokenizer_hash(read_tokenizer(folder)) != tokenizer_hash(tokenizer):
        raise differs(folder, "another tokenizer than the base's")

"""The NF4 form of a base on disk: a standard bitsandbytes 4-bit checkpoint, made once, memory-mapped ever after.

Made by streaming: one tensor of the original is in memory at a time, and a shard of the result is written as soon as
it is full, so a 70B base is quantized in less than 2 GiB. The folder's name is its key: the base's content and the
quantization settings, of which one is whether the head is in NF4, too. transformers itself loads the folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from qlora_trainer.errors import ConfigError
from qlora_trainer.hardware.cache_folder import cache_folder
from qlora_trainer.hardware.device import choose_device
from qlora_trainer.hardware.sealed_folder import defects, writing
from qlora_trainer.model import nf4
from qlora_trainer.model.base import Base, content_hash, open_weights, weight_files
from qlora_trainer.model.repeated_layers import stored_weights
from qlora_trainer.model.skeleton import Parts, build_skeleton, find_parts
from qlora_trainer.model.table_names import require_nf4_head

FORMAT_VERSION = 1  # raise it when the bytes written for the same base change
SHARD_BYTES = 256 * 2**20
STORED_DTYPE = torch.bfloat16
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class NF4Cache:
    """A base in NF4 on disk.

    Attributes:
        folder: the checkpoint.
        key: base content and quantization settings; what a run's checkpoints call the base's fingerprint.
        was_built: it was made now, not found.
        defects: why an older folder of the same key was thrown away.
        nf4_head: whether the head is in NF4, too.
    """

    folder: Path
    key: str
    was_built: bool
    defects: tuple[str, ...]
    nf4_head: bool = False


def prepare_nf4_cache(base: Base, *, double_quant: bool, nf4_head: bool = False) -> NF4Cache:
    """Find the NF4 form of `base`, verify it, and make it if it is missing, half-written or corrupt.

    Raises:
        ConfigError: the base lacks a tensor that its architecture needs, or has one of another dtype or shape; or its
            head, which is to be in NF4, is its embedding.
    """
    if nf4_head:
        parts = find_parts(build_skeleton(base.config, with_buffers=False))
        require_nf4_head(parts.head, is_tied=parts.is_tied)
    settings = f"v{FORMAT_VERSION} {content_hash(base.folder)} nf4 {nf4.BLOCKSIZE} double_quant={double_quant}"
    settings += " head=nf4" if nf4_head else ""
    settings += f" layers={base.layer_replication}" if base.layer_replication else ""
    key = hashlib.sha256(settings.encode()).hexdigest()[:32]
    folder = cache_folder() / "nf4" / key
    found_defects: list[str] = []
    if folder.is_dir():
        found_defects = defects(folder)
        if not found_defects:
            return NF4Cache(folder, key, was_built=False, defects=(), nf4_head=nf4_head)
        shutil.rmtree(folder)
    with writing(folder) as temporary:
        _quantize_into(temporary, base, double_quant=double_quant, nf4_head=nf4_head)
    return NF4Cache(folder, key, was_built=True, defects=tuple(found_defects), nf4_head=nf4_head)


class CachedWeights:
    """The tensors of an NF4 cache folder, memory-mapped (a `WeightSource`)."""

    def __init__(self, folder: Path) -> None:
        names: dict[str, str] = json.loads((folder / _INDEX).read_text())["weight_map"]
        handles = {name: safe_open(folder / name, framework="pt") for name in set(names.values())}
        self._handles = {tensor: handles[file_name] for tensor, file_name in names.items()}

    def nf4(self, name: str) -> nf4.NF4Weight:
        double_quant = f"{name}.nested_absmax" in self._handles
        parts = nf4.checkpoint_names(name, double_quant=double_quant)
        return nf4.from_checkpoint(name, {part: self.dense(part) for part in parts})

    def dense(self, name: str) -> Tensor:
        tensor: Tensor = self._handles[name].get_tensor(name)
        return tensor


def _quantize_into(folder: Path, base: Base, *, double_quant: bool, nf4_head: bool) -> None:
    skeleton = build_skeleton(base.config, with_buffers=False)
    parts = find_parts(skeleton)
    shapes = {name: parameter.shape for name, parameter in skeleton.named_parameters(remove_duplicate=False)}
    shard: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    total_bytes = shard_bytes = 0
    packed = {f"{name}.weight" for name in (*parts.linears, *([parts.head] if nf4_head else []))}
    for name, tensor in _quantized_tensors(base, parts, packed, shapes, double_quant=double_quant):
        shard[name] = tensor
        total_bytes += tensor.nbytes
        shard_bytes += tensor.nbytes
        if shard_bytes >= SHARD_BYTES:
            shards.append(_write_shard(folder, len(shards), shard))
            shard_bytes = 0
    if shard:
        shards.append(_write_shard(folder, len(shards), shard))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / _shard_name(number)).rename(folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=1))
    config = _quantized_config(base.config, double_quant=double_quant, nf4_head=nf4_head)
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _quantized_tensors(
    base: Base, parts: Parts, packed_names: Collection[str], shapes: Mapping[str, torch.Size], *, double_quant: bool
) -> Iterator[tuple[str, Tensor]]:
    device = choose_device()
    needed = set(packed_names) | set(parts.dense_parameters)
    files = stored_weights(weight_files(base.folder), base.layer_replication)
    missing = sorted(needed - set(files))
    if missing:
        raise ConfigError(
            where=str(base.folder),
            found=f"{len(missing)} weights missing, the first is {missing[0]}",
            expected=f"all {len(needed)} weights of a {base.config.model_type} model",
            fix="Fetch the base again, or point model.base at a whole folder.",
        )
    for name in sorted(needed, key=lambda name: (files[name], name)):
        # Opened anew for each tensor: closing the file drops its mapped pages, which count as this process's memory.
        path, stored = files[name]
        with open_weights(path) as file:
            tensor: Tensor = file.get_tensor(stored)
            _require_weights(tensor, name, path, shapes[name])
            if name in packed_names:
                packed = nf4.quantize(tensor.to(device), double_quant=double_quant)
                for part, value in nf4.to_checkpoint(name, packed, dtype=STORED_DTYPE).items():
                    yield part, value.to("cpu", copy=True)
            else:
                yield name, tensor.to(STORED_DTYPE, copy=True)
            del tensor


def _require_weights(tensor: Tensor, name: str, path: Path, shape: torch.Size) -> None:
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise ConfigError(
            where=str(path),
            found=f"{name} of dtype {str(tensor.dtype).removeprefix('torch.')} (already quantized?)",
            expected="16- or 32-bit floating point weights",
            fix="Point model.base at the original base, not at a quantized copy.",
        )
    if tensor.shape != shape:
        raise ConfigError(
            where=str(path),
            found=f"{name} of shape {tuple(tensor.shape)}",
            expected=f"{tuple(shape)}, as config.json says",
            fix="Fetch the base again, so that config.json and the weights belong together.",
        )


def _write_shard(folder: Path, number: int, shard: dict[str, Tensor]) -> list[str]:
    names = list(shard)
    save_file(
        {name: tensor.contiguous() for name, tensor in shard.items()}, folder / _shard_name(number), {"format": "pt"}
    )
    shard.clear()
    return names


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _quantized_config(config: PreTrainedConfig, *, double_quant: bool, nf4_head: bool) -> dict[str, object]:
    return config.to_dict() | {
        "architectures": config.architectures,
        "dtype": "bfloat16",
        "quantization_config": {
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": double_quant,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "quant_method": "bitsandbytes",
            **({"llm_int8_skip_modules": []} if nf4_head else {}),  # unset, transformers takes the head for bf16
        },
    }

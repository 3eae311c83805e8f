"""An adapter as the GGUF file that llama.cpp and Ollama load beside a base: `general.type` "adapter".

The format is that of llama.cpp's `convert_lora_to_gguf.py` (commit 0b03ada): two tensors a linear, named as the base's
with `.lora_a` [R, I] and `.lora_b` [O, R], and one alpha for all; the factor is alpha / R of each. Patterns and
`use_rslora` have no place in it, so it is written from a portable adapter. Everything is in fp32, as that script does.
Activated LoRA's invocation tokens have a key, which llama.cpp works from.

Llama's rows of q and k are ordered otherwise in GGUF, since llama.cpp rotates neighbours where transformers rotates
halves of a head; the rows of B move with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedConfig

from qlora_trainer.errors import ConfigError
from qlora_trainer.export.new_folder import differs
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.run.checkpoint.storage import TEMPORARY_PREFIX, Storage, check_free_space, refusal


@dataclass(frozen=True, slots=True)
class Architecture:
    """What llama.cpp calls an architecture, and whether it orders the rows of q and k otherwise."""

    arch: gguf.MODEL_ARCH
    permutes: bool


# By transformers' model type. Llama.cpp's converter has one class for each: `LlamaModel` and `SmolLM3Model` have
# `undo_permute`, `Qwen2Model` and `Qwen3Model` change nothing of a linear.
_ARCHITECTURES = {
    "llama": Architecture(gguf.MODEL_ARCH.LLAMA, permutes=True),
    "mistral": Architecture(gguf.MODEL_ARCH.LLAMA, permutes=True),
    "smollm3": Architecture(gguf.MODEL_ARCH.SMOLLM3, permutes=True),
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2, permutes=False),
    "qwen3": Architecture(gguf.MODEL_ARCH.QWEN3, permutes=False),
}


def gguf_architecture(config: PreTrainedConfig) -> Architecture:
    """What GGUF has for a model type.

    Raises:
        ConfigError: nothing that we know the order of; names the model type.
    """
    if config.model_type not in _ARCHITECTURES:
        raise ConfigError(
            where="--gguf",
            found=f"a base of model type {config.model_type!r}",
            expected=f"one of {', '.join(sorted(_ARCHITECTURES))}, whose names and order of rows in GGUF are known",
            fix="Merge it, and convert the merged model with llama.cpp's convert_hf_to_gguf.py.",
        )
    return _ARCHITECTURES[config.model_type]


def write_gguf(
    path: Path,
    settings: LoraSettings,
    weights: Mapping[str, Tensor],
    *,
    config: PreTrainedConfig,
    base_name: str,
    storage: Storage,
) -> None:
    """Write a portable adapter, read it back and compare.

    Args:
        path: the file, not there yet.
        settings, weights: as `portable_adapter` gives them.
        config: of the base.
        base_name: what the base is called.
        storage: where to write.

    Raises:
        ConfigError: see `gguf_architecture`.
        StorageError: the disk refused, or what is read back is not what was written; nothing is left.
    """
    architecture = gguf_architecture(config)
    tensors = gguf_tensors(weights, config=config, architecture=architecture)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    fix = "Free some space or choose another --gguf."
    try:
        check_free_space(path.parent, num_bytes, storage, what="an adapter", fix=fix)
        if temporary.exists():  # left by a process that was killed
            storage.remove(temporary)
        _write(temporary, tensors, architecture, settings, base_name=base_name)
        with FileIO(temporary) as file:
            storage.fsync(file)
        _require_same(temporary, tensors, architecture, settings, base_name=base_name)
        storage.rename(temporary, path)
        storage.fsync_dir(path.parent)
    except BaseException as error:
        with suppress(OSError):  # the first refusal is the one to tell
            temporary.unlink()
        if isinstance(error, OSError):
            raise refusal(error, where=path, doing="exporting the adapter", place="--gguf") from error
        raise


def gguf_tensors(
    weights: Mapping[str, Tensor], *, config: PreTrainedConfig, architecture: Architecture
) -> dict[str, NDArray[np.float32]]:
    """Name in GGUF -> fp32 matrix, in the order of the adapter.

    Raises:
        ConfigError: a linear that GGUF has no name for.
    """
    names = gguf.get_tensor_name_map(architecture.arch, config.num_hidden_layers)
    out: dict[str, NDArray[np.float32]] = {}
    for name, tensor in weights.items():
        linear, _, leaf = name.rpartition(".")
        theirs = names.get_name(f"{linear}.weight", try_suffixes=(".weight",))
        if theirs is None or f"{theirs}.{leaf.lower()}" in out:
            raise ConfigError(
                where="--gguf",
                found=f"an adapter on {linear}",
                expected="linears that GGUF has names for",
                fix="Merge it, and convert the merged model with llama.cpp's convert_hf_to_gguf.py.",
            )
        matrix = tensor.float().contiguous()
        num_heads = _num_heads(linear, config) if architecture.permutes and leaf == "lora_B" else None
        if num_heads is not None:
            matrix = interleaved(matrix, num_heads)
        out[f"{theirs}.{leaf.lower()}"] = matrix.numpy()
    return out


def interleaved(rows_OR: Tensor, num_heads: int) -> Tensor:
    """Each head's first and second half of rows, alternating: what llama.cpp's `LlamaModel.permute` does."""
    num_rows, width = rows_OR.shape
    return rows_OR.view(num_heads, 2, num_rows // num_heads // 2, width).transpose(1, 2).reshape(num_rows, width)


def _num_heads(linear: str, config: PreTrainedConfig) -> int | None:
    """Heads of a linear whose rows are rotated; None for another."""
    leaf = linear.rpartition(".")[2]
    counts = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return counts.get(leaf)


def _write(
    path: Path,
    tensors: Mapping[str, NDArray[np.float32]],
    architecture: Architecture,
    settings: LoraSettings,
    *,
    base_name: str,
) -> None:
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture.arch])
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, settings.alpha)
        if settings.invocation_tokens:
            key, tokens = gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, list(settings.invocation_tokens)
            writer.add_key_value(key, tokens, gguf.GGUFValueType.ARRAY, sub_type=gguf.GGUFValueType.UINT32)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base_name)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _require_same(
    path: Path,
    tensors: Mapping[str, NDArray[np.float32]],
    architecture: Architecture,
    settings: LoraSettings,
    *,
    base_name: str,
) -> None:
    try:
        reader = gguf.GGUFReader(path)
        found = {tensor.name: tensor.data for tensor in reader.tensors}
        told = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise differs(path, f"no GGUF file ({error})") from error
    expected = {
        gguf.Keys.General.TYPE: gguf.GGUFType.ADAPTER,
        gguf.Keys.General.ARCHITECTURE: gguf.MODEL_ARCH_NAMES[architecture.arch],
        gguf.Keys.General.FILE_TYPE: int(gguf.LlamaFileType.ALL_F32),
        gguf.Keys.General.BASE_MODEL_COUNT: 1,
        gguf.Keys.General.BASE_MODEL_NAME.format(id=0): base_name,
        gguf.Keys.Adapter.TYPE: "lora",
        gguf.Keys.Adapter.LORA_ALPHA: float(np.float32(settings.alpha)),
    }
    if settings.invocation_tokens:
        expected[gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS] = list(settings.invocation_tokens)
    if told != expected:
        raise differs(path, "other settings than were written")
    same_names = found.keys() == tensors.keys()
    if not same_names or any(
        found[name].shape != tensor.shape or found[name].tobytes() != tensor.tobytes()
        for name, tensor in tensors.items()
    ):
        raise differs(path, "other weights than were written")

"""A quantized model of random weights, made on the fly: no checkpoint, no cache, one dense weight at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.load import SIZES
from qlora_trainer.model import nf4
from qlora_trainer.model.nf4_cache import SHARD_BYTES, STORED_DTYPE
from qlora_trainer.model.quantized import QuantizedModel, assemble
from qlora_trainer.model.skeleton import build_skeleton, find_parts

STANDARD_DEVIATION = 0.02


class RandomWeights:
    """Random numbers in place of a cache on disk (a `WeightSource`).

    One weight of each shape is drawn dense and quantized. The others of its shape have copies of its scales, and packed
    bytes of their own: levels that are drawn evenly, so they are a little larger than normal ones.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], *, double_quant: bool = True, seed: int = 0) -> None:
        self._shapes, self._double_quant = shapes, double_quant
        self._generator = torch.Generator().manual_seed(seed)
        self._quantized: dict[torch.Size, nf4.NF4Weight] = {}

    def nf4(self, name: str) -> nf4.NF4Weight:
        shape = self._shapes[name]
        if shape not in self._quantized:
            self._quantized[shape] = nf4.quantize(self._draw(shape), double_quant=self._double_quant)
        one = self._quantized[shape]
        packed = torch.empty_like(one.packed).random_(generator=self._generator)
        nested_absmax = None if one.nested_absmax is None else one.nested_absmax.clone()
        return replace(one, packed=packed, absmax=one.absmax.clone(), nested_absmax=nested_absmax)

    def dense(self, name: str) -> Tensor:
        shape = self._shapes[name]
        return torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else self._draw(shape)

    def _draw(self, shape: torch.Size) -> Tensor:
        drawn = torch.empty(shape, dtype=torch.bfloat16)
        return drawn.normal_(std=STANDARD_DEVIATION, generator=self._generator)


def random_model(size: str, compute_dtype: torch.dtype) -> QuantizedModel:
    """A Llama of the sizes that `benchmarks.load` knows, on the CPU."""
    skeleton = build_skeleton(LlamaConfig(**SIZES[size]), with_buffers=True)  # type: ignore[arg-type]
    shapes = {name: parameter.shape for name, parameter in skeleton.named_parameters(remove_duplicate=False)}
    return assemble(skeleton, RandomWeights(shapes), compute_dtype=compute_dtype, device=torch.device("cpu"))


def write_random_cache(folder: Path, size: str) -> int:
    """The same weights as an NF4 cache in `folder`, a shard at a time in memory; returns its bytes."""
    skeleton = build_skeleton(LlamaConfig(**SIZES[size]), with_buffers=False)  # type: ignore[arg-type]
    parts = find_parts(skeleton)
    shapes = {name: parameter.shape for name, parameter in skeleton.named_parameters(remove_duplicate=False)}
    weights = RandomWeights(shapes)
    folder.mkdir(parents=True)
    shard: dict[str, Tensor] = {}
    weight_map: dict[str, str] = {}
    total_bytes = 0

    def write() -> None:
        name = f"model-{len(set(weight_map.values())):05d}.safetensors"
        weight_map.update(dict.fromkeys(shard, name))
        save_file(shard, folder / name, {"format": "pt"})
        shard.clear()

    for name in sorted([*(f"{linear}.weight" for linear in parts.linears), *parts.dense_parameters]):
        is_linear = name.removesuffix(".weight") in parts.linears
        own = (
            nf4.to_checkpoint(name, weights.nf4(name), dtype=STORED_DTYPE) if is_linear else {name: weights.dense(name)}
        )
        shard |= {part: tensor.clone() for part, tensor in own.items()}  # codes are one tensor for all
        total_bytes += sum(tensor.nbytes for tensor in own.values())
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            write()
    write()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total_bytes

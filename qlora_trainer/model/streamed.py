"""A model in 16 or 32 bits that is run without being held: each linear reads its weight from disk when it is used.

For measuring how far a merged or an original model is from the NF4 one that was trained: slow, and no larger in memory
than its tables and one layer's weight. The numbers are transformers' own: its layers, and weights in the compute dtype.

Legend: T tokens, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from qlora_trainer.config.values import LayerRanges
from qlora_trainer.hardware.heap import ResidentLimit
from qlora_trainer.model.base import open_weights, weight_files
from qlora_trainer.model.frozen import FrozenHead
from qlora_trainer.model.quantized import LogitShape, put_dense, take_dense
from qlora_trainer.model.repeated_layers import stored_weights
from qlora_trainer.model.skeleton import build_skeleton, find_parts


@dataclass(frozen=True, slots=True)
class DiskWeights:
    """The tensors of a transformers folder, each read when it is asked for.

    Attributes:
        files: tensor name -> the file that holds it, as `weight_files` gives them, and its name there.
    """

    files: Mapping[str, tuple[Path, str]]

    @staticmethod
    def of(folder: Path, layers: LayerRanges = ()) -> DiskWeights:
        """Those of a folder, of whose layers some are repeated."""
        return DiskWeights(stored_weights(weight_files(folder), layers))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor, which is not read."""
        path, stored = self.files[name]
        with open_weights(path) as file:
            return tuple(file.get_slice(stored).get_shape())

    def dense(self, name: str) -> Tensor:
        """A copy of one tensor, as it is stored."""
        return self.copied(name, device=torch.device("cpu"), dtype=None)

    def mapped(self, name: str) -> Tensor:
        """One tensor as it is stored, over pages of its file: they stay resident as long as it does."""
        path, stored = self.files[name]
        with open_weights(path) as file:
            tensor: Tensor = file.get_tensor(stored)
            return tensor

    def copied(self, name: str, *, device: torch.device, dtype: torch.dtype | None) -> Tensor:
        """A copy of one tensor; its file is closed again, so none of the pages stay resident."""
        path, stored = self.files[name]
        with open_weights(path) as file:
            tensor: Tensor = file.get_tensor(stored)
            return tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True)


@dataclass(frozen=True, slots=True)
class StreamedModel:
    """A model to run; see `CausalModel`.

    Attributes:
        module: in eval mode.
        head: the output projection.
        logit_shape: what happens to logits after the head.
        device: where it is computed.
    """

    module: PreTrainedModel
    head: FrozenHead
    logit_shape: LogitShape
    device: torch.device


class StreamedLinear(nn.Module):
    """Drop-in for `nn.Linear`, without a gradient.

    Args:
        weights: where the weight is read from, each time.
        name: of the weight, [O, I].
        bias_O: in the compute dtype, or None.
    """

    bias: Tensor | None

    def __init__(self, weights: DiskWeights, name: str, bias_O: Tensor | None) -> None:
        super().__init__()
        self._weights, self._name = weights, name
        self.register_buffer("bias", bias_O, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., I] in the compute dtype; returns [..., O] in the same dtype."""
        weight_OI = self._weights.copied(self._name, device=x.device, dtype=x.dtype)
        return nn.functional.linear(x, weight_OI, self.bias)


def stream_model(
    folder: Path,
    config: PreTrainedConfig,
    *,
    compute_dtype: torch.dtype,
    device: torch.device,
    layers: LayerRanges = (),
) -> StreamedModel:
    """The model of a transformers folder.

    Args:
        folder: with safetensors.
        config: its own, of the layers that the model has.
        compute_dtype: of activations and matrix products; weights are cast to it as they are read.
        device: where it is computed.
        layers: those of the folder that the model has, where some are repeated.

    Raises:
        ConfigError: an architecture that is refused, or a folder without its weights.
    """
    module = build_skeleton(config, with_buffers=True)
    parts = find_parts(module)
    weights = DiskWeights.of(folder, layers)
    dense = take_dense(parts, weights, compute_dtype=compute_dtype, device=device)
    for name in parts.linears:
        module.set_submodule(name, StreamedLinear(weights, f"{name}.weight", dense.pop(f"{name}.bias", None)))
    head = put_dense(module, parts, dense, compute_dtype=compute_dtype, device=device, resident_limit=ResidentLimit())
    module.eval()
    return StreamedModel(module, head, LogitShape.of(config), device)

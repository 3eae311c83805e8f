"""The norm behind the last layer, which may be left to whoever reads the hidden states.

Normed whole, the last layer's output is there several times beside its gradient: as it is, in fp32, normed, gathered.
Where layers take tokens in tiles, the loss norms a tile at a time instead (`step.tiled_loss`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_trainer.model.trainable_norm import TrainableNorm


class FinalNorm(nn.Module):
    """Drop-in for a model's last norm, with its parameters and under its name.

    Args:
        norm: what it stands for.

    Attributes:
        is_deferred: whether hidden states pass through as they are, for `apply_to` to be called on them.
        tile_tokens: rows that the loss norms at a time; 0 where all of them are normed here.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        for name, parameter in norm.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        # Not as a module: its parameters would have two names.
        self.__dict__["_norm"] = norm if isinstance(norm, TrainableNorm) else TrainableNorm(norm)
        self.is_deferred = False
        self.tile_tokens = 0

    @property
    def norm(self) -> TrainableNorm:
        """What it stands for."""
        own: TrainableNorm = self.__dict__["_norm"]
        return own

    @property
    def trained(self) -> tuple[nn.Parameter, ...]:
        """Weight and bias [H], as far as they are trained."""
        return tuple(own for own in self.parameters() if own.requires_grad)

    def hold(self, leaf: str, parameter_H: nn.Parameter) -> None:
        """Take another "weight" or "bias" in the place of the one that is there."""
        self.register_parameter(leaf, parameter_H)
        self.norm.hold(leaf, parameter_H)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        return hidden if self.is_deferred else self.apply_to(hidden)

    def apply_to(self, hidden: Tensor) -> Tensor:
        """The norm of each row."""
        normed: Tensor = self.norm(hidden)
        return normed


def find_final_norm(owner: nn.Module) -> tuple[str, nn.Module] | None:
    """Name and module of the last norm beside the layers of `owner`; None where there is none.

    By its class: its name differs (norm, final_layernorm, ln_f), and not every norm has a weight.
    """
    norms = [(name, child) for name, child in owner.named_children() if "norm" in type(child).__name__.lower()]
    return norms[-1] if norms else None


def owner_of_layers(module: PreTrainedModel) -> tuple[nn.Module, str]:
    """The part of a model that has its decoder layers, and the name of their list there.

    Raises:
        RuntimeError: they are in no list.
    """
    first = next((part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)), None)
    for part in module.modules():
        for name, child in part.named_children():
            if isinstance(child, nn.ModuleList) and len(child) and child[0] is first:
                return part, name
    raise RuntimeError(f"{type(module).__name__} keeps its layers in no list")


def replace_final_norm(module: PreTrainedModel) -> FinalNorm | None:
    """Put a `FinalNorm` in the place of a model's last norm, where it has layers and one; its weights are in place."""
    if not any(isinstance(part, GradientCheckpointingLayer) for part in module.modules()):
        return None
    owner, _ = owner_of_layers(module)
    found = find_final_norm(owner)
    if found is None:
        return None
    norm = FinalNorm(found[1])
    owner.add_module(found[0], norm)
    return norm


@contextmanager
def deferred(norm: FinalNorm) -> Iterator[None]:
    """While active, hidden states come as the last layer made them."""
    norm.is_deferred = True
    try:
        yield
    finally:
        norm.is_deferred = False

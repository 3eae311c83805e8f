"""A norm whose weight or bias may be trained: in fp32 then, whatever it norms.

torch's and transformers' norms compute in the dtype that their parameters make of it, and some take one dtype only.

Legend: H width of what is normed.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.func import functional_call


class TrainableNorm(nn.Module):
    """Drop-in for a norm, which computes with its parameters in the dtype of what is normed.

    Args:
        norm: what it stands for, and whose parameters it has under the same names.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        for name, parameter in norm.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.__dict__["_norm"] = norm  # not as a module: its parameters would have two names

    @property
    def norm(self) -> nn.Module:
        """What it stands for."""
        own: nn.Module = self.__dict__["_norm"]
        return own

    @property
    def trained_weight(self) -> nn.Parameter | None:
        """The weight [H] where it is trained."""
        own_H = self._parameters["weight"]
        return own_H if own_H is not None and own_H.requires_grad else None

    def hold(self, leaf: str, parameter_H: nn.Parameter) -> None:
        """Take another "weight" or "bias" in the place of the one that is there."""
        for part in (self, self.norm):
            part.register_parameter(leaf, parameter_H)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., H] in the same dtype."""
        if all(own_H.dtype == hidden.dtype for own_H in self._parameters.values() if own_H is not None):
            same: Tensor = self.norm(hidden)
            return same
        rounded = {name: own_H.to(hidden.dtype) for name, own_H in self.named_parameters()}
        normed: Tensor = functional_call(self.norm, rounded, (hidden,))
        return normed


def take_over_norms(module: nn.Module) -> dict[str, TrainableNorm]:
    """Put a `TrainableNorm` in the place of every norm that has a weight, its parameters in place; by name."""
    found = {name: TrainableNorm(module.get_submodule(name)) for name in norm_names(module.named_modules())}
    for name, norm in found.items():
        module.set_submodule(name, norm)
    return found


def norm_names(modules: Iterable[tuple[str, nn.Module]]) -> tuple[str, ...]:
    """Full names of the norms that have a weight, in the order of `modules`, which is a model's `named_modules`.

    By their class, as a model's last norm is found (`model.final_norm`): there is no base class of all.
    """
    return tuple(name for name, part in modules if is_norm(part) and isinstance(getattr(part, "weight", None), Tensor))


def is_norm(part: nn.Module) -> bool:
    """Whether it is a norm: by its class, and all that it has being vectors."""
    own = list(part.parameters())
    return "norm" in type(part).__name__.lower() and bool(own) and all(parameter.ndim == 1 for parameter in own)

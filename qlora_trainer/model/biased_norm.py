"""`nn.LayerNorm` whose bias may be trained: in fp32, whatever it norms.

torch's takes one dtype for weight and bias. RMSNorms have no bias and stay as they are.

Legend: H hidden size.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel


class BiasedNorm(nn.Module):
    """Drop-in for an `nn.LayerNorm` with a bias, which is rounded to the dtype of what is normed when it is added.

    Args:
        norm: whose parameters it takes over.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight = norm.weight
        self.bias = norm.bias
        self.normalized_shape, self.eps = norm.normalized_shape, norm.eps

    def hold_bias(self, bias_H: nn.Parameter) -> None:
        """Take another bias in the place of the one that is there."""
        self.register_parameter("bias", bias_H)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., H] in the same dtype."""
        bias_H = self.bias.to(hidden.dtype)
        normed: Tensor = nn.functional.layer_norm(hidden, self.normalized_shape, self.weight, bias_H, self.eps)
        return normed


def take_over_biased_norms(module: PreTrainedModel) -> dict[str, BiasedNorm]:
    """Put a `BiasedNorm` in the place of every plain LayerNorm that has a bias, its weights in place; by name.

    A class of its own computes something else: it stays, and its bias is not to be trained.
    """
    found = {}
    for name, part in list(module.named_modules()):
        if type(part) is nn.LayerNorm and part.bias is not None:
            found[name] = BiasedNorm(part)
            module.set_submodule(name, found[name])
    return found

"""Whether a CPU computes rightly in 16 bits: the products, the attention and the unpacking that a step is made of.

Libraries choose a kernel by processor, dtype and layout; one that is wrong on some machine would be the faster one all
the same. All of it takes 30 milliseconds at first, and then 20 (one core of a Xeon).

Legend: T tokens, I in_features, O out_features, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from qlora_trainer.hardware.causal_attention import AttentionShape, attend
from qlora_trainer.hardware.quant_library import functional

_TOKENS, _IN, _OUT = 256, 576, 192  # whole blocks of 64, not a power of two
_HEADS, _HEAD_DIM, _DOCUMENT = 2, 64, 40
_BLOCKSIZE = 64


def why_not_computed_in(dtype: torch.dtype) -> str | None:
    """The first operation whose result on a CPU is off by more than rounding it to `dtype`; None where none is.

    An error is the norm of the difference from fp64, or for unpacked weights from fp32, over that of the result. The
    most that one rounding makes of it is half of `eps`, twice what it makes on average.

    Args:
        dtype: of 16 bits, whose products are summed up in 32.
    """
    most = torch.finfo(dtype).eps / 2
    with torch.no_grad(), unset_fake_temporarily():
        results = _results(dtype)
        while True:
            try:
                name, found, expected = next(results)
            except StopIteration:
                return None
            except (RuntimeError, NotImplementedError) as error:  # what torch raises where it has no kernel
                return f"fails: {' '.join(str(error).split())[:120]}"
            off = torch.linalg.vector_norm(found.double() - expected) / torch.linalg.vector_norm(expected)
            if not off <= most:  # a NaN is not
                return f"{name} is off by {float(off):.1e}, where {most:.1e} is rounding"


def _results(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, result and reference of each form in which a step multiplies: row-major, transposed, added to, one row."""
    x_TI, weight_OI, bias_O, grad_TO = (
        _normal(*shape).to(dtype) for shape in ((_TOKENS, _IN), (_OUT, _IN), (_OUT,), (_TOKENS, _OUT))
    )
    x64_TI, weight64_OI, bias64_O, grad64_TO = (tensor.double() for tensor in (x_TI, weight_OI, bias_O, grad_TO))
    out64_TO = x64_TI @ weight64_OI.t()
    yield "a product by a transposed weight", torch.mm(x_TI, weight_OI.t()), out64_TO
    yield "a product", torch.mm(grad_TO, weight_OI), grad64_TO @ weight64_OI
    yield "a transposed product", torch.mm(grad_TO.t(), x_TI), grad64_TO.t() @ x64_TI
    yield "a product that is added", grad_TO.clone().addmm_(x_TI, weight_OI.t()), grad64_TO + out64_TO
    yield "a linear with a bias", nn.functional.linear(x_TI, weight_OI, bias_O), out64_TO + bias64_O
    yield "a product of one row", nn.functional.linear(x_TI[:1], weight_OI), out64_TO[:1]
    packed, state = functional.quantize_4bit(
        weight_OI.float(), blocksize=_BLOCKSIZE, quant_type="nf4", compress_statistics=True
    )
    unpacked_OI = functional.dequantize_4bit(packed, state)
    state.dtype = dtype
    yield "an unpacked weight", functional.dequantize_4bit(packed, state), unpacked_OI.double()
    q_1HTD, k_1HTD, v_1HTD = (_normal(3, 1, _HEADS, _DOCUMENT, _HEAD_DIM).to(dtype)).unbind()
    shape = AttentionShape(scale=_HEAD_DIM**-0.5, window=0, softcap=0.0)
    scores_1HTT = q_1HTD.double() @ k_1HTD.double().transpose(-1, -2) * shape.scale
    unseen_TT = torch.ones(_DOCUMENT, _DOCUMENT, dtype=torch.bool).triu(1)
    weights_1HTT = scores_1HTT.masked_fill(unseen_TT, -torch.inf).softmax(-1)
    yield "attention", attend(q_1HTD, k_1HTD, v_1HTD, shape)[0], weights_1HTT @ v_1HTD.double()


def _normal(*shape: int) -> Tensor:
    # Its own generator: an examination leaves the global one alone.
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))

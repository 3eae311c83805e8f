"""Is this architecture computed right? A two-layer random model of its config is asked, before anything is loaded.

The small model runs twice in fp32: as transformers computes it (eager attention, dense weights, each document on its
own), and as it will be trained here (NF4 linears, packed attention, both documents in one row). Equal losses, token by
token, accept the architecture: a mean would hide differences in both directions, a single document what leaks into the
next (some transformers models keep unknown keyword arguments, `document_lengths` among them, from their attention; a
layer that hands a state from token to token does not know where a document ends). Where only documents in rows of their
own give equal losses, it is accepted for those.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qlora_trainer.errors import ConfigError
from qlora_trainer.hardware.memory import is_out_of_memory
from qlora_trainer.model import nf4
from qlora_trainer.model.nf4 import NF4Weight
from qlora_trainer.model.quantized import assemble, hidden_states
from qlora_trainer.model.skeleton import (
    TRANSFORMERS_ERRORS,
    build_skeleton,
    find_parts,
    reason_of,
    without_warnings,
)

TOLERANCE = 1e-5  # norm of the difference over the norm of the losses, fp32
DOCUMENT_LENGTHS = (25, 15)
SMALL_WINDOW = 8  # shorter than the documents, so that a window that is not honoured shows
SMALL_VOCABULARY = 256


class _RandomWeights:
    """Weights of a dense model, packed on request; the dense model then takes what the packing left of them."""

    def __init__(self, dense_model: PreTrainedModel) -> None:
        self._parameters = dict(dense_model.named_parameters(remove_duplicate=False))

    def nf4(self, name: str) -> NF4Weight:
        packed = nf4.quantize(self._parameters[name].data, double_quant=True)
        self._parameters[name].data = nf4.dequantize(packed, torch.float32)
        return packed

    def dense(self, name: str) -> Tensor:
        return self._parameters[name].data


def require_accepted(config: PreTrainedConfig) -> bool:
    """Refuse, by name and with the reason, an architecture that would not be computed right.

    Returns:
        Whether documents may share a row.

    Raises:
        ConfigError: the model has weights outside linears, embeddings and norms, or its small copy's loss differs.
    """
    find_parts(build_skeleton(config, with_buffers=False))
    try:
        with torch.random.fork_rng(devices=[]), without_warnings():
            torch.manual_seed(0)
            packed_error, alone_error = _errors(shrink(config))
    except TRANSFORMERS_ERRORS as error:
        if is_out_of_memory(error):  # a RuntimeError too, and no fault of the base
            raise
        raise _refuse(config.model_type, f"a small copy that does not run ({reason_of(error)})") from error
    if not alone_error <= TOLERANCE:
        found = f"a small copy whose losses differ from transformers' by {alone_error:.1e} of their size"
        raise _refuse(config.model_type, found)
    return packed_error <= TOLERANCE


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of `config` with two layers, few heads and a small vocabulary.

    The head size stays, since rotary scaling factors are lists of half its length. Two layers of different kinds
    (windowed and full attention, with and without rotary embedding) are kept where the config has them.
    """
    small = copy.deepcopy(config)
    num_layers = config.num_hidden_layers
    per_layer = {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == num_layers and num_layers > 0
    }
    kinds = [tuple(str(values[index]) for values in per_layer.values()) for index in range(num_layers)]
    second = next((index for index, kind in enumerate(kinds) if kind != kinds[0]), min(1, num_layers - 1))
    changes: dict[str, Any] = {name: [values[0], values[second]] for name, values in per_layer.items()}
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    small_kv_heads = min(2, num_kv_heads)
    small_heads = small_kv_heads * min(2, num_heads // num_kv_heads)
    changes |= {
        "num_hidden_layers": 2,
        "num_attention_heads": small_heads,
        "num_key_value_heads": small_kv_heads,
        "hidden_size": small_heads * head_dim,
        "intermediate_size": 128,
        "vocab_size": SMALL_VOCABULARY,
    }
    if getattr(config, "sliding_window", None) is not None:
        changes["sliding_window"] = SMALL_WINDOW
    changes |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)  # theirs exceed the small vocabulary
    for name, value in changes.items():
        if hasattr(small, name):
            setattr(small, name, value)
    return small


def _errors(small: PreTrainedConfig) -> tuple[float, float]:
    """By how much our losses are off: with both documents in one row, and with a row for each.

    The loss is the cross-entropy of every token that has one before it in its document.
    """
    reference = AutoModelForCausalLM.from_config(
        small, attn_implementation="eager", dtype=torch.float32, trust_remote_code=False
    ).eval()
    for parameter in reference.parameters():
        # Norm weights start at one and biases at zero, which would hide that one is left out.
        parameter.data += 0.1 * torch.randn_like(parameter)
    skeleton = build_skeleton(small, with_buffers=True)
    model = assemble(skeleton, _RandomWeights(reference), compute_dtype=torch.float32, device=torch.device("cpu"))
    model.module.eval()
    documents = [torch.randint(1, SMALL_VOCABULARY, (1, length)) for length in DOCUMENT_LENGTHS]
    positions = [torch.arange(length).unsqueeze(0) for length in DOCUMENT_LENGTHS]
    with torch.no_grad():
        expected = [
            reference(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).logits
            for ids_BT, positions_BT in zip(documents, positions, strict=True)
        ]
        hidden_BTH = hidden_states(model, torch.cat(documents, 1), torch.cat(positions, 1), DOCUMENT_LENGTHS)
        alone = [
            hidden_states(model, ids_BT, positions_BT, (ids_BT.shape[1],))
            for ids_BT, positions_BT in zip(documents, positions, strict=True)
        ]
        found = [
            [model.logit_shape.apply(model.head(hidden_BTH)) for hidden_BTH in rows]
            for rows in (hidden_BTH.split(DOCUMENT_LENGTHS, dim=1), alone)
        ]
    expected_N = _joined_losses(expected, documents)
    packed, apart = (
        torch.linalg.vector_norm(_joined_losses(logits, documents) - expected_N) / torch.linalg.vector_norm(expected_N)
        for logits in found
    )
    return float(packed), float(apart)


def _joined_losses(logits: Sequence[Tensor], documents: Sequence[Tensor]) -> Tensor:
    losses = [
        torch.nn.functional.cross_entropy(logits_BTV[0, :-1], ids_BT[0, 1:], reduction="none")
        for logits_BTV, ids_BT in zip(logits, documents, strict=True)
    ]
    return torch.cat(losses)


def _refuse(model_type: str, found: str) -> ConfigError:
    return ConfigError(
        where=f"model type {model_type!r}",
        found=found,
        expected="a decoder that this trainer computes exactly as transformers does",
        fix="Choose another base, or report this model type.",
    )

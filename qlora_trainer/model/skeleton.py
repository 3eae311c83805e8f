"""The architecture without its weights: a transformers model on the meta device, and which of its parts are what.

Building it costs no memory for weights, so a model that cannot be trained is refused by name before anything is
downloaded or allocated.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import logging

from qlora_trainer.errors import ConfigError
from qlora_trainer.hardware.memory import is_out_of_memory
from qlora_trainer.model.attention import IMPLEMENTATION
from qlora_trainer.model.trainable_norm import norm_names

# What transformers raises for a model that its own classes cannot build or run from a config.
TRANSFORMERS_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    StrictDataclassError,
)
_MOST_CHARACTERS = 200


def reason_of(error: Exception) -> str:
    """What transformers says, in one line: the line behind a heading, without the list of all that it has."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    said = said.partition(" Model type should be one of")[0]
    said = f"{type(error).__name__}: {said}" if isinstance(error, LookupError) else said
    return said if len(said) <= _MOST_CHARACTERS else f"{said[:_MOST_CHARACTERS]}..."


@contextmanager
def without_warnings() -> Iterator[None]:
    """transformers' own lines about a config or a model, beside which an error of ours would not be one line."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@dataclass(frozen=True, slots=True)
class Parts:
    """Names in a causal language model, as in its checkpoint.

    Attributes:
        linears: every `nn.Linear` but the head, in model order; their weights become NF4.
        embeddings: every `nn.Embedding`.
        head: the output projection onto the vocabulary.
        is_tied: the head has no weight of its own but uses the input embedding's.
        dense_parameters: parameters that stay 16-bit (embeddings, norms, biases, an untied head).
        norms: every norm that has a weight, in model order.
    """

    linears: tuple[str, ...]
    embeddings: tuple[str, ...]
    head: str
    is_tied: bool
    dense_parameters: tuple[str, ...]
    norms: tuple[str, ...]


def build_skeleton(config: PreTrainedConfig, *, with_buffers: bool) -> PreTrainedModel:
    """A causal language model with its parameters on meta.

    Args:
        config: the architecture; a copy is built on, since transformers writes the attention implementation into it.
        with_buffers: make buffers (rotary frequencies) real. Only for architectures that `find_parts` accepts: a
            parameter made outside a library layer (fused experts) is then allocated for a moment, however large.

    Raises:
        ConfigError: transformers has no causal language model for this config, or cannot build it.
    """
    try:
        with without_warnings(), init_empty_weights(include_buffers=False) if with_buffers else torch.device("meta"):
            module: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(config),
                attn_implementation=IMPLEMENTATION,
                trust_remote_code=False,  # unset, a config's auto_map makes transformers ask, and run it on "y"
            )
    except TRANSFORMERS_ERRORS as error:
        if is_out_of_memory(error):  # a RuntimeError too, and no fault of the base
            raise
        raise ConfigError(
            where=f"model type {config.model_type!r}",
            found=f"no causal language model that transformers can build ({reason_of(error)})",
            expected="a text-only decoder such as Llama, Qwen, Gemma, Mistral or Phi",
            fix="Choose another base.",
        ) from error
    return module


def find_parts(module: PreTrainedModel) -> Parts:
    """Sort a skeleton's parameters into linears, embeddings, head and the rest.

    Raises:
        ConfigError: a weight that is neither (fused experts, convolutions, 1-D convolution style linears), by name, or
            whose name in a checkpoint is another than in the model.
    """
    model_type = module.config.model_type
    if module.config.get_text_config() is not module.config:
        raise _refuse(model_type, "more than a text decoder in one model (vision or audio parts)")
    head_module = module.get_output_embeddings()
    if not isinstance(head_module, nn.Linear):
        raise _refuse(model_type, "no linear output projection onto the vocabulary")
    by_name = dict(module.named_modules())
    head = next(name for name, part in by_name.items() if part is head_module)
    linears = tuple(name for name, part in by_name.items() if isinstance(part, nn.Linear) and name != head)
    embeddings = tuple(name for name, part in by_name.items() if isinstance(part, nn.Embedding))
    is_tied = bool(getattr(module.config, "tie_word_embeddings", False))  # not every config has it
    linear_weights = {f"{name}.weight" for name in linears}
    dense = []
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owner = name.rpartition(".")[0]
        if name in linear_weights or (is_tied and owner == head):
            continue
        if parameter.ndim >= 2 and owner not in embeddings and owner != head:
            raise _refuse(model_type, f"the weight {name} of shape {tuple(parameter.shape)} outside any linear layer")
        dense.append(name)
    renamed = get_model_conversion_mapping(module, add_legacy=False)
    if renamed:
        raise _refuse(model_type, f"weights whose files name them otherwise ({renamed[0].source_patterns[0]})")
    return Parts(linears, embeddings, head, is_tied, tuple(dense), norm_names(by_name.items()))


def _refuse(model_type: str, found: str) -> ConfigError:
    return ConfigError(
        where=f"model type {model_type!r}",
        found=found,
        expected="linear layers, embeddings and norms only, which is what NF4 and LoRA cover here",
        fix="Choose a dense text-only base (mixtures of experts with fused weights are not supported).",
    )

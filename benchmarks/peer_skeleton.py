"""transformers' model of a published row, on meta: without the peer's layers, and only if it can be modelled."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_outputs import BaseModelOutputWithPast

from benchmarks import peer_rows
from benchmarks.peer_fakes import flash_attn_func
from benchmarks.peer_rows import CannotHandle, as_reason, release_of

ATTENTION = "peer_flash_attention"
DEPTHS = (2, 3)  # like layers: every figure is affine in their number
# Before 4.48 some models expand keys and values to all heads (`repeat_kv` in their FlashAttention2 classes).
EXPANDS_KEYS: Mapping[str, tuple[str, ...]] = {"4.45": ("mistral", "phi3", "qwen2", "starcoder2"), "4.48": ()}
# Compared with the peer's own code, 5 layers of each, in each release but for those of `DIFFERENT`: modelled peaks
# within 0.5 % of it.
MATCHED = (
    *("cohere", "gemma", "gemma2", "granite", "llama", "mistral", "olmo", "phi", "phi3", "qwen2"),
    *("stablelm", "starcoder2"),
)
# 2 to 20 % off: another norm (OLMo 2), a loss in 16 bits (Stable LM), no layer recomputed (StarCoder 2).
DIFFERENT: Mapping[str, tuple[str, ...]] = {"4.45": (), "4.48": ("olmo2", "stablelm", "starcoder2")}
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Survey:
    """What the whole model, on meta, tells.

    Attributes:
        weights: (name, elements, whether it is quantized) of each.
        depths: which numbers of layers to trace: two shallow ones where all layers are alike, else all of them.
    """

    weights: tuple[tuple[str, int, bool], ...]
    depths: tuple[int, ...]


def survey(row: Mapping[str, Any]) -> Survey:
    """What the row's whole model tells, whether it can be modelled or not.

    Raises:
        CannotHandle: the installed transformers has no such model, or it is a mixture of experts.
    """
    return _survey(json.dumps(row["config"]))


@functools.cache
def _survey(config: str) -> Survey:
    model = _build(json.loads(config))
    num_layers = model.config.num_hidden_layers
    head = model.get_output_embeddings()
    linears = {id(part.weight) for part in model.modules() if isinstance(part, nn.Linear) and part is not head}
    weights = [(name, p.numel(), id(p) in linears) for name, p in model.named_parameters()]
    # Where layers are unlike (windows, some without rotary embedding), the peak's may be one that no shallow model has.
    lists = [value for value in vars(model.config).values() if isinstance(value, list) and len(value) == num_layers]
    kinds = {
        (str([values[index] for values in lists]), str([(name, p.shape) for name, p in layer.named_parameters()]))
        for index, layer in enumerate(_layers(model))
    }
    return Survey(tuple(weights), DEPTHS if len(kinds) == 1 and num_layers > DEPTHS[-1] else (num_layers,))


def _build(config: Mapping[str, Any]) -> Any:
    with as_reason(f"transformers {transformers.__version__} does not build it"):
        made = transformers.AutoConfig.for_model(**config)
        made.use_cache = False
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                made, dtype=torch.bfloat16, attn_implementation="eager"
            )
    peer_rows.check_model(model)
    return model


def _layers(model: Any) -> Iterable[nn.Module]:
    layers = getattr(getattr(model, "model", None), "layers", None)
    return layers if isinstance(layers, nn.ModuleList) else ()


def build_skeleton(row: Mapping[str, Any], num_layers: int) -> Any:
    """transformers' model on meta, with so many layers, ready to be modelled.

    Raises:
        CannotHandle: there is no such model, or it cannot be modelled.
    """
    model_type, release = row["config"]["model_type"], release_of(row)
    if model_type in DIFFERENT[release]:
        raise CannotHandle(f"{model_type} is not what it was in transformers {release}: give --peer-python")
    model = _build(peer_rows.at_depth(row["config"], num_layers))
    if not _layers(model) or not isinstance(getattr(model, "lm_head", None), nn.Linear):
        raise CannotHandle("a model that is not named like Llama is not modelled")
    linears = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)} - {"lm_head"}
    if row["target_modules"] != peer_rows.ALL_LINEAR:
        for target in row["target_modules"]:
            if not any(_is_named(name, target) for name in linears):
                raise CannotHandle(f"target_modules: {target} is no linear layer of it, and is not modelled")
    if row["peer_kernels"] != "stock" and any(is_target(row, name) for name in linears if name.endswith(MLP)):
        raise CannotHandle("the plugin's fused MLP is not modelled")
    with as_reason("its head is not modelled"):
        _check_head(model)
    _register_attention(expand_keys=model_type in EXPANDS_KEYS[release])
    model.config._attn_implementation = ATTENTION
    return model.requires_grad_(False)


def is_target(row: Mapping[str, Any], name: str) -> bool:
    """Whether a linear layer, not the head, gets an adapter."""
    targets = row["target_modules"]
    return targets == peer_rows.ALL_LINEAR or any(_is_named(name, target) for target in targets)


def _is_named(name: str, target: str) -> bool:
    """PEFT's rule: a target is a whole name or the end of one."""
    return name == target or name.endswith(f".{target}")


def _register_attention(*, expand_keys: bool) -> None:
    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if expand_keys and query.shape[1] != key.shape[1]:
            groups = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        if query.dtype == torch.float32:  # integrations/flash_attention.py
            query, key, value = (x.to(torch.bfloat16) for x in (query, key, value))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return flash_attn_func(query, key, value), None

    transformers.AttentionInterface.register(ATTENTION, attend)
    transformers.AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """The head as Granite, Cohere and Gemma 2 have it; the others have none of these fields."""
    logits: Tensor = model.lm_head(hidden)
    divisor, factor, cap = (
        getattr(model.config, key, None) for key in ("logits_scaling", "logit_scale", "final_logit_softcapping")
    )
    if divisor is not None:
        logits = logits / divisor
    if factor is not None:
        logits = logits * factor
    if cap is not None:
        logits = logits / cap
        logits = torch.tanh(logits)
        logits = logits * cap
    return logits


class _NotedOps(TorchDispatchMode):
    """Names of the operations that make something of the vocabulary's size."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocab_size, self.names = vocab_size, list[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.ndim and out.shape[-1] == self.vocab_size and not func.is_view:
            self.names.append(func.name())
        return out


def _check_head(model: Any) -> None:
    """`logits_of` must do what the model's own forward does behind its layers, or the peak would be too low."""
    body, vocab_size = model.model, model.lm_head.out_features
    hidden = torch.empty(1, 2, model.lm_head.in_features, dtype=torch.bfloat16, device="meta")
    with torch.no_grad():
        with _NotedOps(vocab_size) as ours:
            logits_of(model, hidden)
        try:
            model.model = _Given(hidden)
            with _NotedOps(vocab_size) as theirs:
                model(input_ids=torch.zeros(1, 2, dtype=torch.long, device="meta"))
        finally:
            model.model = body
    if ours.names != theirs.names:
        raise CannotHandle(f"its head is not modelled: {' '.join(theirs.names)} instead of {' '.join(ours.names)}")


class _Given(nn.Module):
    """In place of a model's layers."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.hidden)

"""The peer's step, modelled: the installed transformers' model with the peer's layers put in by hand.

For a machine without the peer's own packages (`peer_traced.py` needs them). What differs between the transformers
releases that the rows were measured with is said in `HOLDS_LOGITS` and in `peer_skeleton.EXPANDS_KEYS`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peer_layers
from benchmarks.peer_layers import Base4bit, PeftLora
from benchmarks.peer_rows import DTYPES, as_reason, release_of
from benchmarks.peer_skeleton import build_skeleton, is_target, logits_of
from benchmarks.peer_step import Trace, trace_step

# transformers before 4.46 drops the 16-bit logits as it makes the fp32 ones; since then the model's forward holds them
# while `loss_function` works (loss/loss_utils.py).
HOLDS_LOGITS = {"4.45": False, "4.48": True}


def trace(row: Mapping[str, Any], num_layers: int) -> Trace:
    """One step of the peer with this many layers.

    Raises:
        CannotHandle: this model's step does not run so.
    """
    skeleton = build_skeleton(row, num_layers)
    with as_reason("its modelled step does not run"), _rotary_of(skeleton, row):
        return trace_step(row, build=lambda: build(skeleton, row), loss_of=lambda model: loss_of(model, row))


def build(skeleton: Any, row: Mapping[str, Any]) -> Any:
    """The model as it is when training starts; under fake tensors."""
    head = skeleton.get_output_embeddings()
    for name, module in list(skeleton.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            parent, _, leaf = name.rpartition(".")
            layer: nn.Module = Base4bit(module, double_quant=row["double_quant"])
            if is_target(row, name):
                layer = PeftLora(
                    layer,  # type: ignore[arg-type]
                    rank=row["lora_rank"],
                    alpha=row["lora_alpha"],
                    dropout=row["lora_dropout"],
                    dtype=DTYPES[row["lora_dtype"]],
                )
            setattr(skeleton.get_submodule(parent), leaf, layer)
    made: dict[int, nn.Parameter] = {}  # a tied head is its embedding
    for name, module in skeleton.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    dtype = DTYPES[row.get("embedding_dtype", "bfloat16")]
                    if "norm" in name:
                        dtype = torch.float32 if row["kbit_fp32_upcast"] else parameter.dtype
                    made[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=False)
                module._parameters[key] = made[id(parameter)]
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype)
    if row["peer_kernels"] != "stock":
        _put_in_fused_kernels(skeleton)
    if row["activation_checkpointing"]:
        skeleton.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
        skeleton.enable_input_require_grads()
    skeleton.train()
    return skeleton


def _put_in_fused_kernels(model: Any) -> None:
    for module in model.modules():
        children: dict[str, Any] = dict(module.named_children())
        for names in (("q_proj", "k_proj", "v_proj"), ("o_proj",)):
            layers = {name: children[name] for name in names if isinstance(children.get(name), PeftLora)}
            if len(layers) == len(names):
                peer_layers.fuse(layers)
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _norm_of(module)


def _norm_of(module: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return peer_layers.FusedNorm.apply(x, module.weight)  # type: ignore[no-any-return, no-untyped-call]

    return forward


@contextmanager
def _rotary_of(model: Any, row: Mapping[str, Any]) -> Iterator[None]:
    """transformers' rotary embedding is a function of the model's module: replaced there where it is fused."""
    module: Any = sys.modules[type(model).__module__]
    stock = getattr(module, "apply_rotary_pos_emb", None)
    if row["peer_kernels"] != "stock" and stock is not None:
        module.apply_rotary_pos_emb = peer_layers.fused_rotary
    try:
        yield
    finally:
        if stock is not None:
            module.apply_rotary_pos_emb = stock


def loss_of(model: Any, row: Mapping[str, Any]) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """`Trainer.compute_loss` around accelerate's wrappers: which of these frames holds the logits decides GiB."""
    holds_logits = HOLDS_LOGITS[release_of(row)]
    held: list[Any] = []

    def compute_loss(inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss, logits = forward(inputs)
        # accelerate.utils.convert_outputs_to_fp32
        outputs = {"loss": loss, "logits": None if logits is None else logits.float()}
        del logits
        if row.get("outputs_outlive_loss", False):
            held.append(outputs)
        return outputs["loss"]  # type: ignore[return-value]

    def forward(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        hidden = model.model(input_ids=inputs["input_ids"])[0]
        if row["loss"] == "chunked_linear":
            shifted = hidden[..., :-1, :].contiguous()
            labels = inputs["labels"][..., 1:].contiguous()
            flat = shifted.view(-1, shifted.shape[-1])
            return peer_layers.ChunkedLoss.apply(flat, model.lm_head.weight, labels.view(-1)), None  # type: ignore[no-untyped-call]
        logits = logits_of(model, hidden)
        if not holds_logits:
            logits = logits.float()
        return full_loss(logits, inputs["labels"]), logits

    def full_loss(logits: Tensor, labels: Tensor) -> Tensor:
        logits = logits.float()
        shifted = logits[..., :-1, :].contiguous()
        targets = labels[..., 1:].contiguous()
        shifted = shifted.view(-1, shifted.shape[-1])
        targets = targets.view(-1)
        if row["loss"] == "fused_over_full_logits":
            losses = peer_layers.FusedCrossEntropy.apply(shifted, targets)  # type: ignore[no-untyped-call]
            return losses.sum() / torch.count_nonzero(targets != -100)  # type: ignore[no-any-return]
        return nn.functional.cross_entropy(shifted, targets)

    return compute_loss

"""The reference: transformers' own 4-bit loader, PEFT's LoRA, one document a row, PyTorch's cross-entropy."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qlora_trainer.hardware.quant_library import bitsandbytes
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.step.document import IGNORE_INDEX, Document
from tests.model.tiny_models import Step

PEFT_PREFIX = "base_model.model."


def load_oracle(nf4_folder: Path, compute_dtype: torch.dtype) -> Any:
    """A standard bitsandbytes 4-bit checkpoint as transformers loads it, computing in `compute_dtype`, in train mode.

    It stays in train mode: on CPUs with AVX512-BF16, bitsandbytes' eval-mode forward repacks weights in place.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(nf4_folder, attn_implementation="eager")
    for part in model.modules():
        if isinstance(part, bitsandbytes.nn.Linear4bit):
            part.compute_dtype = compute_dtype
            part.compute_type_is_set = True
            part.weight.quant_state.dtype = compute_dtype  # else backward dequantizes to what the checkpoint says
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(compute_dtype)
    return model.train()


def with_adapters(
    oracle: Any, settings: LoraSettings, weights: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32
) -> Any:
    """`oracle` wrapped by PEFT, with the given adapter weights held in `dtype`."""
    wrapped = wrap(
        oracle,
        peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT takes floats too
            lora_dropout=settings.dropout,
            target_modules=list(settings.targets),
            task_type="CAUSAL_LM",
            use_rslora=settings.use_rslora,
            use_dora=settings.use_dora,
            rank_pattern=dict(settings.rank_pattern),
            alpha_pattern=dict(settings.alpha_pattern),
            modules_to_save=list(settings.modules_to_save) or None,
            ensure_weight_tying=settings.tied_head is not None,
        ),
    )
    parameters = adapter_parameters(wrapped)
    assert parameters.keys() == weights.keys()
    for name, parameter in parameters.items():
        parameter.data = weights[name].to(dtype=dtype, copy=True)
    return wrapped.train()


def wrap(oracle: Any, config: peft.PeftConfig) -> Any:
    """`peft.get_peft_model`; adapters keep the dtype that they are given."""
    with _known_warnings():
        return peft.get_peft_model(oracle, config, autocast_adapter_dtype=False)


def moved_by_peft(nf4_folder: Path, **fields: Any) -> Any:
    """An adapter of rank 3 on q and v, unless `fields` say otherwise; every trained weight of it is moved."""
    asked: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], **fields}
    wrapped = wrap(load_oracle(nf4_folder, torch.float32), peft.LoraConfig(task_type="CAUSAL_LM", **asked))
    generator = torch.Generator().manual_seed(0)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return wrapped.train()


def load_adapter(oracle: Any, folder: Path) -> Any:
    """`PeftModel.from_pretrained`, in train mode (see `load_oracle`)."""
    with _known_warnings():
        return peft.PeftModel.from_pretrained(oracle, folder).train()


def save_converted(wrapped: Any, folder: Path, begun: Path) -> None:
    """As plain LoRA: what `begun` holds, the same adapter as it was made, is taken from it."""
    with _known_warnings():
        wrapped.save_pretrained(folder, path_initial_model_for_weight_conversion=str(begun))


@contextmanager
def _known_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        # PEFT 0.21 reads a property that transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def adapter_parameters(wrapped: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT's parameters under our names: LoRA's, and those of modules that are trained whole."""
    return {
        name.removeprefix(PEFT_PREFIX)
        .replace(".modules_to_save.default", "")
        .replace(".lora_B.default.bias", ".lora_B_bias")
        .removesuffix(".default.weight"): parameter
        for name, parameter in wrapped.named_parameters()
        if ".lora_" in name or ".modules_to_save." in name
    }


def logits(model: Any, documents: Sequence[Document]) -> Tensor:
    """fp32 [T, V]: each document run on its own, joined."""
    rows = [torch.from_numpy(document.input_ids_T).long().unsqueeze(0) for document in documents]
    return torch.cat([model(input_ids=row_BT, use_cache=False).logits[0].float() for row_BT in rows])


def oracle_step(wrapped: Any, documents: Sequence[Document]) -> Step:
    """Loss and gradients over `documents`, each on its own."""
    num_supervised_tokens = sum(document.num_supervised_tokens for document in documents)
    total = 0.0
    for document in documents:
        loss = nn.functional.cross_entropy(
            logits(wrapped, [document])[:-1],
            torch.from_numpy(document.labels_T).long()[1:],
            ignore_index=IGNORE_INDEX,
            reduction="sum",
        )
        (loss / num_supervised_tokens).backward()
        total += float(loss.detach())
    gradients = {
        name: parameter.grad.float()
        for name, parameter in adapter_parameters(wrapped).items()
        if parameter.grad is not None
    }
    return Step(total / num_supervised_tokens, gradients)

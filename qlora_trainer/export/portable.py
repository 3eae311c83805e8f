"""An adapter that every reader scales the same: those that know nothing but `lora_alpha` and `r`, too.

vLLM takes one scale for all modules, SGLang and llama.cpp ignore `use_rslora`, llama.cpp `alpha_pattern` as well. So
the true scale of each module is folded into its B, and `lora_alpha = r` leaves nothing to be scaled. Ranks are filled
up to the largest with zeros, which add nothing.

Legend: R rank of a module, P rank of all, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.lora_settings import LoraSettings


def require_portable(settings: LoraSettings, where: Path) -> None:
    """Refuse an adapter of which a reader of plain LoRA would see a part only.

    Raises:
        ConfigError: it has DoRA's magnitudes, trained biases, repeated layers, invocation tokens, or modules that were
            trained whole.
    """
    found = ["DoRA's magnitudes"] if settings.use_dora else []
    found += ["trained biases"] if settings.biases or settings.lora_bias else []
    if whole := ", ".join((*settings.modules_to_save, *([f"{len(settings.norms)} norms"] * bool(settings.norms)))):
        found.append(f"modules that were trained whole ({whole})")
    found += ["repeated layers"] if settings.layer_replication else []
    found += ["invocation tokens (alora_invocation_tokens)"] if settings.invocation_tokens else []
    if found:
        raise ConfigError(
            where=str(where),
            found=f"an adapter with {' and '.join(found)}",
            expected="LoRA alone, which is all that portable readers know",
            fix="Use it beside its base, here or with PEFT: it cannot be merged either."
            if settings.invocation_tokens
            else "Merge it instead: qlora-trainer merge.",
        )


def require_mergeable(settings: LoraSettings, where: Path) -> None:
    """Refuse an adapter that no sum of weights is.

    Raises:
        ConfigError: it is Activated LoRA.
    """
    if settings.invocation_tokens:
        raise ConfigError(
            where=str(where),
            found=f"Activated LoRA, which works from the tokens {list(settings.invocation_tokens)!r} on",
            expected="an adapter that works at every token, which a sum of weights does, too",
            fix="Use it beside its base, here or with PEFT (0.18 or later).",
        )


def portable_adapter(settings: LoraSettings, weights: Mapping[str, Tensor]) -> tuple[LoraSettings, dict[str, Tensor]]:
    """The same adapter with `lora_alpha = r` of one rank, and no pattern.

    Args:
        settings: of an adapter that `require_portable` has passed.
        weights: `{target}.lora_A` [R, I] and `{target}.lora_B` [O, R].

    Returns:
        Its settings, and `{target}.lora_A` [P, I] and `{target}.lora_B` [O, P]. Both stay in their dtype where scaling
        rounds nothing in it (a scale of 2, say), else they are fp32.
    """
    rank = max(settings.rank_of(name) for name in settings.targets)
    scaled = {name: _scaled(weights[f"{name}.lora_B"], settings.scale_of(name)) for name in settings.targets}
    is_exact = all(scaled[name].dtype == weights[f"{name}.lora_B"].dtype for name in settings.targets)
    out = {}
    for name in settings.targets:
        a_RI, b_OR = weights[f"{name}.lora_A"], scaled[name]
        if not is_exact:  # one dtype for all: not every reader takes a mixture
            a_RI, b_OR = a_RI.float(), b_OR.float()
        a_PI, b_OP = a_RI.new_zeros(rank, a_RI.shape[1]), b_OR.new_zeros(b_OR.shape[0], rank)
        a_PI[: a_RI.shape[0]] = a_RI
        b_OP[:, : b_OR.shape[1]] = b_OR
        out[f"{name}.lora_A"], out[f"{name}.lora_B"] = a_PI, b_OP
    plain = replace(settings, rank=rank, alpha=float(rank), use_rslora=False, rank_pattern=(), alpha_pattern=())
    return plain, out


def _scaled(b_OR: Tensor, scale: float) -> Tensor:
    """In its own dtype where nothing is rounded, else in fp32."""
    exact_OR = b_OR.double() * scale
    own_OR = exact_OR.to(b_OR.dtype)
    return own_OR if torch.equal(own_OR.double(), exact_OR) else exact_OR.float()

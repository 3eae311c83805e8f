"""The fields of PEFT's `adapter_config.json`: which must have what value here, and which change nothing.

Read field by field in PEFT 0.21.2. A field that nobody knows is refused where it is set: it may be what a newer PEFT
computes with. Not so a number, which is a size of something that another field switches on (`qalora_group_size` is 16
in every adapter).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.adapter_variants import STARTS, folded, is_loftq_of_nf4

# Read in `model.adapter_config` and `run`, each with checks of its own.
READ = frozenset(
    {
        "alora_invocation_tokens",
        "alpha_pattern",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "exclude_modules",
        "layer_replication",
        "kasa_config",  # this and three below: `model.adapter_variants`
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_bias",  # of each B
        "lora_dropout",
        "modules_to_save",
        "monteclora_config",
        "r",
        "rank_pattern",
        "revision",
        "target_modules",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        "use_rslora",
    }
)
# How it was begun, trained or stored, or what is looked at for other layers than `nn.Linear` and `nn.Embedding`.
UNUSED = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "eva_config",
        "fan_in_fan_out",  # of GPT-2's Conv1D; PEFT sets it to false for `nn.Linear`, and so may the file
        "inference_mode",
        "lora_ga_config",
        "loftq_config",
        "megatron_config",  # of Megatron's parallel layers
        "megatron_core",
        "merge_weights",  # of PEFT 0.2
        "peft_version",
        "qalora_group_size",  # which the shape of A tells
        "runtime_config",
        "task_type",
        "velora_config",  # compresses what backward keeps; forward is plain LoRA's
        # What ms-swift writes beside PEFT's own.
        "lora_dtype",
        "lorap_emb_lr",
        "lorap_lr_ratio",
    }
)
_MERGE = "Merge it into its base with PEFT (merge_and_unload), and take that as the base."
_CONVERT = (
    "PEFT cannot load it over its base alone either. Where it was trained, make plain LoRA of it (save_pretrained with "
    "path_initial_model_for_weight_conversion), or merge it (merge_and_unload) and take that as the base."
)
# Field -> the values that are plain LoRA on the base as it is, and what to do with an adapter that has another.
PLAIN: dict[str, tuple[tuple[object, ...], str]] = {
    "peft_type": (("LORA",), _MERGE),
    "bias": (("none", "all", "lora_only"), _MERGE),  # trained ones are seen in the weights
    "arrow_config": ((None,), "Use it with PEFT: its router cannot be merged. Or take one of its adapters."),
    "enable_lora": ((None, []), _MERGE),  # of PEFT 0.2, for joined linears
    "init_lora_weights": ((True, False, None, "gaussian", "eva", "mica", "orthogonal", *STARTS), _CONVERT),
}
_NOTHING: tuple[object, ...] = (None, False, "", [], {})


def require_plain_lora(path: Path, fields: Mapping[str, Any]) -> None:
    """Refuse the config of an adapter that is more than LoRA on the base as it is.

    Args:
        path: of the file, for the error.
        fields: as the file has them.

    Raises:
        ConfigError: names the first such field, its value and what to do.
    """
    for name, (allowed, fix) in PLAIN.items():
        if name == "init_lora_weights" and is_loftq_of_nf4(fields):
            continue
        if name in fields and folded(fields[name]) not in allowed:
            loftq, is_loftq = (
                fields.get("loftq_config"),
                fields[name] == "loftq",
            )  # of several steps, or 8 bits: PEFT finds its base again
            raise ConfigError(
                where=str(path),
                found=f"{name} = {fields[name]!r}"[:200] + f", loftq_config = {loftq!r}"[:200] * is_loftq,
                expected=_shown(name, allowed),
                fix=_MERGE if is_loftq else fix,
            )
    for name, value in fields.items():
        is_size = type(value) in (int, float)
        if name not in PLAIN and name not in READ | UNUSED and not is_size and value not in _NOTHING:
            raise ConfigError(
                where=str(path),
                found=f"{name} = {value!r}"[:200] + ", a field that is not known",
                expected="the fields of PEFT 0.21",
                fix="Delete it from the file if the adapter computes the same without it, or merge it with PEFT.",
            )


def _shown(name: str, allowed: tuple[object, ...]) -> str:
    if name == "bias":
        return "none, all or lora_only"
    if name == "init_lora_weights":
        return f"{allowed[0]!r}, or a start that has left the base as it was, or changed it so that it can be undone"
    return repr(allowed[0])

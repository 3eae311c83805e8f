"""The model card of an exported adapter: what is known of it, and nothing else.

Hubs read the YAML between the first two `---`. Everything below is taken from the adapter and, where there is one, from
the files of its run; what is not there is left out.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from qlora_trainer import __version__
from qlora_trainer.config.bases import SHIPPED_BASES, is_hub_id
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.config.strict_json import decode, read_capped
from qlora_trainer.export.source import Source, peft_trouble
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.run.fingerprints import saved_fingerprints
from qlora_trainer.run.folder import RunFolder

CARD_NAME = "README.md"
_TAGS = ["lora", "qlora", "qlora_trainer"]
Fact = tuple[str, str]


def model_card(source: Source, settings: LoraSettings, *, title: str, portable: bool) -> bytes:
    """`README.md` beside an adapter.

    Args:
        source: the adapter, its base and its run.
        settings: as they are exported.
        title: the name of the folder.
        portable: whether scales were folded into the weights.
    """
    sections = [_front_matter(source), f"# {_plain(title)}\n"]
    sections.append(f"{_kind(settings)} for {_code(source.base_name)}, written by qlora_trainer {__version__}.\n")
    sections.append(_section("Adapter", _adapter_facts(source, settings, portable=portable)))
    if source.run is not None and source.config is not None:
        sections.append(_section("Data", _data_facts(source.run, source.config)))
        sections.append(_section("Result", _result_facts(source.run)))
        sections.append(_section("Training", _training_facts(source.config)))
        sections.append(_section("Plan", _plan_facts(source.run)))
    sections.append(_usage(source))
    return "\n".join(text for text in sections if text).encode()


def _front_matter(source: Source) -> str:
    fields: dict[str, Any] = {}
    if is_hub_id(source.base_name) and not Path(source.base_name).exists():  # only ids of the hub are right here
        fields |= {"base_model": source.base_name, "base_model_relation": "adapter"}
    fields |= {"library_name": "peft", "pipeline_tag": "text-generation", "tags": _TAGS}
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"


def _kind(settings: LoraSettings) -> str:
    kind = "A DoRA adapter" if settings.use_dora else "A LoRA adapter"
    return f"{kind} (rank-stabilized)" if settings.use_rslora else kind


def _adapter_facts(source: Source, settings: LoraSettings, *, portable: bool) -> list[Fact]:
    facts = [("base", _code(source.base_name))]
    facts += [("revision", _code(source.revision))] if source.revision else []
    facts.append(("architecture", _code(source.base.config.model_type)))
    if settings.targets:
        facts += [("rank", str(settings.rank)), ("alpha", f"{settings.alpha:g}"), ("dropout", f"{settings.dropout:g}")]
        facts += [(name.replace("_", " "), _code(json.dumps(dict(pattern)))) for name, pattern in _patterns(settings)]
    leaves = sorted({name.rpartition(".")[2] for name in settings.targets})
    with_adapter = f"{len(settings.targets)}: {', '.join(map(_code, leaves))}" if leaves else "none"
    facts.append(("linears with an adapter", with_adapter))
    if settings.layer_replication:
        facts.append(("layers of the base", _code(json.dumps(settings.layer_replication))))
    if settings.modules_to_save:
        facts.append(("trained whole", ", ".join(map(_code, settings.modules_to_save))))
    if settings.norms:
        facts.append(("trained norms", f"{len(settings.norms)}, whole"))
    if settings.biases:
        facts.append(("trained biases", f"{len(settings.biases)} modules"))
    if settings.lora_bias:
        facts.append(("biases of B", f"`lora_bias`, {len(settings.targets)} linears"))
    if settings.invocation_tokens:
        facts.append(
            (
                "works from the tokens",
                f"{_code(json.dumps(settings.invocation_tokens))} on (Activated LoRA): "
                "with PEFT 0.18 or later; a reader that does not know them works at every token",
            )
        )
    if portable:
        facts.append(("scale", "folded into the weights: `lora_alpha = r`, for readers that know no other"))
    return facts


def _patterns(settings: LoraSettings) -> list[tuple[str, tuple[tuple[str, float], ...]]]:
    found = [("rank_pattern", settings.rank_pattern), ("alpha_pattern", settings.alpha_pattern)]
    return [(name, pattern) for name, pattern in found if pattern]


def _data_facts(run: RunFolder, config: RunConfig) -> list[Fact]:
    hashes = saved_fingerprints(run)
    facts = [("trained on", ", ".join(map(_code, _names(config.data.train))))]
    if config.data.eval is not None:
        facts.append(("held out", ", ".join(map(_code, _names(config.data.eval)))))
    elif config.data.eval_fraction:
        facts.append(("held out", f"{config.data.eval_fraction:.4g} of the rows"))
    facts += [(f"fingerprint of the {name}", _code(hashes[name])) for name in sorted(hashes) if name.endswith(" data")]
    facts += [(f"fingerprint of the {name}", _code(hashes[name])) for name in ("base", "tokenizer") if name in hashes]
    return facts


def _names(given: str | Sequence[str]) -> list[str]:
    """Ids of the hub as they are; of files the last part: where they lay is nobody's business."""
    names = [given] if isinstance(given, str) else list(given)
    return [
        name if is_hub_id(name.partition(":")[0]) and not Path(name).exists() else Path(name).name for name in names
    ]


def _adapter_name(given: str) -> str:
    """Of `lora.init_from`, in the same way; behind an @ is the commit of a hub id."""
    return given if is_hub_id(given.partition("@")[0]) and not Path(given).exists() else Path(given).absolute().name


def _result_facts(run: RunFolder) -> list[Fact]:
    summary = _read(run.summary_path)
    told = [
        ("held-out loss before", "eval_loss_before", ".4f"),
        ("held-out loss of this adapter", "eval_loss_after", ".4f"),
        ("steps", "steps", ",d"),
        ("tokens", "tokens", ",d"),
        ("tokens that were learned", "supervised_tokens", ",d"),
        ("seconds of training", "train_seconds", ",.0f"),
    ]
    facts = [(name, format(summary[key], form)) for name, key, form in told if _is_number(summary.get(key))]
    facts += [("device", _code(summary["device"]))] if isinstance(summary.get("device"), str) else []
    versions = summary.get("versions")
    if isinstance(versions, dict):
        facts.append(("versions", ", ".join(f"{_plain(name)} {_plain(number)}" for name, number in versions.items())))
    return facts


def _training_facts(config: RunConfig) -> list[Fact]:
    training, quantization, begun_with = config.training, config.quantization, config.lora.init_from
    settings = {
        "began with the adapter": None if begun_with is None else _adapter_name(begun_with),
        "learning rate": f"{training.learning_rate:g}",
        "times that for B": None if training.loraplus_lr_ratio == 1.0 else f"{training.loraplus_lr_ratio:g}",
        "schedule": training.schedule,
        "warm-up": f"{training.warmup_ratio:g} of the steps",
        "documents a step": training.global_batch_size,
        "epochs": f"{training.epochs:g}" if training.max_steps is None else None,
        "steps asked for": training.max_steps,
        "optimizer": training.optimizer,
        "weight decay": f"{training.weight_decay:g}",
        "norm that gradients are cut to": training.max_grad_norm,
        "longest document": f"{config.data.seq_len} tokens",
        "learned": config.data.train_on,
        "packed": "yes" if config.data.packing else "no",
        "seed": training.seed,
        "base while training": f"NF4{', double quantization' * quantization.double_quant}"
        + ", its head too" * (quantization.head == "nf4"),
        "compute dtype": quantization.compute_dtype,
    }
    return [(name, _plain(str(value))) for name, value in settings.items() if value is not None]


def _plan_facts(run: RunFolder) -> list[Fact]:
    plan, summary = _read(run.plan_path), _read(run.summary_path)
    in_force = plan.get("in_force")
    knobs = in_force.get("plan", in_force) if isinstance(in_force, dict) else {}
    told = {
        "tokens at once": "micro_batch_tokens",
        "micro-batches a step": "micro_batches_per_step",
        "layers recomputed": "activation_recompute_layers",
        "recomputed, their input on the host": "activation_offload_layers",
        "positions of the loss at once": "loss_chunk",
        "optimizer": "optimizer",
        "its state": "optimizer_residency",
    }
    facts = [(name, _plain(str(knobs[key]))) for name, key in told.items() if key in knobs]
    for name, key in (("predicted peak", "predicted_peak_bytes"), ("measured peak", "measured_peak_bytes")):
        if _is_number(summary.get(key)):
            facts.append((name, f"{summary[key] / 2**30:.2f} GiB"))
    return facts


def _usage(source: Source) -> str:
    template = ""
    if source.chat_template is not None:
        template = "\nTrained with the chat template in `chat_template.jinja`, not with the base's own.\n"
    if source.base_name in SHIPPED_BASES:  # a name that only we know
        return f"## Use\n\n`qlora-trainer generate` with this folder.\n{template}"
    if (trouble := peft_trouble(source.base)) is not None:
        return f"## Use\n\n{trouble}.\n{template}"
    return (
        "## Use\n\n```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(source.base_name)})\n"
        f'model = PeftModel.from_pretrained(base, "this folder")\n```\n{template}'
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(decode(read_capped(path)))
    except (OSError, ValueError):
        return {}


def _section(title: str, facts: Sequence[Fact]) -> str:
    if not facts:
        return ""
    rows = "".join(f"| {name} | {value} |\n" for name, value in facts)
    return f"## {title}\n\n| | |\n|---|---|\n{rows}"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain(text: str) -> str:
    """One line that ends no table cell and begins no markup."""
    kept = "".join(" " if unicodedata.category(letter)[0] == "C" else letter for letter in text)
    return "".join(f"\\{letter}" if letter in "|`<>[]\\" else letter for letter in " ".join(kept.split()))


def _code(text: str) -> str:
    kept = "".join(" " if unicodedata.category(letter)[0] == "C" else letter for letter in text)
    return f"`{' '.join(kept.replace('`', ' ').split())}`".replace("|", "\\|")

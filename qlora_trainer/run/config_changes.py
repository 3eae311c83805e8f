"""What may differ between a run and its resume: every key of the config is refused, logged or needs a flag. No torch.

A key that a run asked `auto` for equals the number it was resolved to in that run, so `RUN/config.yaml` resumes it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_trainer.errors import ConfigError

FLAG = "--allow-change"
# They decide what is learned, or what the saved state is the state of: another value is another run.
REFUSED_KEYS = frozenset(
    {
        "model.base",
        "model.revision",
        "quantization.double_quant",
        "quantization.head",
        "quantization.compute_dtype",
        "lora.rank",
        "lora.alpha",
        "lora.dropout",
        "lora.dtype",
        "lora.target_modules",
        "lora.layers_to_transform",
        "lora.layer_replication",
        "lora.init_from",
        "lora.use_rslora",
        "lora.use_dora",
        "lora.rank_pattern",
        "lora.alpha_pattern",
        "lora.modules_to_save",
        "lora.untie_tables",
        "lora.bias",
        "lora.lora_bias",
        "lora.alora_invocation_tokens",
        "data.train",
        "data.eval",
        "data.eval_fraction",
        "data.format",
        "data.columns",
        "data.chat_template",
        "data.train_on",
        "data.seq_len",
        "data.overlong",
        "data.on_bad_row",
        "data.packing",
        "data.streaming",
        "data.stream_rows",
        "training.global_batch_size",
        "training.optimizer",
        "training.seed",
    }
)
# The run goes on, but it is no longer the one that was begun (or, of the last three, equal only to rounding).
FLAGGED_KEYS = frozenset(
    {
        "training.epochs",
        "training.max_steps",
        "training.learning_rate",
        "training.loraplus_lr_ratio",
        "training.schedule",
        "training.warmup_ratio",
        "training.weight_decay",
        "training.max_grad_norm",
        "training.early_stopping_patience",
        "memory.micro_batch_tokens",
        "memory.activation_checkpointing",
        "memory.loss_chunk_tokens",
    }
)
# They change what is written, where and when, or where something lives in the meantime; a budget may change the
# micro-batches, which is told by the new plan.
LOGGED_KEYS = frozenset(
    {
        "data.max_dropped_share",
        "data.revision",  # whose content has a fingerprint: the commit may be named, or its branch have moved
        "training.save_every",
        "training.eval_every",
        "memory.budget",
        "memory.host_budget",
        "memory.activation_offload",
        "memory.tile_tokens",
        "memory.embedding_residency",
        "memory.optimizer_residency",
        "memory.base_residency",
        "memory.paging_dir",
        "output.dir",
        "output.trackers",
        "output.keep_checkpoints",
        "output.sample_questions",
    }
)
# A change of these asks for another plan; other keys leave the knobs of the run as they are.
PLANNED_KEYS = frozenset(
    {
        "memory.budget",
        "memory.host_budget",
        "memory.micro_batch_tokens",
        "memory.activation_checkpointing",
        "memory.loss_chunk_tokens",
        "memory.activation_offload",
        "memory.tile_tokens",
        "memory.embedding_residency",
        "memory.optimizer_residency",
        "memory.base_residency",
    }
)


@dataclass(frozen=True, slots=True)
class Change:
    """One key that a resume asks for otherwise than the run was asked before."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} -> {self.after!r}"


def check_allowed(keys: Collection[str], *, resume: bool) -> None:
    """Refuse a flag that means nothing.

    Args:
        keys: what `--allow-change` names.
        resume: whether there is something to go on with.

    Raises:
        ConfigError: nothing is resumed, or a key does not take the flag.
    """
    if keys and not resume:
        raise ConfigError(
            where=FLAG,
            found=f"{', '.join(sorted(keys))} without --resume",
            expected="a run that goes on with another value",
            fix="Add --resume auto, or leave it out.",
        )
    for key in sorted(set(keys) - FLAGGED_KEYS):
        changes_freely = key in LOGGED_KEYS
        raise ConfigError(
            where=FLAG,
            found=repr(key),
            expected=f"one of {', '.join(sorted(FLAGGED_KEYS))}",
            fix="It may be changed without the flag." if changes_freely else "No other key can be changed at a resume.",
        )


def changes_between(
    began_with: Mapping[str, Any], now: Mapping[str, Any], resolved: Sequence[Mapping[str, Any]]
) -> tuple[Change, ...]:
    """Keys whose value is neither the one the run was asked nor one that it was resolved to.

    Args:
        began_with: the config that the run was asked, in sections.
        now: the config of the resume, in sections.
        resolved: by dotted key, the values that took the place of `auto`; a run whose memory ran out has two of some.
    """
    before, after = flat(began_with), flat(now)
    return tuple(
        Change(key, before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if not _is_same(before.get(key), after.get(key))
        and not any(key in values and _is_same(values[key], after.get(key)) for values in resolved)
    )


def require_allowed(changes: Sequence[Change], allowed: Collection[str], *, run: str) -> None:
    """Refuse the changes that a run does not survive; what no flag can help comes first.

    Args:
        changes: of `changes_between`.
        allowed: keys that the user let change with `--allow-change`.
        run: the run folder, for the message.

    Raises:
        ConfigError: names the first such key with its old and new value, and the flag where one helps.
    """
    for change in sorted(changes, key=lambda change: change.key in FLAGGED_KEYS):
        if change.key in LOGGED_KEYS or (change.key in FLAGGED_KEYS and change.key in allowed):
            continue
        fix = "Put the old value back, or start a new run in another folder."
        if change.key in FLAGGED_KEYS:
            fix = f"Put the old value back, or go on with the new one: {FLAG} {change.key}."
        raise ConfigError(
            where=f"{change.key} at --resume",
            found=repr(change.after),
            expected=f"{change.before!r}, which the run in {run} began with",
            fix=fix,
        )


def merged(
    began_with: Mapping[str, Any], now: Mapping[str, Any], changes: Sequence[Change]
) -> dict[str, dict[str, Any]]:
    """The config to go on with, in sections: as the run was asked, but for the changes.

    A key that was given as the number it was resolved to is `auto` again, so that the next resume may use either.
    """
    changed = {change.key for change in changes}
    return {
        section: {
            key: value if f"{section}.{key}" in changed else began_with.get(section, {}).get(key, value)
            for key, value in values.items()
        }
        for section, values in now.items()
    }


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sections as dotted keys."""
    return {f"{section}.{key}": value for section, values in config.items() for key, value in values.items()}


def _is_same(one: object, other: object) -> bool:
    """Equal, but for `true` and 1, which are all layers and one layer."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other

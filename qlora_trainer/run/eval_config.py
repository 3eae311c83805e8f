"""What `eval` is to read, and how: the config of the runs that are judged, or one made for a file. No torch.

Adapters are compared on the same tokens only. So the runs must agree on what decides those; where they differ in how
long a document may be, the longest counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_trainer.config.bases import CHAT_TEMPLATE_FILE, SHIPPED_BASES
from qlora_trainer.config.load import load_config
from qlora_trainer.config.paths import read_chat_template
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import ConfigError, DataError
from qlora_trainer.run.folder import RunFolder, find_adapter

# What a file is read by as a run's own data was; the form and columns of the file itself are its own.
_OF_THE_RUN = ("data.train_on", "data.overlong", "data.packing", "quantization.compute_dtype")
_SIZES = ("data.seq_len", "memory.micro_batch_tokens", "memory.loss_chunk_tokens")
# What makes other rows, or other tokens of them, held out.
_HELD_OUT = ("train", "eval", "revision", "format", "columns", "train_on", "overlong", "eval_fraction", "streaming")


@dataclass(frozen=True, slots=True)
class JudgedOn:
    """Rows, and how they are read.

    Attributes:
        config: whose held-out rows are meant.
        run: whose own rows they are; None for rows that were named.
    """

    config: RunConfig
    run: RunFolder | None


def eval_config(targets: Mapping[str, Path], data: Sequence[str], *, overrides: Sequence[str] = ()) -> JudgedOn:
    """What adapters are judged on: the rows in `data`, or those that their runs held out.

    Args:
        targets: run folders and adapter folders, by what they are called.
        data: files, patterns or data sets; empty takes the runs' own held-out rows.
        overrides: of keys of `data`, and of the compute dtype.

    Raises:
        ConfigError: runs that would be judged on different tokens, a key that `eval` does not look at, or no run whose
            rows could be taken.
        DataError: the run held nothing out.
    """
    _require_keys_in_use(overrides)
    runs = {name: run for name, target in targets.items() if (run := _run_of(target)) is not None}
    configs = {name: load_config(run.config_path) for name, run in runs.items()}
    sizes = [f"{key}={largest}" for key in _SIZES if (largest := _largest(configs, key)) is not None]
    if data:
        shared = _settings_for_files(configs, data)
        template = _template({name: find_adapter(target) for name, target in targets.items()})
        return JudgedOn(load_config(None, [*shared, *template, *sizes, *overrides]), None)
    if not configs:
        raise ConfigError(
            where="eval",
            found="adapter folders without a run, and no --data",
            expected="rows to judge them on",
            fix="Name a file with --data.",
        )
    template = _template({name: run.adapter_path for name, run in runs.items()})
    _require_one_held_out(configs)
    run = next(iter(runs.values()))
    config = load_config(run.config_path, [*template, *sizes, *overrides])
    if not holds_out(config):
        raise DataError(
            where=f"eval {run.path}",
            found="a run that held no rows out",
            expected="rows that it was not trained on",
            fix="Name a file with --data.",
        )
    return JudgedOn(config, run)


def holds_out(config: RunConfig) -> bool:
    """Whether a run of that config leaves rows to judge its adapter on."""
    return config.data.eval is not None or (config.data.eval_fraction > 0 and not config.data.streaming)


def _settings_for_files(configs: Mapping[str, RunConfig], data: Sequence[str]) -> list[str]:
    """The defaults, but for what the runs agree on."""
    shared = {key: _agreed(key, {name: _value(config, key) for name, config in configs.items()}) for key in _OF_THE_RUN}
    # The schema asks for a base and for rows to train on, of which nothing is read here.
    named = {"model.base": next(iter(SHIPPED_BASES)), "data.train": list(data), "data.eval": list(data)}
    known = {key: value for key, value in (named | shared).items() if value is not None}
    return ["training.global_batch_size=1", *(f"{key}={json.dumps(value)}" for key, value in known.items())]


def _template(adapters: Mapping[str, Path]) -> list[str]:
    """The chat template that all were trained with, where that is another than the base's: each keeps a copy of it."""
    paths = {name: folder / CHAT_TEMPLATE_FILE for name, folder in adapters.items()}
    text = {name: read_chat_template(str(path)) if path.is_file() else None for name, path in paths.items()}
    if _agreed("data.chat_template", text) is None:
        return []
    return [f"data.chat_template={json.dumps(str(next(iter(paths.values()))))}"]


def _agreed(key: str, values: Mapping[str, Any], *, fix: str = "Judge them one at a time.") -> Any:
    """The one value that all have; None where there is none at all.

    Raises:
        ConfigError: they differ.
    """
    names = list(values)
    for name in names[1:]:
        if values[name] != values[names[0]]:
            told = [str(values[one]) for one in (names[0], name)]
            what = f" ({' and '.join(told)})" if all(len(text) < 100 and text.isprintable() for text in told) else ""
            raise ConfigError(
                where="eval",
                found=f"{names[0]} and {name} with different {key}{what}",
                expected="adapters that are judged on the same tokens",
                fix=fix,
            )
    return values[names[0]] if names else None


def _require_one_held_out(configs: Mapping[str, RunConfig]) -> None:
    """Runs that held out the same rows, and make the same tokens of them."""
    fix = "Judge them one at a time, or on a file that you name with --data."
    for key in _HELD_OUT:
        _agreed(f"data.{key}", {name: getattr(config.data, key) for name, config in configs.items()}, fix=fix)
    if any(config.data.eval is None for config in configs.values()):
        _agreed("training.seed", {name: config.training.seed for name, config in configs.items()}, fix=fix)


def _largest(configs: Mapping[str, RunConfig], key: str) -> int | None:
    return max((value for config in configs.values() if type(value := _value(config, key)) is int), default=None)


def _value(config: RunConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _run_of(target: Path) -> RunFolder | None:
    """The run that a target is, or whose adapter it is."""
    adapter = find_adapter(target)
    run = RunFolder(adapter.parent)
    return run if adapter == run.adapter_path and run.config_path.is_file() else None


def _require_keys_in_use(overrides: Sequence[str]) -> None:
    for override in overrides:
        key = override.partition("=")[0].strip()
        is_used = key.startswith("data.") or key == "quantization.compute_dtype"
        if not is_used or key in ("data.train", "data.eval", "data.streaming"):
            raise ConfigError(
                where=f"--set {override}",
                found=f"{key}, which eval does not look at",
                expected="a key that says how data is read, such as data.seq_len, or quantization.compute_dtype",
                fix="Name rows with --data, and a base with --model.",
            )

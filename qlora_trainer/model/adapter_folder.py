"""PEFT adapter folders: `adapter_config.json` and `adapter_model.safetensors`, which PEFT, vLLM and llama.cpp read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from qlora_trainer.config.bases import ADAPTER_CONFIG_FILE
from qlora_trainer.errors import ConfigError
from qlora_trainer.model.adapter_biases import has_biases, take_biases
from qlora_trainer.model.adapter_config import asked_updates, read_config_fields, settings_of, wrong_adapter
from qlora_trainer.model.adapter_variants import (
    Variant,
    as_target_modules,
    of_fewer_ranks,
    require_activated,
    require_named,
    taken_start,
    variant_of,
)
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.safetensors_header import require_sane_header
from qlora_trainer.model.table_names import BaseTables
from qlora_trainer.model.table_updates import TableUpdate, take_updates
from qlora_trainer.model.whole_linears import whole_linears, with_whole_linears

WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PICKLES = ("adapter_model.bin", "adapter_model.pt")
_COMPUTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# VeLoRA's, with which it compresses what backward keeps, and MonteCLoRA's, of the noise that A has in training.
_OF_TRAINING = (".lora_velora_embed", ".lora_monteclora_sampler")
_DIAGONAL = ".lora_diag"  # KaSA's, between A and B
_MATRICES = (".lora_A", ".lora_B")  # which PEFT keeps in modules of their own, with a `.weight`


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """An adapter read from disk.

    Attributes:
        base_name: what the base is called in the adapter's config.
        revision: the base's hub revision, or None.
        settings: with targets resolved against the linears of a base.
        weights: by our names, see `adapter_tensors`.
        updates: what becomes of tables that are in `settings.modules_to_save`, but not in `weights` (see
            `model.table_updates`); only where it was asked for.
        variant: what `weights` are, until `model.plain_lora` has made of them what `settings` say; None for plain LoRA.
    """

    base_name: str
    revision: str | None
    settings: LoraSettings
    weights: dict[str, Tensor]
    updates: Mapping[str, TableUpdate] = field(default_factory=dict)
    variant: Variant | None = None


def adapter_tensors(weights: Mapping[str, Tensor], settings: LoraSettings) -> dict[str, Tensor]:
    """What `adapter_model.safetensors` holds, by PEFT's names.

    Args:
        weights: `{target}.lora_A` [R, I] and `{target}.lora_B` [O, R]; `{target}.lora_magnitude_vector` [O] of DoRA;
            `{target}.lora_B_bias` [O] of `lora_bias`; `{linear}.bias` [O] of trained biases; `{table}.weight` [V, H]
            and `{table}.bias` [V], `{norm}.weight` [H] and `{norm}.bias` [H] of what is trained whole.
        settings: what the adapter is. A table that serves embedding and head is in the file twice, as with PEFT.
    """
    whole = {}
    if settings.tied_head is not None:
        whole[f"{settings.tied_head}.weight"] = weights[f"{settings.modules_to_save[0]}.weight"]
    biases = {f"{name}.bias": f"{name}.base_layer.bias" for name in settings.targets}  # PEFT wraps targets alone
    biases |= {f"{name}.lora_B_bias": f"{name}.lora_B.bias" for name in settings.targets}
    return {
        f"{_PREFIX}{biases.get(name, name)}{'.weight' if name.endswith(_MATRICES) else ''}": own
        for name, own in {**weights, **whole}.items()
    }


def weights_by_our_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `adapter_tensors`, but for biases (see `model.adapter_biases`)."""
    found = {}
    for name, tensor in tensors.items():
        ours = name.removeprefix(_PREFIX)
        matrix = ours.removesuffix(".weight")
        found[matrix if matrix.endswith(_MATRICES) else ours] = tensor
    return found


def read_adapter_fields(folder: Path) -> dict[str, Any]:
    """The checked `adapter_config.json` of an adapter folder.

    Raises:
        ConfigError: no adapter here, only a pickled one, or a variant that this version does not compute; or
            `target_parameters`, and LoRA in the file that no field names.
    """
    pickled = [name for name in _PICKLES if (folder / name).exists()]
    if not (folder / WEIGHTS_FILE).is_file():
        found = f"only {pickled[0]}, a pickle, which is never read" if pickled else f"no {WEIGHTS_FILE}"
        raise wrong_adapter(folder, found, f"an adapter folder with {ADAPTER_CONFIG_FILE} and {WEIGHTS_FILE}")
    fields = read_config_fields(folder / ADAPTER_CONFIG_FILE)
    shapes = _shapes(folder)
    if taken_start(fields) is not None:
        fields |= of_fewer_ranks(fields, _whole_ranks(shapes))
    modules = _lora_modules(shapes)
    if fields.get("target_parameters"):
        require_named(folder / ADAPTER_CONFIG_FILE, fields, modules)
        fields = as_target_modules(fields, modules)
    whole = whole_linears(fields, shapes)
    if both := sorted(whole.keys() & set(modules)):
        raise wrong_adapter(folder / WEIGHTS_FILE, f"LoRA on {both[0]}, and its weight", "one of them")
    fields = with_whole_linears(fields, whole)
    require_activated(folder / ADAPTER_CONFIG_FILE, fields)
    return fields


def has_only_lora_in_layers(folder: Path) -> bool:
    """Whether an adapter's file has nothing but LoRA of modules in numbered layers: no bias, table or norm.

    Raises:
        ConfigError: the file is broken or not safetensors.
    """
    names = _shapes(folder)
    are_of_lora = all(".lora_" in name and any(map(str.isdigit, name.split("."))) for name in names)
    return are_of_lora and not has_biases(names)


def lora_modules(folder: Path) -> list[str]:
    """The modules that have LoRA in an adapter's file, by name.

    Raises:
        ConfigError: the file is broken or not safetensors.
    """
    return _lora_modules(_shapes(folder))


def _lora_modules(names: Iterable[str]) -> list[str]:
    return sorted({name.partition(".lora_")[0] for name in names if ".lora_" in name})


def _whole_ranks(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Of the modules whose A and B have as many ranks as a matrix between their sides can: their number."""
    found = {}
    for name, a in shapes.items():
        b = shapes.get(name.replace(".lora_A.", ".lora_B."), ())
        if ".lora_A." in name and len(a) == len(b) == 2 and a[0] == b[1] == min(a[1], b[0]):
            found[name.partition(".lora_A.")[0]] = a[0]
    return found


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of all tensors in the file, by their names without PEFT's prefix."""
    try:
        require_sane_header(folder / WEIGHTS_FILE)
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            return {
                name.removeprefix(_PREFIX): tuple(file.get_slice(name).get_shape())
                for name in file.keys()  # noqa: SIM118  # it is no mapping
            }
    except (SafetensorError, ValueError, OSError) as error:
        raise wrong_adapter(folder / WEIGHTS_FILE, f"no safetensors file ({error})", "safetensors") from error


def read_adapter_folder(
    folder: Path, *, linear_names: Sequence[str], tables: BaseTables | None = None, may_change_base: bool = False
) -> AdapterFolder:
    """Read an adapter; its targets are resolved against the base's own names.

    Args:
        folder: where it lies.
        linear_names: the linears of its base.
        tables: the base's embeddings, head and norms; None refuses an adapter with `modules_to_save`.
        may_change_base: the caller makes whole tables of LoRA on embedding or head, and of trained rows; else such an
            adapter is refused.

    Raises:
        ConfigError: see `read_adapter_fields`; or the weights file is broken or not safetensors, or holds what is no
            finite floating-point number.
    """
    fields = read_adapter_fields(folder)
    try:
        require_sane_header(folder / WEIGHTS_FILE)
        tensors = load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, ValueError, OSError) as error:
        raise wrong_adapter(folder / WEIGHTS_FILE, f"no safetensors file ({error})", "safetensors") from error
    settings = settings_of(fields, linear_names=linear_names, tables=tables, where=folder / ADAPTER_CONFIG_FILE)
    if fields.get("velora_config") or fields.get("monteclora_config") is not None:
        tensors = {name: own for name, own in tensors.items() if not any(part in name for part in _OF_TRAINING)}
    weights = _usable(weights_by_our_names(tensors), folder / WEIGHTS_FILE)
    if len(weights) != len(tensors):
        raise wrong_adapter(folder / WEIGHTS_FILE, "a weight twice, with and without a prefix", "each weight once")
    if settings.tied_head is not None:
        _forget_second_table(weights, settings, folder / WEIGHTS_FILE)
    updates: Mapping[str, TableUpdate] = {}
    if fields.get("kasa_config") is not None:
        _take_diagonals(weights, folder / WEIGHTS_FILE)
    if tables is not None:
        asked = asked_updates(fields, linear_names=linear_names, tables=tables)
        settings, updates = take_updates(weights, settings, asked, tables=tables, where=folder / WEIGHTS_FILE)
    lora_of_tables = [name for name, own in updates.items() if own.rows_VR is not None]
    if settings.invocation_tokens and lora_of_tables:
        both = f"alora_invocation_tokens, and LoRA on {lora_of_tables[0]}"
        expected = "LoRA on linears inside the layers: a table that is trained works at every token"
        raise wrong_adapter(folder / ADAPTER_CONFIG_FILE, both, expected)
    variant = variant_of(fields)
    biases = take_biases(
        weights,
        lora_bias=settings.lora_bias,
        linear_names=linear_names,
        tables=tables,
        whole=(*settings.trained_whole, *(() if variant is None else variant.whole)),
        where=folder / WEIGHTS_FILE,
    )
    settings = replace(settings, biases=biases)
    if settings.layer_replication and (biases or (variant is not None and variant.parts)):
        what = "biases" if biases else " and ".join(variant.parts if variant is not None else ())
        both = f"layer_replication = {fields['layer_replication']!r} and {what}, which copies of a layer share in PEFT"
        raise wrong_adapter(folder / ADAPTER_CONFIG_FILE, both, "LoRA on the linears of repeated layers")
    name, revision = fields.get("base_model_name_or_path") or "", fields.get("revision")
    found = AdapterFolder(name, revision, settings, weights, updates, variant)
    if not may_change_base:
        require_whole(found, folder)
    return found


def require_whole(adapter: AdapterFolder, folder: Path) -> None:
    """Refuse one that changes a table of the base other than by having it whole.

    Raises:
        ConfigError: it does.
    """
    if not adapter.updates:
        return
    raise ConfigError(
        where=str(folder),
        found=f"an adapter that changes {', '.join(adapter.updates)} other than as a whole",
        expected="LoRA on linears inside the layers, and tables in modules_to_save",
        fix="Train on from it (lora.init_from), or merge it into its base (qlora-trainer merge).",
    )


def _usable(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The same, in a type that is computed with: 8 bits in fp32, which holds them exactly.

    Raises:
        ConfigError: other numbers than finite floating-point ones; names the first such weight.
    """
    found = {
        name: own if own.dtype in _COMPUTED or not own.is_floating_point() else own.float()
        for name, own in weights.items()
    }
    for name, tensor in found.items():
        if not tensor.is_floating_point():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise wrong_adapter(path, f"{name} of {dtype}", "floating-point numbers")
        if tensor.numel() and not all(map(math.isfinite, torch.aminmax(tensor))):  # NaN becomes both ends
            raise wrong_adapter(path, f"a number in {name} that is not finite", "finite numbers")
    return found


def _take_diagonals(weights: dict[str, Tensor], path: Path) -> None:
    """B diag(d) for B, of KaSA.

    Raises:
        ConfigError: a diagonal without a B of its size, or a B without one, which PEFT draws at random.
    """
    diagonals = {name: name.removesuffix(".lora_B") + _DIAGONAL for name in weights if name.endswith(".lora_B")}
    if alone := next((name for name, diagonal in diagonals.items() if diagonal not in weights), None):
        raise wrong_adapter(path, f"{alone}, and no {diagonals[alone]}", "KaSA's diagonal beside each B")
    for name in [name for name in weights if name.endswith(_DIAGONAL)]:
        owner, diagonal_R = name.removesuffix(_DIAGONAL), weights.pop(name)
        b_OR = weights.get(f"{owner}.lora_B")
        if b_OR is None or b_OR.ndim != 2 or diagonal_R.shape != b_OR.shape[1:]:
            found = f"{name} {tuple(diagonal_R.shape)}, and {'no' if b_OR is None else tuple(b_OR.shape)} lora_B"
            raise wrong_adapter(path, found, "KaSA's diagonal beside a B of as many columns")
        weights[f"{owner}.lora_B"] = b_OR.float() * diagonal_R.float()


def _forget_second_table(weights: dict[str, Tensor], settings: LoraSettings, path: Path) -> None:
    """Of a table that serves embedding and head, PEFT writes both.

    Raises:
        ConfigError: they differ.
    """
    table = f"{settings.modules_to_save[0]}.weight"
    second = weights.pop(f"{settings.tied_head}.weight", None)
    if second is not None and not torch.equal(weights.setdefault(table, second), second):
        raise wrong_adapter(path, "ensure_weight_tying, but different tables for embedding and head", "one table")

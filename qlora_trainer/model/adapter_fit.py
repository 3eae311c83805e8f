"""Whether an adapter fits a base, asked of the base's skeleton: no weight of the base is read."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from qlora_trainer.model.activated import require_tokens
from qlora_trainer.model.adapter_biases import in_order
from qlora_trainer.model.adapter_folder import AdapterFolder
from qlora_trainer.model.adapter_variants import Variant
from qlora_trainer.model.adapters import require_shapes
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.skeleton import Parts
from qlora_trainer.model.table_names import BaseTables
from qlora_trainer.model.table_updates import require_updates_fit
from qlora_trainer.model.trained_vectors import require_trainable_biases


def base_tables(parts: Parts) -> BaseTables:
    """The embeddings, the head and the norms of a base."""
    return BaseTables(parts.embeddings, parts.head, parts.is_tied, parts.norms)


def modules_with_bias(parts: Parts) -> tuple[str, ...]:
    """Full names of the modules that have a bias: linears in model order, others by name, the head last."""
    names = {name.removesuffix(".bias") for name in parts.dense_parameters if name.endswith(".bias")}
    return in_order(names, parts.linears, parts.head)


def expected_shapes(skeleton: PreTrainedModel, settings: LoraSettings) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of an adapter with these settings on this base."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in settings.targets:
        linear = skeleton.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        shapes[f"{name}.lora_A"] = (settings.rank_of(name), linear.in_features)
        shapes[f"{name}.lora_B"] = (linear.out_features, settings.rank_of(name))
        if settings.use_dora:
            shapes[f"{name}.lora_magnitude_vector"] = (linear.out_features,)
        if settings.lora_bias:
            shapes[f"{name}.lora_B_bias"] = (linear.out_features,)
    by_name = dict(skeleton.named_parameters())
    for name in settings.biases:
        if (bias := by_name.get(f"{name}.bias")) is not None:
            shapes[f"{name}.bias"] = tuple(bias.shape)
    for name in settings.trained_whole:
        for leaf, parameter in skeleton.get_submodule(name).named_parameters():
            shapes[f"{name}.{leaf}"] = tuple(parameter.shape)
    return shapes


def require_adapter_fits(skeleton: PreTrainedModel, adapter: AdapterFolder, *, where: str) -> None:
    """Refuse an adapter of another base.

    Args:
        skeleton: of the base.
        adapter: with what it makes of tables still to be made.
        where: what to call it in an error.

    Raises:
        ConfigError: names or shapes differ; the first five are named, or the first of an update of a table.
    """
    require_trainable_biases(skeleton, adapter.settings)
    num_rows = skeleton.config.get_text_config().vocab_size
    require_tokens(adapter.settings.invocation_tokens, num_rows, where=where)
    shapes = expected_shapes(skeleton, adapter.settings)
    if adapter.variant is not None:
        shapes = _shapes_in_file(adapter.variant, adapter, shapes)
    require_updates_fit(adapter.updates, shapes, where=where)
    to_be_made = {f"{name}.{leaf}" for name in adapter.updates for leaf in ("weight", "bias")}
    expected = {name: shape for name, shape in shapes.items() if name not in to_be_made}
    require_shapes(expected, adapter.weights, where=where)


def _shapes_in_file(
    variant: Variant, adapter: AdapterFolder, shapes: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    found = dict(shapes)
    for name in adapter.settings.targets:
        a, b = f"{name}.lora_A", f"{name}.lora_B"
        if name in variant.whole:
            own = (found[b][0], found[a][1])
            found = {key: shape for key, shape in found.items() if not key.startswith(f"{name}.lora_")}
            found[f"{name}.weight"] = own
            continue
        plain = ((shapes[a][0], shapes[a][1]), (shapes[b][0], shapes[b][1]))
        found[a], found[b] = variant.shapes_in_file(name, plain, adapter.weights.get(a))
        if variant.has_blocks(name)[1]:
            found.pop(f"{b}_bias", None)
    return found

"""A base on fake tensors: the project's own model, from a config alone, without weights and without a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel

from qlora_trainer.errors import ConfigError
from qlora_trainer.hardware.input_store import HostInputs, InputStore, NoInputs
from qlora_trainer.hardware.side_stream import SideStream
from qlora_trainer.model import nf4, trained_tables
from qlora_trainer.model.activation_policy import decoder_layers
from qlora_trainer.model.adapters import adapter_shapes, attach_adapters
from qlora_trainer.model.final_norm import owner_of_layers
from qlora_trainer.model.linear import NF4Linear
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.quantized import QuantizedModel, assemble
from qlora_trainer.model.skeleton import build_skeleton
from qlora_trainer.model.tables import tables_of
from qlora_trainer.model.trained_vectors import vector_weights
from qlora_trainer.planning.fake_results import FakeResults
from qlora_trainer.planning.tracker import StorageTracker


class _EmptyWeights:
    """Storages without values, in place of a cache on disk (a `WeightSource`)."""

    def __init__(self, shapes: Mapping[str, torch.Size], *, code: Tensor | None, device: torch.device) -> None:
        self._shapes, self._code, self._device = shapes, code, device

    def nf4(self, name: str) -> nf4.NF4Weight:
        rows, columns = self._shapes[name]
        return nf4.empty((rows, columns), code=self._code, device=self._device)

    def dense(self, name: str) -> Tensor:
        return torch.empty(self._shapes[name], dtype=torch.bfloat16, device=self._device)


@dataclass(frozen=True, slots=True)
class DryModel:
    """A quantized model of fake tensors.

    Attributes:
        model: as training uses it, without adapters.
        fake_mode: under which everything of it lives.
        results: what its traces remember of each other.
        layers: its decoder layers.
        final_norm: what comes after the last of them.
        resident: category -> sizes in bytes of the storages that stay for the whole run.
        load_peak_bytes: most that was alive while it was loaded.
    """

    model: QuantizedModel
    fake_mode: FakeTensorMode
    results: FakeResults
    layers: tuple[nn.Module, ...]
    final_norm: nn.Module
    resident: Mapping[str, tuple[int, ...]]
    load_peak_bytes: int

    @property
    def num_layers(self) -> int:
        return len(self.layers)


def build_dry_model(
    config: PreTrainedConfig,
    *,
    double_quant: bool,
    compute_dtype: torch.dtype,
    device: torch.device,
    alignment_bytes: int,
) -> DryModel:
    """Build the model that `load_quantized` would load.

    Args:
        config: the architecture; of the weights only shapes matter.
        double_quant, compute_dtype: as for the real one.
        device: "cpu", or the Python-only accelerator.
        alignment_bytes: of the device's allocator.

    Raises:
        ConfigError: the architecture cannot be trained (see `find_parts`), or has no norm after its layers.
    """
    skeleton = build_skeleton(config, with_buffers=False)
    _hold_frequencies(skeleton)
    shapes = {name: parameter.shape for name, parameter in skeleton.named_parameters(remove_duplicate=False)}
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    results = FakeResults(fake_mode)
    tracker = StorageTracker(device_type=device.type, alignment_bytes=alignment_bytes, results=results)
    with fake_mode, tracker:
        _materialize_buffers(skeleton, device)
        code = torch.empty(256, device=device) if double_quant else None
        weights = _EmptyWeights(shapes, code=code, device=device)
        model = assemble(skeleton, weights, compute_dtype=compute_dtype, device=device)
        _tag(model, tracker)
    # find_parts has refused models whose layers are none of transformers' own.
    layers = tuple(decoder_layers(model))
    return DryModel(model, fake_mode, results, layers, _final_norm(model), _resident(tracker), tracker.peak_bytes)


def attach_dry_adapters(dry: DryModel, settings: LoraSettings, *, dtype: torch.dtype) -> None:
    """Give the targets adapters without values; to be called under the fake mode."""
    shapes = adapter_shapes(dry.model, settings)
    weights = {name: torch.empty(shape, device=dry.model.device) for name, shape in shapes.items()}
    attach_adapters(dry.model, settings, weights, dtype=dtype)


def dry_store(dry: DryModel) -> InputStore:
    """Where layers' inputs wait: in host memory, which a tracker tells apart; of a CPU, in what stands for a file."""
    device = dry.model.device
    return NoInputs() if device.type == "cpu" else HostInputs(SideStream(device))


def without_replaced(dry: DryModel, settings: LoraSettings) -> DryModel:
    """The same model, of which what is trained of its own weights is counted no more: a run drops the frozen ones.

    A table that two modules share is there as long as one of them is not trained.
    """
    tables = trained_tables.tables_of(dry.model)
    whole = {*settings.modules_to_save, settings.tied_head}
    kept = [table.weight for name, table in tables.items() if name not in whole]
    with dry.fake_mode:
        names = [name.rpartition(".") for name in trained_tables.table_weights(dry.model, settings)]
        trained = [getattr(tables[owner], leaf) for owner, _, leaf in names]
        gone = {id(own): own.nbytes for own in trained if all(own is not other for other in kept)}
        vectors = vector_weights(dry.model, settings)
        sizes = {"embedding": list(gone.values()), "base": [own.nbytes for own in vectors.values()]}
    left = {label: list(dry.resident.get(label, ())) for label in sizes}
    for label, dropped in sizes.items():
        for num_bytes in dropped:
            left[label].remove(num_bytes)
    return replace(dry, resident=dict(dry.resident) | {label: tuple(own) for label, own in left.items()})


@contextmanager
def only_layers(dry: DryModel, indices: Sequence[int]) -> Iterator[list[nn.Module]]:
    """For a while, the model consists of these of its layers."""
    parent, name = owner_of_layers(dry.model.module)
    config: Any = dry.model.module.base_model.config
    all_layers = getattr(parent, name)
    before = {"num_hidden_layers": config.num_hidden_layers, **_per_layer_fields(config, dry.num_layers)}
    chosen = [dry.layers[index] for index in indices]
    try:
        setattr(parent, name, nn.ModuleList(chosen))
        for field, values in before.items():
            setattr(config, field, len(indices) if isinstance(values, int) else [values[index] for index in indices])
        yield chosen
    finally:
        setattr(parent, name, all_layers)
        for field, values in before.items():
            setattr(config, field, values)


def layer_kinds(dry: DryModel) -> list[tuple[str, ...]]:
    """What tells each layer from others: entries of per-layer lists in the config, and the shapes of its linears."""
    fields = _per_layer_fields(dry.model.module.base_model.config, dry.num_layers)
    kinds = []
    for index, layer in enumerate(dry.layers):
        linears = [part for part in layer.modules() if isinstance(part, NF4Linear)]
        shapes = str([(linear.in_features, linear.out_features, linear.adapter is not None) for linear in linears])
        kinds.append((*(str(values[index]) for values in fields.values()), shapes))
    return kinds


def _per_layer_fields(config: Any, num_layers: int) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == num_layers and num_layers > 0
    }


def _final_norm(model: QuantizedModel) -> nn.Module:
    """What comes after the last layer.

    Raises:
        ConfigError: nothing does.
    """
    if model.final_norm is None:
        raise ConfigError(
            where=f"model type {model.module.config.model_type!r}",
            found="no norm after its layers",
            expected="a decoder that ends with a norm, by which a plan knows where the loss begins",
            fix="Choose another base, or report this model type.",
        )
    return model.final_norm


def _hold_frequencies(skeleton: PreTrainedModel) -> None:
    """Leave out what dynamic rotary scaling asks of every batch: is a position beyond the model's own?

    None is (data.seq_len is at most that, see `model.positions`), so its frequencies never change (transformers 5.23,
    `dynamic_rope_update`); and positions that are fake have no value to decide it by.
    """
    for part in skeleton.modules():
        kind: Any = getattr(part, "rope_type", None)
        if isinstance(kind, dict):  # by layer type
            setattr(part, "rope_type", {layer_type: _held(own) for layer_type, own in kind.items()})  # noqa: B010
        elif isinstance(kind, str):
            setattr(part, "rope_type", _held(kind))  # noqa: B010


def _held(rope_type: str) -> str:
    return "default" if "dynamic" in rope_type else rope_type


def _materialize_buffers(skeleton: PreTrainedModel, device: torch.device) -> None:
    """Rotary frequencies and the like: on meta in the skeleton, some of them plain attributes."""
    for part in skeleton.modules():
        made: dict[int, Tensor] = {}
        for name, tensor in [*part.named_buffers(recurse=False), *vars(part).items()]:
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                fresh = made.setdefault(id(tensor), torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
                setattr(part, name, fresh)


def _tag(model: QuantizedModel, tracker: StorageTracker) -> None:
    tracker.tag(model.module.parameters(), "base")
    for linear in model.linears.values():
        tracker.tag((linear.packed, linear.bias), "base")
        tracker.tag((linear.absmax, linear.nested_absmax, linear.offset, linear.code), "quant_state")
    tracker.tag((*tables_of(model), model.head.bias), "embedding")


def _resident(tracker: StorageTracker) -> dict[str, tuple[int, ...]]:
    return {name: tuple(sizes) for name, sizes in tracker.live_sizes().items()}

"""Many adapters over one frozen base, one of them at work.

Costs the bytes of each adapter, held in the dtype it is stored in; a swap sets pointers and copies no weight. Ranks,
variants and targets may differ.

A module takes 3.7 kB beside its weights, which for the 210 linears of SmolLM2 at rank 16 is 8 % of an adapter, plain
tensors 1 kB. So the modules are shared: each linear has one, in which the weights of the active adapter are put.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_trainer.config.adapter_names import BASE, check_adapter_name
from qlora_trainer.config.did_you_mean import closest
from qlora_trainer.errors import ConfigError
from qlora_trainer.model.activated import require_tokens
from qlora_trainer.model.adapter_folder import AdapterFolder
from qlora_trainer.model.adapters import build_adapters, detach_adapters, put_adapters
from qlora_trainer.model.lora_adapter import LoraAdapter
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.model.trained_tables import held_tables, put_tensors, tensors_at
from qlora_trainer.model.trained_vectors import held_vectors, require_trainable_biases

_HELD_AS_STORED = (torch.float32, torch.bfloat16, torch.float16)
_MATRICES = (".lora_A", ".lora_B")


@dataclass(frozen=True, slots=True)
class _Held:
    """One linear's part of an adapter that may be inactive.

    Attributes:
        tensors: its parameters and buffers, by their names in the module.
        scale, dropout: as the module has them.
    """

    tensors: tuple[tuple[str, Tensor], ...]
    scale: float
    dropout: float

    @classmethod
    def of(cls, module: LoraAdapter) -> _Held:
        tensors = (*module.named_parameters(), *module.named_buffers())
        return cls(tuple((name, tensor.data) for name, tensor in tensors), module.scale, module.dropout)

    @property
    def kind(self) -> tuple[str, ...]:
        """What a module must have to hold it."""
        return tuple(name for name, _ in self.tensors)

    def put_into(self, module: LoraAdapter) -> LoraAdapter:
        for name, tensor in self.tensors:
            getattr(module, name).data = tensor
        if (module.scale, module.dropout) != (self.scale, self.dropout):  # to set an attribute of a module takes 5 us
            module.scale, module.dropout = self.scale, self.dropout
        return module


class AdapterSet:
    """Adapters by name; one, or none, is on the model.

    Nobody else may attach adapters to the model while the set is in use.

    Args:
        model: the base. It loses the adapter that it has.
    """

    def __init__(self, model: QuantizedModel) -> None:
        self._model = model
        self._adapters: dict[str, dict[str, _Held]] = {}
        self._modules: dict[tuple[str, tuple[str, ...]], LoraAdapter] = {}  # by linear and kind
        self._in_place: dict[
            str, dict[tuple[str, str], Tensor]
        ] = {}  # tables, norms, biases; by adapter, then module and leaf
        self._replaced: dict[tuple[str, str], Tensor] = {}  # of the base, where an adapter has its own
        self._active: str | None = None
        self._invocation: dict[str, tuple[int, ...]] = {}
        detach_adapters(model)

    @property
    def model(self) -> QuantizedModel:
        """The base, with the adapter that is active."""
        return self._model

    @property
    def names(self) -> tuple[str, ...]:
        """Of all adapters, in the order in which they came."""
        return tuple(self._adapters)

    @property
    def active(self) -> str | None:
        """The adapter on the model; None for the base alone."""
        return self._active

    def add(self, name: str, adapter: AdapterFolder) -> None:
        """Hold another adapter; what is active stays so.

        Args:
            name: what to call it (see `config.adapter_names`).
            adapter: as `read_adapter_folder` returned it for the linears of this base, and of plain LoRA (see
                `model.plain_lora`). Its weights are copied.

        Raises:
            ConfigError: the name cannot be one or is taken; a weight is not finite or no floating-point number; names
                or shapes do not fit the base, of which the first five differences are told. The set is unchanged.
        """
        check_adapter_name(name, taken=self._adapters)
        if adapter.variant is not None:
            raise ConfigError(
                where=f"adapter {name}",
                found=f"weights of a variant: {adapter.variant}",
                expected="plain LoRA",
                fix="Give it to `as_plain_lora` first.",
            )
        try:
            dtype = _stored_dtype(adapter.weights)
            _require_finite(adapter.weights)
            require_trainable_biases(self._model.module, adapter.settings)
            num_rows = self._model.module.config.get_text_config().vocab_size
            require_tokens(adapter.settings.invocation_tokens, num_rows, where="adapter")
            built = build_adapters(self._model, adapter.settings, adapter.weights, dtype=dtype)
        except ConfigError as error:
            raise ConfigError(
                where=f"adapter {name}", found=error.found, expected=error.expected, fix=error.fix
            ) from error
        in_place = held_vectors(self._model, adapter.settings, adapter.weights)
        in_place |= held_tables(self._model, adapter.settings, adapter.weights)
        self._replaced = tensors_at(self._model, in_place) | self._replaced
        held = {linear: _Held.of(module) for linear, module in built.items()}
        for linear, module in built.items():
            self._modules.setdefault((linear, held[linear].kind), module)
        self._adapters[name], self._in_place[name] = held, in_place
        self._invocation[name] = adapter.settings.invocation_tokens

    def activate(self, name: str | None) -> None:
        """Put one adapter on the model in place of the one that is there: 0.8 ms for the 210 linears of SmolLM2-135M.

        Args:
            name: which; None leaves the base alone.

        Raises:
            ConfigError: no adapter of that name; what was active stays so.
        """
        if name is None:
            detach_adapters(self._model)
        elif name in self._adapters:
            held = self._adapters[name]
            put_adapters(
                self._model, {linear: own.put_into(self._modules[linear, own.kind]) for linear, own in held.items()}
            )
        else:
            raise ConfigError(
                where="the name of an adapter",
                found=repr(name[:100]),
                expected=f"one of {', '.join((BASE, *self._adapters))}",
                fix=closest(name, (BASE, *self._adapters)) or "Name one that is there.",
            )
        put_tensors(self._model, self._replaced | self._in_place.get(name or "", {}))
        self._model.of_tokens.work_from(() if name is None else self._invocation[name])
        self._active = name


def _stored_dtype(weights: Mapping[str, Tensor]) -> torch.dtype:
    """What all matrices are stored in; fp32 where they differ, or are of a type that nothing here multiplies."""
    dtypes = {tensor.dtype for name, tensor in weights.items() if name.endswith(_MATRICES)}
    if others := [dtype for dtype in dtypes if not dtype.is_floating_point]:
        raise _unusable(f"weights of {str(others[0]).removeprefix('torch.')}", "floating-point numbers")
    only = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return only if only in _HELD_AS_STORED else torch.float32


def _require_finite(weights: Mapping[str, Tensor]) -> None:
    broken = [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor.float()).all())]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise _unusable(f"weights that are not finite, in {broken[0]}{more}", "finite numbers")


def _unusable(found: str, expected: str) -> ConfigError:
    return ConfigError(where="adapter", found=found, expected=expected, fix="Export it again, or use another one.")

"""What torch's fake kernels answer, remembered: the eighty layers of a model ask the same questions eighty times.

torch keeps answers too, but looking one up costs 0.1 ms, and of operations that are no part of torch itself (unpacking,
attention, norms) and of those with a list of results it keeps none (torch 2.13, `FakeTensorMode._cached_dispatch_impl`
and `_validate_cache_key`). Every operation is still dispatched every time, and each of its results is a tensor with a
storage of its own, or with that of the argument it looks at: only shapes, strides, types and devices are remembered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

# The answer depends on values, or the call changes the form of an argument.
_REFUSED_TAGS = (
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.inplace_view,
    torch.Tag.nondeterministic_seeded,
)
NEW = -1
_UNKNOWN = object()


@dataclass(frozen=True, slots=True)
class _Made:
    """A tensor that an operation returns.

    Attributes:
        place: of the argument that it is, or whose storage it has; `NEW` where its storage is new.
        is_argument: it is that argument itself.
        shape, stride, offset, dtype, device: of any other.
    """

    place: int
    is_argument: bool
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device

    @property
    def is_new(self) -> bool:
        return self.place == NEW


@dataclass(frozen=True, slots=True)
class _Answer:
    """What an operation returns: a list or tuple of these, or one of them alone, or nothing."""

    made: tuple[_Made, ...]
    container: type | None


class _NothingIsKeptError(Exception):
    """Of calls with such an argument."""


class FakeResults(TorchDispatchMode):
    """The answers of one fake mode: entered as a mode inside of it, or asked by a `StorageTracker`.

    Args:
        fake_mode: under which the tensors live.
    """

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake_mode = fake_mode
        self._answers: dict[tuple[Any, ...], object] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No wrapper around every operation: nothing is compiled here."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self.of(func, args, kwargs or {})

    def of(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What `func(*args, **kwargs)` returns."""
        key: list[Any] = [func, torch.get_default_dtype()]
        try:
            self._add_to(key, args)
            if kwargs:
                key += kwargs
                self._add_to(key, kwargs.values())
            known = self._answers.get(tuple(key), _UNKNOWN)
        except (_NothingIsKeptError, TypeError):  # one that has no hash
            return func(*args, **kwargs)
        if isinstance(known, _Answer):
            return self._made_again(known, args)
        out = func(*args, **kwargs)
        if known is _UNKNOWN:
            self._answers[tuple(key)] = self._answer(func, args, kwargs, out, key)
        return out

    def _add_to(self, key: list[Any], values: Iterable[Any]) -> None:
        """Numbers with their types: 1 and 1.0 are equal, and what they make of a tensor is not."""
        for value in values:
            own = type(value)
            if own is FakeTensor:
                if value.fake_mode is not self.fake_mode or value.constant is not None:
                    raise _NothingIsKeptError
                key += (value.dtype, value.shape, value.stride(), value.storage_offset(), value.fake_device)
                key += (value.requires_grad, value.untyped_storage().nbytes())
            elif isinstance(value, Tensor):
                raise _NothingIsKeptError
            elif own is list or own is tuple:
                key += (own, len(value))
                self._add_to(key, value)
            else:
                key += (own, value)

    def _answer(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any, key: list[Any]
    ) -> _Answer | None:
        """What there is to remember; None where it has to be asked each time."""
        container = type(out) if isinstance(out, list | tuple) else None
        results = [] if out is None else [out] if container is None else list(out)
        given = _tensors((*args, *kwargs.values()))
        again: list[Any] = key[:2]
        self._add_to(again, args)
        if (
            any(tag in func.tags for tag in _REFUSED_TAGS)
            or any(isinstance(value, Tensor) for value in kwargs.values())  # `out=`
            or container not in (None, list, tuple)
            or again != key[: len(again)]  # an argument has another form now
        ):
            return None
        made = [self._made(result, args, given) for result in results]
        new_storages = {_storage_of(result) for result, one in zip(results, made, strict=True) if one and one.is_new}
        kept = [one for one in made if one is not None]
        if len(kept) < len(made) or len(new_storages) < sum(one.is_new for one in kept):
            return None
        return _Answer(tuple(kept), container)

    def _made(self, result: Any, args: tuple[Any, ...], given: list[Tensor]) -> _Made | None:
        """How to make a result from other arguments of the same form; None where there is no saying."""
        if type(result) is not FakeTensor or result.fake_mode is not self.fake_mode or result.constant is not None:
            return None
        places = [place for place, value in enumerate(args) if value is result]
        if places:
            return _form(result, place=places[0], is_argument=True)
        if result.requires_grad:
            return None
        sharing = [value for value in given if _storage_of(value) == _storage_of(result)]
        if sharing:
            places = [place for place, value in enumerate(args) if value is sharing[0]]
            return _form(result, place=places[0]) if len(places) == len(sharing) == 1 else None
        made = _form(result, place=NEW)
        is_whole = self._tensor(made, args).untyped_storage().nbytes() == result.untyped_storage().nbytes()
        return made if is_whole else None

    def _made_again(self, answer: _Answer, args: tuple[Any, ...]) -> Any:
        results = [args[one.place] if one.is_argument else self._tensor(one, args) for one in answer.made]
        if answer.container is None:
            return results[0] if results else None
        return results if answer.container is list else tuple(results)

    def _tensor(self, one: _Made, args: tuple[Any, ...]) -> Tensor:
        with no_dispatch():
            meta = torch.empty_strided(one.shape, one.stride, dtype=one.dtype, device="meta")
            if not one.is_new:
                meta.set_(args[one.place].untyped_storage(), one.offset, one.shape, one.stride)
        return FakeTensor(self.fake_mode, meta, one.device)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """All of them, those in lists too."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _form(tensor: FakeTensor, *, place: int, is_argument: bool = False) -> _Made:
    return _Made(
        place=place,
        is_argument=is_argument,
        shape=tuple(tensor.shape),
        stride=tuple(tensor.stride()),
        offset=int(tensor.storage_offset()),
        dtype=tensor.dtype,
        device=tensor.fake_device,
    )


def _storage_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)

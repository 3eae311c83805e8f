"""A base whose packed layers pass through the device: two at a time on a GPU, one on a CPU, the next on its way.

A layer's weights come when they are first asked for, whoever asks: forward, backward, a recomputation, an evaluation.
So nothing is hooked, and autograd keeps layers, never packed tensors: a buffer that was refilled in the meantime is
asked for again (bitsandbytes' own `MatMul4Bit` keeps them, and gives wrong gradients: its issue 2034).

On a GPU the layers wait in pinned host memory, and two buffers on the device hold the one that is used and its
neighbour, in the direction of travel. On a CPU they stay in the mapped NF4 cache: the pages of a layer that was used
are given back, and the next one's are asked for ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from qlora_trainer.hardware.mapped_pages import Span, file_spans, give_back, read_ahead
from qlora_trainer.hardware.side_stream import SideStream
from qlora_trainer.model.activation_policy import decoder_layers
from qlora_trainer.model.linear import NF4Linear
from qlora_trainer.model.quantized import QuantizedModel

# What of a packed weight is large; its offset and code are a few bytes and stay where they are.
PARTS = ("packed", "absmax", "nested_absmax")
NUM_BUFFERS = 2
_ALIGNMENT_BYTES = 256  # of each tensor in a buffer, as CUDA aligns whole allocations


class LayerStream(Protocol):
    """Where the layers' weights are when they are not used."""

    def require(self, index: int) -> None:
        """From now on, until another one is required, the linears of layer `index` can be read."""


@dataclass(frozen=True, slots=True)
class LayerTurn:
    """The turn of a layer of a stream."""

    stream: LayerStream
    index: int

    def take(self) -> None:
        self.stream.require(self.index)


@dataclass(slots=True)
class MappedLayers:
    """Layers in a mapped file: the pages of one at a time are this process's.

    Attributes:
        spans: of each layer.
    """

    spans: Sequence[tuple[Span, ...]]
    _current: int = -1

    def require(self, index: int) -> None:
        if index == self._current:
            return
        before, self._current = self._current, index
        if before >= 0:
            give_back(self.spans[before])
        following = next_layer(before, index, len(self.spans))
        if following is not None:
            read_ahead(self.spans[following])


@dataclass(slots=True)
class BufferedLayers:
    """Layers in host memory that pass through two buffers of the device.

    Attributes:
        layers: the linears of each layer.
        host: each layer's tensors one behind the other, on the host.
        buffers: on the device, each as large as the largest layer.
        stream: on which they are copied.
    """

    layers: Sequence[Sequence[NF4Linear]]
    host: Sequence[Tensor]
    buffers: Sequence[Tensor]
    stream: SideStream
    _held: list[int | None] = field(default_factory=lambda: [None] * NUM_BUFFERS)
    _current: int = -1

    def require(self, index: int) -> None:
        if index == self._current:
            return
        before, self._current = self._current, index
        if index not in self._held:
            self._fetch(index, keep=before)
        self.stream.join()
        following = next_layer(before, index, len(self.layers))
        if following is not None and following not in self._held:
            self._fetch(following, keep=index)

    def _fetch(self, index: int, *, keep: int) -> None:
        """Into the buffer that does not hold `keep`."""
        slot = next(slot for slot, held in enumerate(self._held) if held != keep)
        evicted = self._held[slot]
        if evicted is not None:
            _lay_over(self.layers[evicted], self.host[evicted])
        whole = self.host[index]
        buffer = self.buffers[slot][: whole.numel()]
        self.stream.copy(buffer, whole)
        _lay_over(self.layers[index], buffer)
        self._held[slot] = index


def next_layer(before: int, index: int, num_layers: int) -> int | None:
    """Whose turn is likely next: a forward goes up to the last layer, and a backward from there down to the first."""
    is_down = index == num_layers - 1 or 0 < index < before
    following = index - 1 if is_down else index + 1
    return following if 0 <= following < num_layers else None


def stream_base(model: QuantizedModel, *, is_streamed: bool) -> None:
    """Let the packed layers pass through the device from now on, or stay there all the time.

    Args:
        model: on a CPU, loaded from a cache on disk (`CachedWeights`), whose mapped tensors it still has.
        is_streamed: which of the two.

    Raises:
        ValueError: weights of a model on a CPU are in no mapped file.
    """
    layers = [linears for linears in linears_of_layers(model) if linears]
    _settle(layers)
    device = torch.empty(0, device=model.device).device  # with its number, as tensors have it
    streamed = {id(linear) for linears in layers for linear in linears} if is_streamed else set()
    for linear in model.linears.values():
        for name, tensor in linear.named_buffers(recurse=False):
            is_to_stay = id(linear) not in streamed or name not in PARTS
            if is_to_stay and tensor.device != device:
                setattr(linear, name, tensor.to(model.device))
    if not is_streamed:
        return
    stream: LayerStream
    stream = _mapped(layers) if model.device.type == "cpu" else buffered(layers, model.device)
    for index, linears in enumerate(layers):
        for linear in linears:
            linear.turn = LayerTurn(stream, index)


def linears_of_layers(model: QuantizedModel) -> list[list[NF4Linear]]:
    """The linears of each decoder layer, in model order."""
    return [[part for part in layer.modules() if isinstance(part, NF4Linear)] for layer in decoder_layers(model)]


def buffered(layers: Sequence[Sequence[NF4Linear]], device: torch.device) -> BufferedLayers:
    """Take the weights of these layers, wherever they are, to the host, and make the buffers on `device`."""
    stream = SideStream(device)
    host = []
    for linears in layers:
        whole = stream.host_memory(layer_bytes(linears), torch.uint8)
        for linear, name, first in _places(linears):
            tensor = getattr(linear, name)
            view = _view(whole, first, tensor)
            view.copy_(tensor)
            setattr(linear, name, view)
        host.append(whole)
    largest = max((whole.numel() for whole in host), default=0)
    buffers = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(NUM_BUFFERS)]
    return BufferedLayers(layers, host, buffers, stream)


def layer_bytes(linears: Sequence[NF4Linear]) -> int:
    """What a layer takes of a buffer."""
    *_, (linear, name, first) = _places(linears)
    return first + _aligned(getattr(linear, name).nbytes)


def part_bytes(linears: Sequence[NF4Linear], names: Sequence[str]) -> int:
    """What some of the `PARTS` of a layer take of a buffer."""
    return sum(_aligned(getattr(linear, name).nbytes) for linear, name, _ in _places(linears) if name in names)


def _settle(layers: Sequence[Sequence[NF4Linear]]) -> None:
    """What was streamed through buffers is on the host, all of it."""
    for linears in layers:
        turn = linears[0].turn
        if isinstance(turn, LayerTurn) and isinstance(turn.stream, BufferedLayers):
            _lay_over(linears, turn.stream.host[turn.index])
        for linear in linears:
            linear.turn = None


def _mapped(layers: Sequence[Sequence[NF4Linear]]) -> MappedLayers:
    tensors = [[getattr(linear, name) for linear, name, _ in _places(linears)] for linears in layers]
    spans = [file_spans(own) for own in tensors]
    for own in spans:
        give_back(own)  # what loading has touched
    return MappedLayers(spans)


def _places(linears: Sequence[NF4Linear]) -> list[tuple[NF4Linear, str, int]]:
    """(linear, name of a tensor, its first byte in a buffer) of a layer, in order."""
    found, first = [], 0
    for linear in linears:
        for name in PARTS:
            tensor = getattr(linear, name)
            if tensor is not None:
                found.append((linear, name, first))
                first += _aligned(tensor.nbytes)
    return found


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _view(whole: Tensor, first: int, like: Tensor) -> Tensor:
    return whole[first : first + like.nbytes].view(like.dtype).view(like.shape)


def _lay_over(linears: Sequence[NF4Linear], whole: Tensor) -> None:
    """From now on the weights of a layer are what lies in `whole`."""
    for linear, name, first in _places(linears):
        setattr(linear, name, _view(whole, first, getattr(linear, name)))

"""Streamed layers compute the same bits, from mapped pages and from buffers that are refilled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora_trainer.config.levers import NO_LEVERS, Levers
from qlora_trainer.model.activation_policy import decoder_layers, recompute_layers
from qlora_trainer.model.adapters import attach_new_adapters, trainable_parameters
from qlora_trainer.model.base import Base
from qlora_trainer.model.base_stream import LayerTurn, buffered, linears_of_layers, next_layer
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.nf4_cache import NF4Cache
from qlora_trainer.model.pull_levers import pull_levers
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.step.train_step import accumulate_gradients, evaluate
from tests.hardware.late_stream import LateStream
from tests.model.tiny_bases import small_config
from tests.model.tiny_models import CPU, load_for_training, packed, prepare, tiny_documents

NUM_LAYERS = 4


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Base, NF4Cache]]:
    """A base of each architecture, made once."""

    @cache
    def make(name: str) -> tuple[Base, NF4Cache]:
        folder = tmp_path_factory.mktemp(name)
        config = small_config(name, num_hidden_layers=NUM_LAYERS)
        kinds = getattr(config, "layer_types", None)
        if kinds:
            config.layer_types = [kinds[0], kinds[-1]] * (NUM_LAYERS // 2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
            return prepare(folder / "base", config)

    return make


def adapted(base: Base, cache_: NF4Cache, *, dropout: float = 0.0, dora: bool = False) -> QuantizedModel:
    model = load_for_training(base, cache_)
    settings = LoraSettings(4, 8.0, dropout, tuple(model.linears), use_dora=dora)
    attach_new_adapters(model, settings, dtype=torch.float32, seed=0)
    for name, parameter in trainable_parameters(model).items():  # B is zero at first, and A then has no gradient
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.02, generator=torch.Generator().manual_seed(len(name)))
    return model


def results(model: QuantizedModel) -> list[Tensor]:
    """Loss, gradients, and what an evaluation says before and after."""
    batches = [packed(tiny_documents(40, 24)), packed(tiny_documents(30, seed=1))]
    found = [evaluate(model, batches, loss_chunk_tokens=16)]
    found.append(accumulate_gradients(model, batches, num_supervised_tokens=60, loss_chunk_tokens=16))
    for parameter in trainable_parameters(model).values():
        assert parameter.grad is not None
        found.append(parameter.grad)
        parameter.grad = None
    return [*found, evaluate(model, batches, loss_chunk_tokens=16)]


def buffer(model: QuantizedModel) -> None:
    """As on a GPU: two buffers that are refilled, here of host memory, by copies as late as can be."""
    layers = linears_of_layers(model)
    stream = buffered(layers, CPU)
    stream.stream = LateStream(CPU)
    for index, linears in enumerate(layers):
        for linear in linears:
            linear.turn = LayerTurn(stream, index)


def mapped(model: QuantizedModel) -> None:
    pull_levers(model, Levers(base_residency="streamed"))


def require_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("stream", [buffer, mapped])
@pytest.mark.parametrize(
    "name, num_recomputed, dropout, dora",
    [("llama", 0, 0.1, False), ("llama", 2, 0.0, True), ("gemma2", 4, 0.1, False), ("phi3", 3, 0.0, False)],
)
def test_results_are_the_same_bits(
    name: str,
    num_recomputed: int,
    dropout: float,
    dora: bool,
    stream: Callable[[QuantizedModel], None],
    prepared: Callable[[str], tuple[Base, NF4Cache]],
) -> None:
    """Fails where autograd keeps a packed tensor of a buffer that is refilled (bitsandbytes #2034).

    Mutations tried in buffers: no `join` before a layer is used, and one before its copy is queued.
    """
    model = adapted(*prepared(name), dropout=dropout, dora=dora)
    recompute_layers(model, num_recomputed)
    expected = results(model)
    stream(model)
    require_equal(results(model), expected)
    require_equal(results(model), expected)  # the buffers are in another state now
    pull_levers(model, NO_LEVERS)
    assert all(linear.turn is None for linear in model.linears.values())
    require_equal(results(model), expected)


def test_two_buffers_hold_the_layer_that_is_used_and_the_next(prepared: Callable[[str], tuple[Base, NF4Cache]]) -> None:
    model = adapted(*prepared("llama"))
    layers = linears_of_layers(model)
    whole = [[linear.packed.clone() for linear in linears] for linears in layers]
    stream = buffered(layers, CPU)
    assert len(stream.buffers) == 2
    places = [range(buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes) for buffer in stream.buffers]

    def in_buffers() -> list[int]:
        return [
            index
            for index, linears in enumerate(layers)
            if all(any(linear.packed.data_ptr() in place for place in places) for linear in linears)
        ]

    seen = []
    for index in (0, 1, 2, 3, 2, 1, 0, 1, 3, 0):
        stream.require(index)
        assert index in in_buffers()
        assert all(torch.equal(linear.packed, kept) for linear, kept in zip(layers[index], whole[index], strict=True))
        seen.append(in_buffers())
    assert seen[:7] == [[0, 1], [1, 2], [2, 3], [2, 3], [1, 2], [0, 1], [0, 1]]


def test_what_was_not_asked_for_is_on_the_host_and_cannot_be_taken_for_it(
    prepared: Callable[[str], tuple[Base, NF4Cache]],
) -> None:
    """On a GPU, reading it without asking then fails by its device."""
    model = adapted(*prepared("llama"))
    layers = linears_of_layers(model)
    stream = buffered(layers, CPU)
    stream.require(0)
    host = stream.host[3]
    assert layers[3][0].packed.data_ptr() in range(host.data_ptr(), host.data_ptr() + host.nbytes)


@pytest.mark.parametrize(
    "before, index, following",
    [(-1, 0, 1), (0, 1, 2), (2, 3, 2), (3, 2, 1), (1, 0, 1), (3, 0, 1), (0, 3, 2)],
)
def test_who_comes_next(before: int, index: int, following: int) -> None:
    assert next_layer(before, index, 4) == following


def test_one_layer_has_no_neighbour() -> None:
    assert next_layer(-1, 0, 1) is None


def test_weights_of_no_file_are_refused(tmp_path: Path, prepared: Callable[[str], tuple[Base, NF4Cache]]) -> None:
    """Given back, their pages would come back as zeros."""
    model = adapted(*prepared("llama"))
    linear = next(iter(model.linears.values()))
    linear.packed = torch.cat([linear.packed] * 1000)[: linear.packed.shape[0]].clone()
    with pytest.raises(ValueError, match="no part of a mapped file"):
        pull_levers(model, Levers(base_residency="streamed"))


def _file_bytes() -> int:
    """Of this process's resident memory, what is pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile:"))


def test_on_a_cpu_one_layer_is_resident_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where pages of layers that were used stay this process's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = small_config("llama", num_hidden_layers=6, hidden_size=768, intermediate_size=3072)
    model = adapted(*prepare(tmp_path / "base", config))
    layer_bytes = sum(linear.packed.nbytes + linear.absmax.nbytes for linear in linears_of_layers(model)[0])
    assert layer_bytes > 3 * 2**20
    most: list[int] = []

    def note(_module: object, _args: object, out: Tensor) -> None:
        most.append(_file_bytes())
        if out.requires_grad:
            out.register_hook(lambda _: most.append(_file_bytes()))

    for layer in decoder_layers(model):
        layer.register_forward_hook(note)
    taken = {}
    batch = packed(tiny_documents(40))
    accumulate_gradients(model, [batch], num_supervised_tokens=20, loss_chunk_tokens=16)  # code is pages of files, too
    for is_streamed in (True, False):
        pull_levers(model, Levers(base_residency="streamed"))  # what is resident of the file is given back
        if not is_streamed:
            pull_levers(model, NO_LEVERS)
        most.clear()
        before = _file_bytes()
        accumulate_gradients(model, [batch], num_supervised_tokens=20, loss_chunk_tokens=16)
        assert len(most) >= 11
        taken[is_streamed] = (max(most) - before) / layer_bytes
    assert taken[True] < 1.6
    assert taken[False] > 5

"""A whole run on the accelerator that is Python only: whatever a GPU's run touches is on the GPU, or it raises here.

Load, rehearsal, steps, evaluation, saves, export and a resume: the product's own code, on fake tensors. What a GPU
would answer is made up: a value that is asked for is 1, bytes that are copied to the host are 0. What is the host's is
real: data, base, plan and files.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_trainer.hardware import causal_attention
from qlora_trainer.hardware import device as hardware_device
from qlora_trainer.hardware.paging import zeros_paged
from qlora_trainer.hardware.python_accelerator import NAME, python_accelerator
from qlora_trainer.model import nf4
from qlora_trainer.model.activation_policy import decoder_layers
from qlora_trainer.model.adapters import trainable_parameters
from qlora_trainer.model.nf4_cache import CachedWeights
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.model.tables import tables_of
from qlora_trainer.run import prepare
from qlora_trainer.run.checkpoint import load
from qlora_trainer.run.checkpoint.tensors import read_tensors
from qlora_trainer.run.inputs import read_inputs
from qlora_trainer.run.records import Evaluated, Finished, Prepared, Record, Resumed, Saved, StepDone
from qlora_trainer.step import optimizer as step_optimizer
from qlora_trainer.step.batch import MicroBatch
from qlora_trainer.step.loss import loss_and_gradient
from qlora_trainer.step.loss_scaler import LossScaler
from qlora_trainer.step.optimizer import AdapterOptimizer
from tests.run.tiny_run import run_to_end, run_until_step, tiny_config, write_base

pytestmark = pytest.mark.usefixtures("plans_made_once")

OPTIONS = ("quantization.compute_dtype=bfloat16", "training.max_steps=4", "training.eval_every=2", "lora.dropout=0.1")
_LOSS = loss_and_gradient._opoverload
RECOMPUTED = "memory.activation_checkpointing=true"
# Little to plan and little to do, where it matters what is run and not how often.
BRIEF = (
    "training.global_batch_size=2",
    "training.max_steps=2",
    "training.save_every=1",
    "memory.micro_batch_tokens=128",
    "memory.loss_chunk_tokens=64",
)
EVERYTHING = (
    RECOMPUTED,
    "memory.activation_offload=1",
    "memory.tile_tokens=64",
    "memory.embedding_residency=host",
    "memory.base_residency=streamed",
    "memory.optimizer_residency=host",
    "training.optimizer=adamw_8bit",
    "quantization.head=nf4",
    "lora.use_dora=true",
)
OLD_CARD = (
    "quantization.compute_dtype=auto",
    "training.optimizer=adamw_8bit",
    "lora.modules_to_save=[embed_tokens, lm_head]",
)
DEVICE = python_accelerator()  # before any backward: autograd's engine counts the devices at its first


class Answering(TorchDispatchMode):
    """Says 1 where a fake tensor is asked for its value; what is moved off the host becomes fake.

    Operations that are not torch's must have all their tensors on one device.
    """

    def __init__(self, fakes: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fakes = fakes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return (args[0].dtype == torch.bool or 1) if is_fake(args[0]) else on_host(func)(args[0])
        if func.namespace in ("qlora_trainer", "bitsandbytes"):  # fake kernels of others' operations do not look
            # A projection that is said to be on the host is there; its blocks come inside.
            is_head_on_host = func is _LOSS and len(args) > 9 and args[9]
            own = [args[:2], args[3:], kwargs] if is_head_on_host else [args, kwargs]
            devices = {str(value.device.type) for value in tree_leaves(own) if isinstance(value, Tensor)}
            if is_head_on_host and args[2].device.type != "cpu":
                raise RuntimeError(f"{func}: a projection on {args[2].device.type} that is said to be on the host")
            if len(devices) > 1:
                raise RuntimeError(f"{func}: tensors on more than one device, {' and '.join(sorted(devices))}")
        device = (kwargs or {}).get("device")
        if func is torch.ops.aten._to_copy.default and device is not None and device.type == NAME:
            moved: Any = args[0] if is_fake(args[0]) else self._fakes.from_tensor(args[0])
            moved.constant = None  # else torch moves the number that it was made from, too
            args = (moved,)
        return func(*args, **(kwargs or {}))


def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """What it makes is real."""

    def called(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return called


def generated_on_host(function: Callable[..., Generator[Any, None, Any]]) -> Callable[..., Generator[Any, None, Any]]:
    def called(*args: Any, **kwargs: Any) -> Generator[Any, None, Any]:
        generator = function(*args, **kwargs)
        while True:
            try:
                with unset_fake_temporarily():
                    item = next(generator)
            except StopIteration as end:
                return end.value
            yield item

    return called


def answered_list(tensor: Tensor) -> Any:
    return np.ones(tensor.shape).tolist() if is_fake(tensor) else _TO_LIST(tensor)


def answered_bytes(tensor: Tensor, **options: Any) -> Any:
    """Only what has come to the host has bytes there."""
    if not is_fake(tensor):
        return _TO_NUMPY(tensor, **options)
    assert tensor.device.type == "cpu"
    return np.zeros(tensor.shape, dtype=np.uint8)


_TO_LIST, _TO_NUMPY = Tensor.tolist, Tensor.numpy


@contextmanager
def on_accelerator() -> Iterator[None]:
    """Train there."""
    caches = (nf4.nf4_code, nf4.nested_code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "choose_device", lambda: DEVICE)
        patch.setattr(prepare, "read_inputs", generated_on_host(read_inputs))
        for name in ("fetch_weights", "prepare_nf4_cache"):
            patch.setattr(prepare, name, on_host(getattr(prepare, name)))
        patch.setattr(load, "read_tensors", on_host(read_tensors))
        patch.setattr(CachedWeights, "dense", on_host(CachedWeights.dense))
        patch.setattr(Tensor, "tolist", answered_list)
        patch.setattr(Tensor, "numpy", answered_bytes)
        for cache in caches:
            cache.cache_clear()
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as fakes, Answering(fakes):
                yield
        finally:
            for cache in caches:  # what they hold is fake
                cache.cache_clear()


@pytest.fixture
def known(tmp_path: Path, base: Path) -> tuple[Path, Path]:
    """What is real has been made: tokens, the NF4 cache and the plan."""
    real = tmp_path / "real"
    real.mkdir()
    run_until_step(tiny_config(real, base, *OPTIONS), 1)
    return tmp_path, base


def kinds(records: list[Record]) -> list[str]:
    counted = (StepDone, Evaluated, Saved, Resumed, Finished)
    return [type(record).__name__ for record in records if isinstance(record, counted)]


def test_a_whole_run_and_its_resume_leave_nothing_on_the_wrong_device(known: tuple[Path, Path]) -> None:
    folder, base = known
    with on_accelerator():
        config = tiny_config(folder, base, *OPTIONS)
        records = run_to_end(config)
        assert [record.device for record in records if isinstance(record, Prepared)] == [NAME]
        assert kinds(records)[-1] == "Finished"
        assert (kinds(records).count("StepDone"), kinds(records).count("Evaluated")) == (4, 3)
        stopped = folder / "stopped"
        stopped.mkdir()
        config = tiny_config(stopped, base, *OPTIONS)
        run_until_step(config, 3)
        resumed = kinds(run_to_end(config, resume="auto"))
        assert (resumed[0], resumed[-1], resumed.count("StepDone")) == ("Resumed", "Finished", 2)


@dataclass(slots=True)
class Seen:
    """What rehearsals were given, and the paged buffers that were asked for."""

    models: list[QuantizedModel] = field(default_factory=list)
    optimizers: list[AdapterOptimizer] = field(default_factory=list)
    scalers: list[LossScaler | None] = field(default_factory=list)
    paged: list[torch.device] = field(default_factory=list)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Managed memory is made up: to torch it is the GPU's own."""
    found, rehearse = Seen(), vars(prepare)["rehearse"]

    def rehearsed(
        model: QuantizedModel, optimizer: AdapterOptimizer, scaler: LossScaler | None, *arguments: Any, **options: Any
    ) -> None:
        found.models.append(model)
        found.optimizers.append(optimizer)
        found.scalers.append(scaler)
        rehearse(model, optimizer, scaler, *arguments, **options)

    def managed(num_elements: int, *, dtype: torch.dtype, device: torch.device, folder: Path) -> Tensor:
        if device.type == "cpu":
            return zeros_paged(num_elements, dtype=dtype, device=device, folder=folder)
        found.paged.append(device)
        return torch.zeros(num_elements, dtype=dtype, device=device)

    monkeypatch.setattr(prepare, "rehearse", rehearsed)
    monkeypatch.setattr(step_optimizer, "zeros_paged", managed)
    return found


def devices(tensors: Iterable[Tensor]) -> set[str]:
    return {tensor.device.type for tensor in tensors}


def check_paged_and_offloaded(seen: Seen) -> None:
    model, optimizer = seen.models[-1], seen.optimizers[-1]
    there = [one for one in seen.optimizers if one.gradient.device == optimizer.gradient.device]
    assert len(seen.paged) == len(there) > 0  # in 32 bits all state is one buffer
    assert {device.type for device in seen.paged} == {NAME}
    assert devices(optimizer.state_tensors()) == {NAME}
    assert all(layer._gradient_checkpointing_func is not None for layer in decoder_layers(model))


def check_streamed_and_updated_on_the_host(seen: Seen) -> None:
    model, optimizer = seen.models[-1], seen.optimizers[-1]
    assert all(linear.turn is not None for linear in model.linears.values())
    assert devices(optimizer.state_tensors()) == {"cpu"}
    assert devices([optimizer.gradient, *trainable_parameters(model).values()]) == {NAME}


def check_tables_on_the_host(seen: Seen) -> None:
    model = seen.models[-1]
    assert devices(tables_of(model)) == {"cpu"}
    assert model.head.is_on_host
    assert devices(linear.packed for linear in model.linears.values()) == {NAME}


def check_everything(seen: Seen) -> None:
    """Every lever at once: on the device are two buffers of layers, adapters, and what they share."""
    model, optimizer = seen.models[-1], seen.optimizers[-1]
    check_streamed_and_updated_on_the_host(seen)
    assert all(layer._gradient_checkpointing_func is not None for layer in decoder_layers(model))
    assert model.head.is_on_host
    assert devices([model.head.weight]) == {"cpu"}
    assert model.head.scales is not None
    assert devices([model.head.absmax]) == {NAME}
    assert any(name.endswith("lora_magnitude_vector") for name in trainable_parameters(model))
    assert optimizer.settings.bits == 8


def check_old_card(seen: Seen) -> None:
    """In fp16, with fp32 adapters and a scaler; embedding and head, which are one, are trained."""
    model, optimizer = seen.models[-1], seen.optimizers[-1]
    parameters = trainable_parameters(model)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    assert devices([*parameters.values(), *optimizer.state_tensors(), optimizer.gradient]) == {NAME}
    assert optimizer.settings.bits == 8
    assert model.head.weight.requires_grad
    scaler = seen.scalers[-1]
    assert scaler is not None
    # torch takes a number on the host beside any tensor.
    assert devices([scaler.scale, scaler._num_good_steps]) == {NAME}


@pytest.mark.slow  # 16 s; .ci/run has them, and a run with every lever at once
@pytest.mark.parametrize(
    "levers, check",
    [
        (
            ("training.optimizer=paged_adamw_32bit", RECOMPUTED, "memory.activation_offload=1"),
            check_paged_and_offloaded,
        ),
        (("memory.base_residency=streamed", "memory.optimizer_residency=host"), check_streamed_and_updated_on_the_host),
        (("memory.embedding_residency=host", RECOMPUTED, "memory.tile_tokens=64"), check_tables_on_the_host),
    ],
    ids=["paged, offloaded", "streamed, optimizer on the host", "tables on the host, tiles"],
)
def test_a_run_with_levers_and_its_resume_leave_nothing_on_the_wrong_device(
    levers: tuple[str, ...], check: Callable[[Seen], None], seen: Seen, tmp_path: Path, base: Path
) -> None:
    """A few levers at once, since a run is five seconds; what is on the host is there on purpose."""
    run_and_resume(levers, check, seen, tmp_path, base)


@pytest.mark.slow
def test_a_run_with_every_lever_dora_and_a_head_in_nf4_leaves_nothing_on_the_wrong_device(
    seen: Seen, tmp_path: Path
) -> None:
    """Mutation tried: scales of the head left on the host."""
    untied = write_base(tmp_path / "untied", is_tied=False)
    run_and_resume(EVERYTHING, check_everything, seen, tmp_path, untied)


@pytest.mark.slow
def test_a_run_in_fp16_that_trains_tables_leaves_nothing_on_the_wrong_device(
    seen: Seen, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a card without bf16, with the loss scaler, and an optimizer of 8 bits.

    Mutation tried: a scaler made on the host.
    """
    monkeypatch.setattr(hardware_device, "compute_capability", lambda _device: (7, 5))
    monkeypatch.setattr(causal_attention, "_has_cpu_kernel", lambda _q: False)
    run_and_resume(OLD_CARD, check_old_card, seen, tmp_path, base)


def run_and_resume(
    levers: tuple[str, ...], check: Callable[[Seen], None], seen: Seen, folder: Path, base: Path
) -> None:
    """Two steps, and from the first checkpoint once more the second: nothing is on the wrong device."""
    options = (*OPTIONS, *BRIEF, *levers)
    real = folder / "real"
    real.mkdir()
    run_until_step(tiny_config(real, base, *options), 1)
    with on_accelerator():
        config = tiny_config(folder, base, *options)
        run_until_step(config, 2)
        check(seen)
        resumed = kinds(run_to_end(config, resume="auto"))
        assert (resumed[0], resumed[-1], resumed.count("StepDone")) == ("Resumed", "Finished", 1)
        check(seen)


@pytest.mark.parametrize("name", ["input_ids_BT", "targets_N", "source_positions_N", "row_keys_T"])
def test_a_tensor_that_is_left_on_the_host_raises(
    name: str, known: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = MicroBatch.to

    def forgetful(micro_batch: MicroBatch, device: torch.device, **options: bool) -> MicroBatch:
        return replace(moved(micro_batch, device, **options), **{name: getattr(micro_batch, name)})

    monkeypatch.setattr(MicroBatch, "to", forgetful)
    folder, base = known
    with on_accelerator(), pytest.raises(RuntimeError, match="device"):
        run_to_end(tiny_config(folder, base, *OPTIONS))

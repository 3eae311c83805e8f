"""A tiny real run: planned, prepared and rehearsed as any other, then a step, an evaluation, a save and a resume.

Each phase's allocated peak is measured beside the plan's, and the gradients are handed out, for comparing a run with
one whose plan pulled another lever.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.hardware.device import DTYPES
from qlora_trainer.hardware.paging import is_paged
from qlora_trainer.hardware.phase_meter import PhaseMeter
from qlora_trainer.model.activation_policy import decoder_layers
from qlora_trainer.model.adapters import trainable_parameters
from qlora_trainer.model.nf4_cache import prepare_nf4_cache
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.planning.plan import Plan
from qlora_trainer.run.checkpoint.load import load_checkpoint
from qlora_trainer.run.checkpoint.save import save_checkpoint
from qlora_trainer.run.folder import RunFolder, open_run_folder
from qlora_trainer.run.planned import budget_of
from qlora_trainer.run.prepare import prepare
from qlora_trainer.run.records import Planned, Preparing
from qlora_trainer.run.resume import restore
from qlora_trainer.run.session import Session
from qlora_trainer.step.batch import MicroBatch, make_micro_batch
from qlora_trainer.step.document import Document
from qlora_trainer.step.train_step import accumulate_gradients, evaluate

_LEARNING_RATE = 1e-2  # of the one update: afterwards B is no longer zero, so that A has a gradient
_B_DEVIATION = 1e-2  # about what such an update makes of each B


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run took and computed.

    Attributes:
        phases: phase -> (predicted, measured) allocated peak in bytes.
        gradient: of all adapters after one update, flat, fp32, on the host.
        gradient_of_same: likewise, with matrices B that are every run's.
        noise: relative difference of the same gradient computed twice; not 0 where a device's sums have no fixed order.
        compute_dtype: that was trained in.
    """

    phases: Mapping[str, tuple[int, int]]
    gradient: Tensor
    gradient_of_same: Tensor
    noise: float
    compute_dtype: str


def measure(config: RunConfig, device: torch.device) -> Measured:
    """Run what `config` says, whose base is a Llama, up to a checkpoint of its first step.

    Raises:
        QloraTrainerError: whatever a run may raise.
    """
    meter = PhaseMeter(device)
    with open_run_folder(Path(config.output.dir), resume=False) as folder:
        before_bytes = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        try:
            session, plan = _prepared(config, folder, meter)
            micro_batch = random_micro_batch(session)
            _go_through(session, micro_batch, meter)
        finally:
            meter.stop()
        gradients = [_gradient(session, micro_batch) for _ in range(2)]
        _set_same_b(session)
        gradient_of_same = _gradient(session, micro_batch)
    return Measured(
        phases=_compared(session, plan, meter.peaks, before_bytes),
        gradient=gradients[0],
        gradient_of_same=gradient_of_same,
        noise=relative_difference(gradients[1], gradients[0]),
        compute_dtype=session.knobs.machine.compute_dtype,
    )


def random_micro_batch(session: Session) -> MicroBatch:
    """Full of documents of full length; every token is learned."""
    knobs = session.knobs.plan
    vocabulary = int(session.base.config.vocab_size)
    random = np.random.default_rng(0)
    documents = []
    for index in range(knobs.micro_batch_tokens // knobs.seq_len):
        ids_T = random.integers(2, vocabulary, knobs.seq_len, dtype=np.int32)
        documents.append(Document(index, ids_T, ids_T))
    return make_micro_batch(documents, seed=0, step=0, packing=session.packs)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`."""
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))


def _prepared(config: RunConfig, folder: RunFolder, meter: PhaseMeter) -> tuple[Session, Plan]:
    """The session; what is measured begins when the base is loaded, since until then there is no plan."""
    preparing, plan = prepare(config, folder, resume=None), None
    while True:
        try:
            record = next(preparing)
        except StopIteration as done:
            assert plan is not None
            session: Session = done.value
            return session, plan
        match record:
            case Planned():
                plan = record.plan
            case Preparing() if record.what.startswith("loading"):
                meter.start("load")
            case Preparing() if record.what.startswith("rehearsing"):
                meter.mark("rehearsal")


def _go_through(session: Session, micro_batch: MicroBatch, meter: PhaseMeter) -> None:
    meter.mark("forward")
    with _marking_step(session.model, meter):
        _accumulate(session, micro_batch)
    meter.mark("optimizer")
    norm = session.optimizer.clip_gradients(session.config.training.max_grad_norm)
    session.optimizer.update(_LEARNING_RATE, norm)
    meter.mark("eval")
    evaluate(session.model, [micro_batch], loss_chunk_tokens=session.knobs.plan.loss_chunk)
    meter.mark("save")
    saved = save_checkpoint(
        session.folder.checkpoints_path,
        step=1,
        adapter={name: parameter.data for name, parameter in trainable_parameters(session.model).items()},
        optimizer=session.optimizer.state_dict(),
        state={
            "run_id": session.run_id,
            "samples_seen": 0,
            "best_step": None,
            "loss_scaler": None if session.scaler is None else session.scaler.state_dict(),
        },
        fingerprints={},
        keep_checkpoints=2,
        is_best=False,
    )
    meter.mark("resume")
    restore(load_checkpoint(saved.path), session.optimizer, session.scaler)
    meter.mark("end")


def _set_same_b(session: Session) -> None:
    """Sets each B to numbers that are every run's; of zeros A would have no gradient.

    Adam's first step is as large for a gradient that is rounding alone as for any, so two runs that round otherwise are
    further apart once they have updated than their gradients are.
    """
    random = torch.Generator().manual_seed(0)
    for name, parameter in sorted(trainable_parameters(session.model).items()):
        if name.endswith("lora_B"):
            parameter.data.copy_(_B_DEVIATION * torch.randn(parameter.shape, generator=random))


def _accumulate(session: Session, micro_batch: MicroBatch) -> None:
    scaler = session.scaler
    session.optimizer.zero_gradients()
    accumulate_gradients(
        session.model,
        [micro_batch],
        num_supervised_tokens=micro_batch.num_tokens,
        loss_chunk_tokens=session.knobs.plan.loss_chunk,
        loss_scale=None if scaler is None else scaler.scale,
    )
    if scaler is not None:
        scaler.unscale_(session.optimizer.gradient)


def _gradient(session: Session, micro_batch: MicroBatch) -> Tensor:
    _accumulate(session, micro_batch)
    return session.optimizer.gradient.to("cpu", copy=True)


@contextmanager
def _marking_step(model: QuantizedModel, meter: PhaseMeter) -> Iterator[None]:
    """While active, the loss begins at the last norm, and backward with the gradient of the last layer's output."""

    def watch_gradient(_module: nn.Module, _args: Any, out: Any) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        hidden.register_hook(lambda _: meter.mark("backward"))

    base_model: Any = model.module.base_model
    with ExitStack() as stack:
        stack.callback(decoder_layers(model)[-1].register_forward_hook(watch_gradient).remove)
        stack.callback(base_model.norm.register_forward_pre_hook(lambda *_: meter.mark("loss")).remove)
        yield


def _compared(
    session: Session, plan: Plan, measured: Mapping[str, int], before_bytes: int
) -> dict[str, tuple[int, int]]:
    """Phase -> (predicted, measured).

    Raises:
        RuntimeError: a phase that the plan has was not seen.
    """
    predicted, cpu = dict(plan.predicted.phases), session.device.type == "cpu"
    # When loading is over, adapters and optimizer are there too, but not yet what libraries allocate for products.
    workspace_bytes = budget_of(session.config, session.knobs.machine).memory.workspace_bytes
    resident_bytes = sum(plan.predicted.resident.values()) - workspace_bytes + min(workspace_bytes, before_bytes)
    predicted["load"] = max(predicted["load"], resident_bytes)
    predicted["rehearsal"] = max(predicted.values())
    unseen = sorted(predicted.keys() - measured.keys())
    if unseen:
        raise RuntimeError(f"nothing was measured of {', '.join(unseen)}")
    unread = _unread_bytes(session) + _mapped_state_bytes(session) if cpu else 0
    return {phase: (num_bytes, measured[phase] - unread) for phase, num_bytes in predicted.items()}


def _mapped_state_bytes(session: Session) -> int:
    """Of paged state on a CPU: a mapped file counts as allocated, and is no part of a plan's allocated bytes."""
    return sum(tensor.nbytes for tensor in session.optimizer.state_tensors() if is_paged(tensor))


def _unread_bytes(session: Session) -> int:
    quantization = session.config.quantization
    is_packed = quantization.head == "nf4"
    cache = prepare_nf4_cache(session.base, double_quant=quantization.double_quant, nf4_head=is_packed)
    return unread_bytes(cache.folder, DTYPES[session.knobs.machine.compute_dtype].itemsize)


def unread_bytes(cache: Path, item_bytes: int) -> int:
    """Bytes of the mapped weight files that are no part of the model, from their headers alone.

    Mapping a file counts as allocating all of it: the header, the levels and settings that bitsandbytes stores with
    each weight, and, where it computes in more than 16 bits, norms and biases, which are converted when they are read.
    """
    num_bytes = 0
    for path in cache.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        num_bytes += path.stat().st_size
        for name, entry in header.items():
            is_setting = name.endswith(("quant_map", "quant_state.bitsandbytes__nf4"))
            is_converted = entry["dtype"] == "BF16" and len(entry["shape"]) == 1 and item_bytes > 2
            if not (is_setting or is_converted):
                num_bytes -= entry["data_offsets"][1] - entry["data_offsets"][0]
    return num_bytes

"""From a config to a session: data, base, adapters, optimizer; and, at a resume, their state as it was saved."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch

from qlora_trainer.config.paths import require_on_disk
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.config.strict_json import json_sha256
from qlora_trainer.data.batches import StoredBatches, StreamedBatches
from qlora_trainer.data.order import Order
from qlora_trainer.data.rows import Reading
from qlora_trainer.data.stream import BlockStart
from qlora_trainer.errors import ConfigError
from qlora_trainer.hardware.device import DTYPES, choose_device
from qlora_trainer.hardware.heap import UNASKED_BYTES, keep_freed_blocks, release_free_memory, return_freed_blocks
from qlora_trainer.hardware.input_store import input_store
from qlora_trainer.hardware.memory import OutOfMemoryError, cap_device_memory, forget_peak, memory_errors_as_ours
from qlora_trainer.model.adapter_folder import AdapterFolder
from qlora_trainer.model.adapters import attach_new_adapters, trainable_parameters
from qlora_trainer.model.base import Base, fetch_weights
from qlora_trainer.model.load import load_quantized
from qlora_trainer.model.lora_settings import LoraSettings, asked_settings
from qlora_trainer.model.nf4_cache import prepare_nf4_cache
from qlora_trainer.model.offload import keep_least
from qlora_trainer.model.plain_lora import as_plain_lora
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.model.trained_tables import base_tables_of, updated_tables
from qlora_trainer.model.trained_vectors import biased_modules
from qlora_trainer.planning.plan import Plan, PlanKnobs, is_paged
from qlora_trainer.run.checkpoint.load import Loaded, load_checkpoint
from qlora_trainer.run.checkpoint.storage import check_free_space
from qlora_trainer.run.checkpoint.tensors import lay_out
from qlora_trainer.run.config_changes import PLANNED_KEYS, REFUSED_KEYS, Change
from qlora_trainer.run.continue_from import filled_in, initial_hash, initial_told, read_initial
from qlora_trainer.run.folder import RunFolder
from qlora_trainer.run.inputs import Data, Inputs, read_inputs
from qlora_trainer.run.invocations import invocations_told
from qlora_trainer.run.knobs import (
    Knobs,
    MachineKnobs,
    decide_knobs,
    decide_machine_knobs,
    knobs_of,
    machine_knobs_of,
    with_values,
)
from qlora_trainer.run.planned import budget_of, halved_or_refused, plan_run, require_fit
from qlora_trainer.run.records import Planned, PlanRevised, Preparing, RowsSkipped
from qlora_trainer.run.rehearsal import rehearse
from qlora_trainer.run.resume import (
    continued_config,
    find_checkpoint,
    require_same_order,
    restore,
    rewind,
    version_notes,
    with_best,
)
from qlora_trainer.run.session import Session, packs
from qlora_trainer.step.loss_scaler import LossScaler
from qlora_trainer.step.optimizer import AdapterOptimizer, OptimizerSettings


def prepare(
    config: RunConfig, folder: RunFolder, *, resume: str | None, allow_change: Collection[str] = ()
) -> Generator[Preparing | Reading | RowsSkipped | Planned | PlanRevised, None, Session]:
    """Yield what is being done, and return the session.

    What can be wrong is looked at in the order of its cost: data and tokenizer before weights.

    Args:
        config: validated, its paths checked.
        folder: the run's folder, locked.
        resume: "auto", the path of a checkpoint of this run, or None for a new run.
        allow_change: keys that may differ from the run that is resumed (see `run.config_changes`).

    Raises:
        QloraTrainerError: see the rooms that are called.
    """
    device = choose_device()
    return_freed_blocks()
    config = filled_in(config)
    loaded, notes = (None, ()) if resume is None else _saved_before(folder, resume)
    changes: tuple[Change, ...] = ()
    if loaded is not None:
        require_same_order(loaded)
        config, changes = continued_config(config, loaded, allow_change)
    machine = _settled_machine(config, device, loaded)
    paging_folder = _paging_folder(config, folder, device)

    yield Preparing(what=f"finding the base {config.model.base}, tokenising the data")
    inputs = yield from read_inputs(config)
    data = inputs.data
    yield from chain(data.told, invocations_told(config, inputs))
    batches = _batches(config, data, loaded)
    yield Preparing(what="planning the memory")
    knobs, plan = _decide(config, inputs, machine, batches.num_steps, loaded, changes)
    initial = read_initial(config, inputs.base, knobs.plan.rank)
    yield from initial_told(config, initial)
    if plan is not None:
        yield Planned(plan=plan)
    yield Preparing(what="quantizing the base to NF4 (once; the result is kept)")
    base, initial = yield from _fetched(inputs.base, None if loaded is not None else initial)
    quantization = config.quantization
    cache = prepare_nf4_cache(base, double_quant=quantization.double_quant, nf4_head=quantization.head == "nf4")
    yield from (Preparing(what=f"the cached NF4 base was damaged and is made again: {why}") for why in cache.defects)
    fingerprints = {"base": cache.key, "tokenizer": inputs.tokenizer_hash, **data.hashes, **initial_hash(config)}
    if loaded is not None:
        require_same_inputs(fingerprints, loaded)

    yield Preparing(what="loading the NF4 base")
    dtype = DTYPES[machine.compute_dtype]
    model = load_quantized(base, cache, compute_dtype=dtype, device=device, levers=knobs.plan.levers)
    lora = _lora_settings(config, model, knobs)
    attach_new_adapters(model, lora, dtype=DTYPES[machine.adapter_dtype], seed=config.training.seed)
    _keep_least(model, knobs.plan, device, paging_folder)
    model.module.train()
    optimizer, scaler = _optimizer_and_scaler(config, model, knobs, paging_folder)
    release_free_memory()
    preparing_peak_bytes = forget_peak(device)
    if device.type == "cpu":
        keep_freed_blocks()
        model.resident_limit.limit_bytes = knobs.predicted_peak_bytes - UNASKED_BYTES
    _require_disk_space(folder, model, optimizer)
    yield Preparing(what="rehearsing the largest step")
    knobs = yield from _rehearse(config, model, optimizer, scaler, lora, knobs, packing=packs(config, base))
    _set_state(model, optimizer, scaler, loaded, initial)
    if resume is not None:
        rewind(folder, loaded)
    asked = config.model_dump(mode="json")
    return Session(
        run_id=loaded.state["run_id"] if loaded else uuid.uuid4().hex,
        config=config,
        asked=asked,
        changes=changes,
        notes=notes,
        folder=folder,
        device=device,
        base=base,
        tokenizer=inputs.tokenizer,
        model=model,
        lora=lora,
        optimizer=optimizer,
        scaler=scaler,
        knobs=knobs,
        knobs_at_start=knobs,
        plan=plan,
        train_data=data.train,
        eval_data=data.evaluation,
        batches=batches,
        questions=data.questions,
        fingerprints=fingerprints | {"config": json_sha256(asked)},  # written, not compared: the keys are
        resumed=loaded,
        preparing_peak_bytes=preparing_peak_bytes,
    )


def _fetched(
    base: Base, initial: AdapterFolder | None
) -> Generator[Preparing, None, tuple[Base, AdapterFolder | None]]:
    """The base with its weights, and the adapter to begin with as plain LoRA on it."""
    base = fetch_weights(base)
    if initial is None or initial.variant is None:
        return base, initial
    if initial.variant.parts:
        yield Preparing(what=f"finding in the base what {' and '.join(initial.variant.parts)} has taken from it")
    return base, as_plain_lora(initial, base.folder)


def _settled_machine(config: RunConfig, device: torch.device, loaded: Loaded | None) -> MachineKnobs:
    """What this process computes with from now on: as the run began, if it is resumed."""
    machine = machine_knobs_of(loaded.state["plan"]) if loaded else decide_machine_knobs(config, device)
    torch.set_num_threads(machine.num_threads)
    if device.type == "cuda":  # a CPU has no cap of this kind; there the plan alone keeps a run within its budget
        cap_device_memory(device, budget_of(config, machine).budget_bytes)
    return machine


def _keep_least(model: QuantizedModel, plan: PlanKnobs, device: torch.device, paging_folder: Path) -> None:
    keep_least(model, plan.num_recomputed, plan.activation_offload_layers, input_store(device, paging_folder))


def _saved_before(folder: RunFolder, resume: str) -> tuple[Loaded | None, tuple[str, ...]]:
    """The checkpoint to go on from, and what the user must know of it.

    Its tensors are let go of: they map its files, which are opened again once the state is set back.
    """
    loaded = find_checkpoint(folder, resume)
    if loaded is None:
        return None, ()
    loaded, notes = with_best(folder, loaded)
    return replace(loaded, adapter={}, optimizer={}), (*notes, *version_notes(loaded))


def require_same_inputs(fingerprints: Mapping[str, str], loaded: Loaded) -> None:
    """Refuse to go on with another base, tokenizer or data than the run began with.

    Raises:
        ConfigError: names all that changed, each with the start of its old and its new hash.
    """
    before = {name: loaded.fingerprints.get(name, "none") for name in fingerprints}
    changed = [name for name in fingerprints if fingerprints[name] != before[name]]
    if changed:
        hashes = ", ".join(f"{name} {before[name][:12]} -> {fingerprints[name][:12]}" for name in changed)
        raise ConfigError(
            where=str(loaded.path),
            found=f"another {' and another '.join(changed)} than this run began with (sha256: {hashes})",
            expected="the same content",
            fix="Restore it, or start a new run in another folder.",
        )


def _set_state(
    model: QuantizedModel,
    optimizer: AdapterOptimizer,
    scaler: LossScaler | None,
    loaded: Loaded | None,
    initial: AdapterFolder | None,
) -> None:
    """What is trained on from here: a checkpoint's state, an adapter's weights, or the new adapter that is there."""
    release_free_memory()  # that of the rehearsal: files are read without asking for room
    if loaded is not None:
        restore(load_checkpoint(loaded.path), optimizer, scaler)
    elif initial is not None:
        optimizer.reset(initial.weights | updated_tables(model, initial))


def _paging_folder(config: RunConfig, folder: RunFolder, device: torch.device) -> Path:
    """Where a paged optimizer's files lie on a CPU.

    Raises:
        StorageError: it is no folder on a disk.
    """
    paging_folder = Path(config.memory.paging_dir) if config.memory.paging_dir else folder.path
    if is_paged(config.training.optimizer) and device.type == "cpu":
        require_on_disk(paging_folder)
    return paging_folder


def _require_disk_space(folder: RunFolder, model: QuantizedModel, optimizer: AdapterOptimizer) -> None:
    """Refuse a run whose first checkpoint would not fit on the disk.

    Raises:
        StorageError: names the bytes needed and free.
    """
    weights = {name: parameter.data for name, parameter in trainable_parameters(model).items()}
    num_bytes = sum(lay_out(tensors).num_bytes for tensors in (weights, optimizer.state_dict()))
    check_free_space(folder.checkpoints_path, num_bytes)


def _lora_settings(config: RunConfig, model: QuantizedModel, knobs: Knobs) -> LoraSettings:
    linears, tables = list(model.linears), base_tables_of(model)
    return asked_settings(config.lora, knobs.plan.rank, linears, tables, biased=biased_modules(model))


def _batches(config: RunConfig, data: Data, loaded: Loaded | None) -> StoredBatches | StreamedBatches:
    training = config.training
    if data.stream is not None:
        assert training.max_steps is not None  # the schema asks for it
        return StreamedBatches(
            data.stream,
            seq_len=data.seq_len,
            global_batch_size=training.global_batch_size,
            seed=training.seed,
            num_steps=training.max_steps,
            start=BlockStart.of(loaded.state["stream"]) if loaded else None,
        )
    return StoredBatches(data.train.documents, Order.of(training, len(data.train.documents)))


def _decide(
    config: RunConfig,
    inputs: Inputs,
    machine: MachineKnobs,
    num_steps: int,
    loaded: Loaded | None,
    changes: Sequence[Change],
) -> tuple[Knobs, Plan | None]:
    """Knobs, and the plan they are from; a resumed run keeps what it began with, unless its memory was changed."""
    if loaded is not None:
        began_with = knobs_of(loaded.state["plan"])
        if not any(change.key in PLANNED_KEYS for change in changes):
            knobs = decide_knobs(
                config,
                machine,
                began_with.plan,
                predicted_peak_bytes=began_with.predicted_peak_bytes,
                breakdown=began_with.breakdown,
                num_steps=num_steps,
            )
            return knobs, None
        # What the saved state is the state of is not planned anew: another budget could choose another rank.
        config = with_values(
            config, {key: began_with.resolved()[key] for key in REFUSED_KEYS & began_with.resolved().keys()}
        )
    plan = require_fit(plan_run(config, inputs, machine), config)
    is_cpu = choose_device().type == "cpu"
    predicted_bytes = plan.predicted.process_peak_bytes if is_cpu else plan.predicted.allocated_peak_bytes
    knobs = decide_knobs(
        config,
        machine,
        plan.knobs,
        predicted_peak_bytes=predicted_bytes,
        breakdown=plan.predicted.breakdown,
        num_steps=num_steps,
    )
    return knobs, plan


def _rehearse(
    config: RunConfig,
    model: QuantizedModel,
    optimizer: AdapterOptimizer,
    scaler: LossScaler | None,
    lora: LoraSettings,
    knobs: Knobs,
    *,
    packing: bool,
) -> Generator[PlanRevised, None, Knobs]:
    """Halve the micro-batch until the rehearsal fits.

    Raises:
        DoesNotFitError: not even one document does.
    """
    while True:
        with suppress(OutOfMemoryError), memory_errors_as_ours():
            rehearse(
                model,
                optimizer,
                scaler,
                lora,
                knobs.plan,
                packing=packing,
                max_grad_norm=config.training.max_grad_norm,
                seed=config.training.seed,
            )
            return knobs
        revised = halved_or_refused(knobs, config.training.global_batch_size, where="the rehearsal")
        yield PlanRevised(
            step=0,
            phase="rehearsal",
            micro_batch_tokens_before=knobs.plan.micro_batch_tokens,
            micro_batch_tokens=revised.plan.micro_batch_tokens,
        )
        knobs = revised


def _optimizer_and_scaler(
    config: RunConfig, model: QuantizedModel, knobs: Knobs, paging_folder: Path
) -> tuple[AdapterOptimizer, LossScaler | None]:
    settings = OptimizerSettings(
        bits=knobs.plan.optimizer_bits,
        residency=knobs.plan.optimizer_residency,
        weight_decay=config.training.weight_decay,
        paging_folder=paging_folder,
        rate_ratio=config.training.loraplus_lr_ratio,
    )
    scaler = LossScaler(model.device) if knobs.machine.compute_dtype == "float16" else None
    return AdapterOptimizer(trainable_parameters(model), settings), scaler

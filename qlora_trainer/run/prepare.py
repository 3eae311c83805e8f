"""From a config to a session: data, base, adapters, optimizer; and, at a resume, their state as it was saved."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.chat import TokenizedData, choose_seq_len, drop_overlong, require_chat_template, tokenize
from qlora_trainer.data.order import Order
from qlora_trainer.data.rows import Row, read_rows
from qlora_trainer.data.split import hold_out
from qlora_trainer.errors import ConfigError
from qlora_trainer.hardware.device import DTYPES, choose_device
from qlora_trainer.hardware.memory import cap_device_memory
from qlora_trainer.hardware.paging import require_on_disk
from qlora_trainer.model.activation_policy import decoder_layers, recompute_layers
from qlora_trainer.model.adapters import LoraSettings, attach_new_adapters, select_targets, trainable_parameters
from qlora_trainer.model.base import Base, read_tokenizer, resolve_base
from qlora_trainer.model.load import load_quantized
from qlora_trainer.model.nf4_cache import prepare_nf4_cache
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.model.sealed_folder import sha256_of
from qlora_trainer.run.checkpoint.load import Loaded
from qlora_trainer.run.folder import RunFolder
from qlora_trainer.run.knobs import MachineKnobs, decide_knobs, decide_machine_knobs, machine_knobs_from_plan
from qlora_trainer.run.records import Preparing
from qlora_trainer.run.resume import find_checkpoint, require_same_run, restore, rewind
from qlora_trainer.run.session import Question, Session
from qlora_trainer.step.optimizer import AdapterOptimizer, OptimizerSettings


@dataclass(frozen=True, slots=True)
class _Data:
    train: TokenizedData
    evaluation: TokenizedData
    questions: tuple[Question, ...]
    seq_len: int
    hashes: Mapping[str, str]


def prepare(config: RunConfig, folder: RunFolder, *, resume: str | None) -> Generator[Preparing, None, Session]:
    """Yield what is being done, and return the session.

    What can be wrong is looked at in the order of its cost: data and tokenizer before weights.

    Args:
        config: validated, its paths checked.
        folder: the run's folder, locked.
        resume: "auto", the path of a checkpoint of this run, or None for a new run.

    Raises:
        QloraTrainerError: see the rooms that are called.
    """
    device = choose_device()
    asked = config.model_dump(mode="json")
    loaded = None if resume is None else find_checkpoint(folder, resume)
    if loaded is not None:
        require_same_run(asked, loaded)
    machine = machine_knobs_from_plan(loaded.state["plan"]) if loaded else decide_machine_knobs(config, device)
    torch.set_num_threads(machine.num_threads)
    cap_device_memory(device, None if config.memory.budget == "auto" else config.memory.budget)
    paging_folder = Path(config.memory.paging_dir) if config.memory.paging_dir else folder.path
    if machine.optimizer_residency == "paged" and device.type == "cpu":
        require_on_disk(paging_folder)

    yield Preparing(what=f"finding the base {config.model.base}")
    base = resolve_base(config.model.base, config.model.revision)
    tokenizer = read_tokenizer(base.folder)
    require_chat_template(tokenizer, str(base.folder))
    yield Preparing(what="tokenising the data")
    data = _read_data(config, base, tokenizer)
    yield Preparing(what="quantizing the base to NF4 (once; the result is kept)")
    cache = prepare_nf4_cache(base, double_quant=config.quantization.double_quant)
    yield from (Preparing(what=f"the cached NF4 base was damaged and is made again: {why}") for why in cache.defects)
    fingerprints = {"base": cache.key, "tokenizer": _tokenizer_hash(base.folder), **data.hashes}
    if loaded is not None:
        require_same_inputs(fingerprints, loaded)

    yield Preparing(what="loading the NF4 base")
    model = load_quantized(base, cache, compute_dtype=DTYPES[machine.compute_dtype], device=device)
    lora = _lora_settings(config, model)
    attach_new_adapters(model, lora, dtype=DTYPES[config.lora.dtype], seed=config.training.seed)
    order = Order(
        num_documents=len(data.train.documents),
        global_batch_size=config.training.global_batch_size,
        seed=config.training.seed,
        epochs=config.training.epochs,
        max_steps=config.training.max_steps,
    )
    knobs = decide_knobs(
        config,
        machine,
        seq_len=data.seq_len,
        num_steps=order.num_steps,
        num_layers=len(decoder_layers(model)),
        vocabulary_size=model.head.out_features,
    )
    recompute_layers(model, knobs.recompute_layers)
    model.module.train()
    optimizer = AdapterOptimizer(trainable_parameters(model), _optimizer_settings(config, machine, paging_folder))
    if loaded is not None:
        restore(loaded, optimizer)
    if resume is not None:
        rewind(folder, loaded)
    return Session(
        run_id=loaded.state["run_id"] if loaded else uuid.uuid4().hex,
        config=config,
        asked=asked,
        folder=folder,
        device=device,
        base=base,
        tokenizer=tokenizer,
        model=model,
        lora=lora,
        optimizer=optimizer,
        knobs=knobs,
        train_data=data.train,
        eval_data=data.evaluation,
        order=order,
        questions=data.questions,
        fingerprints=fingerprints,
        resumed=loaded,
    )


def require_same_inputs(fingerprints: Mapping[str, str], loaded: Loaded) -> None:
    """Refuse to go on with another base, tokenizer or data than the run began with.

    Raises:
        ConfigError: names what changed.
    """
    changed = [name for name in fingerprints if fingerprints[name] != loaded.fingerprints.get(name)]
    if changed:
        raise ConfigError(
            where=str(loaded.path),
            found=f"another {changed[0]} than this run began with (its content has changed)",
            expected="the same content",
            fix="Restore it, or start a new run in another folder.",
        )


def _read_data(config: RunConfig, base: Base, tokenizer: PreTrainedTokenizerBase) -> _Data:
    train_path = Path(config.data.train)
    hashes = {"training data": sha256_of(train_path)}
    rows: Sequence[Row] = read_rows(train_path)
    if config.data.eval is not None:
        eval_rows: Sequence[Row] = read_rows(Path(config.data.eval))
        hashes["evaluation data"] = sha256_of(Path(config.data.eval))
    else:
        rows, eval_rows = hold_out(rows, config.data.eval_fraction, config.training.seed)
    train_data = tokenize(rows, tokenizer, seq_len=None)
    eval_data = tokenize(eval_rows, tokenizer, seq_len=None)
    max_positions = getattr(base.config, "max_position_embeddings", None) or max(train_data.lengths)
    seq_len = config.data.seq_len
    if seq_len == "auto":
        seq_len = choose_seq_len(train_data.lengths, max_positions)
    elif seq_len > max_positions:
        raise ConfigError(
            where="data.seq_len",
            found=f"{seq_len} tokens",
            expected=f"at most {max_positions}, the positions of {base.name}",
            fix="Lower data.seq_len, or choose a base with a longer context.",
        )
    num_questions = min(config.output.sample_questions, len(eval_rows))
    return _Data(
        train=drop_overlong(train_data, seq_len),
        evaluation=drop_overlong(eval_data, seq_len) if eval_rows else eval_data,
        # Spread over the held-out rows: neighbours in a file are often about the same thing.
        questions=tuple(_question(eval_rows[i * len(eval_rows) // num_questions]) for i in range(num_questions)),
        seq_len=seq_len,
        hashes=hashes,
    )


def _question(row: Row) -> Question:
    last = max(index for index, message in enumerate(row.messages) if message.role == "assistant")
    return Question(messages=row.messages[:last], reference=row.messages[last].content)


def _lora_settings(config: RunConfig, model: QuantizedModel) -> LoraSettings:
    return LoraSettings(
        rank=config.lora.rank,
        alpha=config.lora.lora_alpha,
        dropout=config.lora.dropout,
        targets=select_targets(list(model.linears), config.lora.target_modules),
    )


def _optimizer_settings(config: RunConfig, machine: MachineKnobs, paging_folder: Path) -> OptimizerSettings:
    return OptimizerSettings(
        bits=machine.optimizer_bits,
        residency=machine.optimizer_residency,
        weight_decay=config.training.weight_decay,
        paging_folder=paging_folder,
    )


def _tokenizer_hash(folder: Path) -> str:
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
    digest = hashlib.sha256()
    for name in names:
        path = folder / name
        digest.update(f"{name}:{sha256_of(path) if path.is_file() else None}\n".encode())
    return digest.hexdigest()

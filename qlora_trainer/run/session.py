"""Everything one run works on, and how far it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.batches import StoredBatches, StreamedBatches
from qlora_trainer.data.rows import Message
from qlora_trainer.data.tokenized import TokenizedData
from qlora_trainer.model.base import Base
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.planning.plan import Plan
from qlora_trainer.run.checkpoint.load import Loaded
from qlora_trainer.run.config_changes import Change
from qlora_trainer.run.folder import RunFolder
from qlora_trainer.run.knobs import Knobs
from qlora_trainer.step.loss_scaler import LossScaler
from qlora_trainer.step.optimizer import AdapterOptimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run is; what a checkpoint's `state.json` holds beside the plan.

    Attributes:
        step: optimizer steps done.
        tokens, supervised_tokens: trained on so far.
        train_seconds: wall time of the steps so far.
        eval_loss_before: held-out loss before the first step.
        best_eval_loss, best_step: of the evaluations after the first step.
        evals_without_better: evaluations since the best one.
        evaluated_step: the step of the last evaluation; -1 for none.
        skipped_in_a_row: last steps whose loss or gradients were not finite, and that changed no weight; those whose
            gradients were too large for fp16 at the scale of the loss are not counted.
    """

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    train_seconds: float = 0.0
    eval_loss_before: float | None = None
    best_eval_loss: float | None = None
    best_step: int = 0
    evals_without_better: int = 0
    evaluated_step: int = -1
    skipped_in_a_row: int = 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A held-out conversation up to the assistant's last answer, and that answer."""

    messages: tuple[Message, ...]
    reference: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One run, prepared: nothing of it changes but the adapters, the optimizer and the files.

    Attributes:
        run_id: names this run in its checkpoints.
        asked: the config as the user gave it, as JSON; a resume that asks otherwise is refused, or says so.
        changes: what this resume asks otherwise than the run was asked before.
        notes: what else is not as it was when the run was interrupted.
        fingerprints: hashes of base, tokenizer, data and config; the config is compared by key, not by its hash.
        scaler: of the loss, where fp16 is computed in.
        knobs: in force; revised when memory runs out.
        knobs_at_start: before this process's first step, as `config.yaml` shows them.
        plan: what the knobs were decided by; None where a resumed run keeps the knobs it began with.
        train_data: all that is trained on; of a stream the first block.
        eval_data: all that is held out.
        batches: the documents of each step.
        questions: held-out ones, answered before and after.
        resumed: the checkpoint the run goes on from, or None.
        preparing_peak_bytes: most resident memory until the base was loaded.
    """

    run_id: str
    config: RunConfig
    asked: Mapping[str, Any]
    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    folder: RunFolder
    device: torch.device
    base: Base
    tokenizer: PreTrainedTokenizerBase
    model: QuantizedModel
    lora: LoraSettings
    optimizer: AdapterOptimizer
    scaler: LossScaler | None
    knobs: Knobs
    knobs_at_start: Knobs
    plan: Plan | None
    train_data: TokenizedData
    eval_data: TokenizedData
    batches: StoredBatches | StreamedBatches
    questions: tuple[Question, ...]
    fingerprints: Mapping[str, str]
    resumed: Loaded | None
    preparing_peak_bytes: int

    @property
    def packs(self) -> bool:
        """Whether documents share rows."""
        return packs(self.config, self.base)


def packs(config: RunConfig, base: Base) -> bool:
    """Whether documents share rows: asked for, and of a base that keeps them apart."""
    return config.data.packing and base.can_pack

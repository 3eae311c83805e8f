"""The end of a run: its adapter as a PEFT folder, and what it took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.hardware.memory import process_peak_bytes, read_memory
from qlora_trainer.model.adapters import trainable_parameters
from qlora_trainer.run.checkpoint.listing import step_name
from qlora_trainer.run.checkpoint.load import load_checkpoint
from qlora_trainer.run.checkpoint.manifest import package_versions
from qlora_trainer.run.export import export_adapter
from qlora_trainer.run.folder import write_summary
from qlora_trainer.run.knobs import with_values
from qlora_trainer.run.records import Finished, Status, Summary
from qlora_trainer.run.session import Progress, Session


def finish(session: Session, progress: Progress, *, status: Status) -> Finished:
    """Write the summary and, unless the run was interrupted, the adapter: the best by held-out loss, else the last."""
    adapter_path = None
    if status != "interrupted":
        adapter_path = session.folder.adapter_path
        export_adapter(
            adapter_path,
            _final_weights(session, progress),
            session.lora,
            linear_names=list(session.model.linears),
            base_name=session.base.name,
            revision=session.base.revision,
            chat_template=None if session.config.data.chat_template is None else session.tokenizer.get_chat_template(),
        )
    is_cuda = session.device.type == "cuda"
    summary = Summary(
        status=status,
        steps=progress.step,
        tokens=progress.tokens,
        supervised_tokens=progress.supervised_tokens,
        train_seconds=progress.train_seconds,
        tokens_per_second=progress.tokens / progress.train_seconds if progress.train_seconds else 0.0,
        eval_loss_before=progress.eval_loss_before,
        eval_loss_after=None if adapter_path is None else progress.best_eval_loss,
        predicted_peak_bytes=session.knobs.predicted_peak_bytes,
        measured_peak_bytes=read_memory(session.device).peak_bytes,
        process_peak_bytes=max(session.preparing_peak_bytes, process_peak_bytes()),
        device=torch.cuda.get_device_name(session.device) if is_cuda else "cpu",
        versions=package_versions(),
    )
    write_summary(session.folder, summary)
    return Finished(status=status, summary=summary, run_path=session.folder.path, adapter_path=adapter_path)


def resolved_config(session: Session) -> RunConfig:
    """The config with every `auto` replaced by what was decided, as `config.yaml` shows it."""
    return with_values(session.config, session.knobs.resolved())


def plan_json(session: Session) -> dict[str, Any]:
    """What `plan.json` holds: the plan where it was made, and the knobs in force."""
    made = {} if session.plan is None else session.plan.as_json()
    quantization = session.config.quantization
    form = {"double_quant": quantization.double_quant, "head": quantization.head}
    return made | {"in_force": session.knobs.as_json()} | form


def _final_weights(session: Session, progress: Progress) -> Mapping[str, Tensor]:
    if progress.best_eval_loss is None or progress.best_step == progress.step:
        return {name: parameter.data for name, parameter in trainable_parameters(session.model).items()}
    return load_checkpoint(session.folder.checkpoints_path / step_name(progress.best_step)).adapter

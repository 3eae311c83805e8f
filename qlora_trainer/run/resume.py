"""Going on from a checkpoint: which one, whether it is of the same run, and its state back in place."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, replace
from typing import Any

from pydantic import ValidationError

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.order import ORDER_VERSION, began_with_order
from qlora_trainer.errors import StorageError
from qlora_trainer.run.checkpoint.listing import linked_step, step_name
from qlora_trainer.run.checkpoint.load import Loaded, load_checkpoint, newest_verified
from qlora_trainer.run.checkpoint.manifest import package_versions, verify
from qlora_trainer.run.checkpoint.rotate import discard_after, relink
from qlora_trainer.run.config_changes import Change, changes_between, merged, require_allowed
from qlora_trainer.run.folder import RunFolder, cut_logs, named_checkpoint
from qlora_trainer.run.knobs import knobs_of
from qlora_trainer.run.session import Progress
from qlora_trainer.step.loss_scaler import LossScaler
from qlora_trainer.step.optimizer import AdapterOptimizer


def find_checkpoint(folder: RunFolder, resume: str) -> Loaded | None:
    """The checkpoint to go on from, loaded; nothing is changed yet.

    Args:
        folder: the run's folder.
        resume: "auto" for the newest whole checkpoint, or the path of one of this run's.

    Returns:
        None where the run has saved nothing yet, so that it begins at its first step.

    Raises:
        ConfigError: the path is not a checkpoint of this run.
        StorageError: none of the checkpoints is whole.
    """
    path = named_checkpoint(folder, resume)
    loaded = newest_verified(folder.checkpoints_path) if path is None else load_checkpoint(path)
    return None if loaded is None else _with_adapter_dtype(loaded)


def _with_adapter_dtype(loaded: Loaded) -> Loaded:
    """A checkpoint from when `lora.dtype` could not be `auto` has it in its config only."""
    plans: dict[str, Any] = {name: loaded.state[name] for name in ("plan", "plan_at_start") if name in loaded.state}
    dtype = {"adapter_dtype": loaded.state["config"]["lora"]["dtype"]}
    told = {name: {**plan, "machine": {**dtype, **plan["machine"]}} for name, plan in plans.items()}
    return replace(loaded, state={**loaded.state, **told})


def with_best(folder: RunFolder, loaded: Loaded) -> tuple[Loaded, tuple[str, ...]]:
    """The checkpoint whose best step so far is there, whole, to be exported at the end; and what the user must know.

    A best step that is not whole is refused. Where the user has removed the link `best` too, the run goes on without:
    the best of what is evaluated from here on is exported.

    Raises:
        StorageError: the best step so far is damaged or gone; names the file.
    """
    progress = saved_progress(loaded)
    path = folder.checkpoints_path / step_name(progress.best_step)
    if progress.best_eval_loss is None or progress.best_step == loaded.step:
        return loaded, ()
    reasons = verify(path)
    if not reasons:
        return loaded, ()
    if linked_step(folder.checkpoints_path, "best") is not None:
        raise StorageError(
            where=str(path),
            found=f"the best step so far damaged: {'; '.join(reasons)}",
            expected="files as its manifest says, since its adapter is exported if no later step is better",
            fix=f"Restore it from a copy, or go on without it: remove the link {folder.checkpoints_path / 'best'}.",
        )
    forgotten = replace(progress, best_eval_loss=None, best_step=0)
    note = f"{path.name}, the best step so far, is not whole: the best from here on is exported ({'; '.join(reasons)})"
    return replace(loaded, state={**loaded.state, "progress": forgotten.as_json()}), (note,)


def require_same_order(loaded: Loaded) -> None:
    """Refuse to go on where documents would come in another order than before: some would be seen twice, some never.

    Raises:
        StorageError: names both orders.
    """
    began_with = began_with_order(loaded.state)
    if began_with != ORDER_VERSION:
        raise StorageError(
            where=str(loaded.path),
            found=f"a run that sees its documents in order {began_with}",
            expected=f"order {ORDER_VERSION}, the only one that this version of qlora-trainer knows",
            fix="Resume with the version that began the run, or begin a new run in another folder with lora.init_from.",
        )


def version_notes(loaded: Loaded) -> tuple[str, ...]:
    """That packages on which the numbers depend are not those of the checkpoint; empty where all are."""
    before, now = loaded.versions, package_versions()
    changed = [
        f"{name} {before.get(name, 'none')} -> {now.get(name, 'none')}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if not changed:
        return ()
    return (f"other packages than at step {loaded.step}, so bits may differ from here on: {', '.join(changed)}",)


def rewind(folder: RunFolder, loaded: Loaded | None) -> None:
    """Let logs, links and checkpoints be those of a run that stands at `loaded`, so that it is written anew from there.

    The links come before anything is removed: a crash in between leaves none that dangles.
    """
    if loaded is None:
        cut_logs(folder, -1, evaluated_step=-1)
        return
    progress = saved_progress(loaded)
    cut_logs(folder, loaded.step, evaluated_step=progress.evaluated_step)
    best_step = None if progress.best_eval_loss is None else progress.best_step
    relink(folder.checkpoints_path, last=loaded.step, best=best_step)
    discard_after(folder.checkpoints_path, step=loaded.step, run_id=loaded.state["run_id"])


def continued_config(
    config: RunConfig, loaded: Loaded, allow_change: Collection[str]
) -> tuple[RunConfig, tuple[Change, ...]]:
    """The config to go on with, and what of it is not as the run was asked before.

    Args:
        config: what the resume was asked.
        loaded: the checkpoint; it holds what the run was asked, and what was decided for each `auto`.
        allow_change: keys of `--allow-change`.

    Raises:
        ConfigError: a key differs that must not, or only with the flag; names it with both values.
        StorageError: the checkpoint's config is one that this version cannot read.
    """
    began_with, now = _asked_before(loaded), config.model_dump(mode="json")
    resolved = [knobs_of(loaded.state[name]).resolved() for name in ("plan", "plan_at_start") if name in loaded.state]
    changes = changes_between(began_with, now, resolved)
    require_allowed(changes, allow_change, run=str(loaded.path.parent.parent))
    return RunConfig.model_validate(merged(began_with, now, changes)), changes


def _asked_before(loaded: Loaded) -> dict[str, Any]:
    """The config in a checkpoint, with the defaults of keys that its version did not have yet."""
    try:
        return RunConfig.model_validate(loaded.state["config"]).model_dump(mode="json")
    except ValidationError as error:
        raise StorageError(
            where=str(loaded.path),
            found=f"the config of another version of qlora-trainer ({error.errors()[0]['msg']})",
            expected="a config that this version knows",
            fix="Resume with the version that began the run.",
        ) from error


def restore(loaded: Loaded, optimizer: AdapterOptimizer, scaler: LossScaler | None) -> None:
    """Put master weights and moments into the optimizer's own buffers; the adapters are rounded from them.

    Raises:
        StorageError: the saved state is not of this optimizer, or has none of a loss scaler where there is one.
    """
    try:
        optimizer.load_state_dict(loaded.optimizer)
        if scaler is not None:
            scaler.load_state_dict(loaded.state.get("loss_scaler") or {})
    except ValueError as error:
        raise StorageError(
            where=str(loaded.path),
            found=f"optimizer or loss scaler of another run ({error})",
            expected="the state this run saved",
            fix="Resume the run that the checkpoint belongs to.",
        ) from error


def saved_progress(loaded: Loaded) -> Progress:
    """How far the run was when the checkpoint was made."""
    saved = loaded.state["progress"]
    return Progress(**{field.name: saved[field.name] for field in fields(Progress) if field.name in saved})

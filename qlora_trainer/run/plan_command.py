"""Plans without a run: for a card that is not here or for this machine, with the data of the config or without."""

from __future__ import annotations

from collections.abc import Generator

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.rows import Reading
from qlora_trainer.errors import ConfigError
from qlora_trainer.hardware.device import require_has
from qlora_trainer.planning.budget import Budget, cpu_budget, gpu_budget, machine_budget
from qlora_trainer.planning.make_plan import make_plan
from qlora_trainer.planning.plan import DEVICE_KEY, Plan
from qlora_trainer.run.continue_from import filled_in
from qlora_trainer.run.dry_run import counted_documents
from qlora_trainer.run.inputs import find_base, read_documents
from qlora_trainer.run.planned import asked_bytes, documents_of, process_bytes


def plan_on(
    config: RunConfig, *, gpu: str | None, vram_bytes: int | None, ram_bytes: int | None, with_data: bool
) -> Generator[Reading, None, tuple[Plan, str]]:
    """Plan `config` for a device, with its frontier, while yielding how far the data is read.

    Args:
        config: what is asked for.
        gpu, vram_bytes: a card of the catalogue, and what of it may be used.
        ram_bytes: of this machine's CPU.
        with_data: plan for the documents of `data.train`, if the base has a tokenizer; else for full ones.

    Returns:
        The plan, and the documents that it is for, in words.

    Raises:
        QloraTrainerError: an unknown card or model, more memory than there is, or data that cannot be trained on.
    """
    config = filled_in(config)
    budget = _budget(config, gpu, vram_bytes, ram_bytes)
    reason = "no data"
    if with_data:
        try:
            found = find_base(config)
        except ConfigError as error:  # a well-known name needs no files; what is no base at all is refused below
            reason = f"no tokenizer to count the tokens of {config.data.train}: {error.found}"
        else:
            inputs = yield from read_documents(config, *found)
            plan = make_plan(
                config,
                budget,
                model_config=inputs.base.config,
                can_pack=inputs.base.can_pack,
                documents=documents_of(inputs, config.training.global_batch_size),
                interpreter_bytes=process_bytes,  # as a run has read the same by then
                with_frontier=True,
            )
            return plan, counted_documents(inputs)
    plan = make_plan(config, budget, with_frontier=True)
    return plan, f"documents of {plan.knobs.seq_len:,} tokens each ({reason})"


def _budget(config: RunConfig, gpu: str | None, vram_bytes: int | None, ram_bytes: int | None) -> Budget:
    """An option takes the place of `memory.budget`; `memory.host_budget` counts beside it."""
    asked, host = asked_bytes(config.memory.budget), asked_bytes(config.memory.host_budget)
    dtype = None if config.quantization.compute_dtype == "auto" else config.quantization.compute_dtype
    if gpu is not None or vram_bytes is not None:
        limit, where = (asked, DEVICE_KEY) if vram_bytes is None else (vram_bytes, "--vram")
        budget = gpu_budget(gpu, limit, host, where=where)
        if gpu is not None:  # without a name any card with that much memory is meant
            require_has(config.quantization.compute_dtype, budget.compute_dtype, budget.device_name)
        return budget
    if ram_bytes is not None:
        return cpu_budget(ram_bytes, host, compute_dtype=dtype)
    return machine_budget(asked, host, dtype)

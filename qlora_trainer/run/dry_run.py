"""`train --dry-run`: the data is read and counted, the memory is planned; nothing is loaded and nothing written."""

from __future__ import annotations

from collections.abc import Iterator

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.rows import Reading
from qlora_trainer.hardware.device import choose_device
from qlora_trainer.planning.plan import Plan
from qlora_trainer.run.continue_from import filled_in, initial_told, read_initial
from qlora_trainer.run.inputs import Inputs, read_inputs
from qlora_trainer.run.invocations import invocations_told
from qlora_trainer.run.knobs import decide_machine_knobs
from qlora_trainer.run.planned import plan_run
from qlora_trainer.run.records import Preparing, RowsSkipped


def dry_run(config: RunConfig) -> Iterator[Preparing | Reading | RowsSkipped | Plan]:
    """Yield what is being done, and the plan last.

    Raises:
        QloraTrainerError: as a run with this config would, before its first step.
    """
    config = filled_in(config)
    machine = decide_machine_knobs(config, choose_device())
    yield Preparing(what="reading base config, tokenizer and data")
    inputs = yield from read_inputs(config)
    yield from inputs.data.told
    yield from invocations_told(config, inputs)
    yield Preparing(what=counted_documents(inputs))
    plan = plan_run(config, inputs, machine)
    yield from initial_told(config, read_initial(config, inputs.base, plan.knobs.rank))
    yield plan


def counted_documents(inputs: Inputs) -> str:
    """In words, what is trained on."""
    data = inputs.data.train
    what = "a stream, at its start " if inputs.data.stream else ""
    why = "" if inputs.base.can_pack else "; one a row, padded: packed ones would read each other in this architecture"
    return (
        f"{what}{len(data.documents):,} documents, {data.num_tokens:,} tokens, "
        f"{data.num_supervised_tokens:,} of them supervised; longest {data.documents.lengths.longest:,}; "
        f"{data.num_dropped:,} rows dropped, {data.documents.store.num_repeated:,} repeated; "
        f"a stop token is learned in {data.num_stopping_rows:,} of {data.num_kept_rows:,}{why}"
    )

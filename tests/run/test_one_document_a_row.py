"""StableLM's layers do not pass on where documents end: packed ones would read each other, so each has its own row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, StableLmConfig

from qlora_trainer.config.load import load_config
from qlora_trainer.hardware.python_accelerator import python_accelerator
from qlora_trainer.model.base import resolve_base
from qlora_trainer.report.reading import watched
from qlora_trainer.report.screen import stderr_console
from qlora_trainer.report.tables import prepared_table
from qlora_trainer.run import prepare
from qlora_trainer.run.plan_command import plan_on
from qlora_trainer.run.records import Prepared, Record, StepDone
from tests.run.tiny_run import SIZES, run_to_end, tiny_config, write_base
from tests.run.told import train_command

# Before any test runs: autograd's engine counts the devices once, at the first backward of the process.
python_accelerator()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_base(tmp_path_factory.mktemp("stablelm"))
    config = StableLmConfig(**SIZES, vocab_size=320)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def losses(records: list[Record]) -> list[float]:
    return [record.loss for record in records if isinstance(record, StepDone)]


def test_it_is_told_and_learns_what_padded_rows_learn(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed all the same, it learns something else: the mutation is made below."""
    assert resolve_base(str(base)).can_pack is False
    records = run_to_end(tiny_config(tmp_path, base, f"output.dir={tmp_path / 'asked'}"))
    [prepared] = [record for record in records if isinstance(record, Prepared)]
    assert (prepared.packs, prepared.can_pack) == (False, False)
    padded = run_to_end(tiny_config(tmp_path, base, "data.packing=false", f"output.dir={tmp_path / 'padded'}"))
    assert losses(records) == losses(padded)
    monkeypatch.setattr(prepare, "fetch_weights", lambda found: replace(found, can_pack=True))
    packed = run_to_end(tiny_config(tmp_path, base, f"output.dir={tmp_path / 'packed'}"))
    assert losses(packed) != pytest.approx(losses(padded), rel=1e-4)


def test_the_command_says_that_it_does_not_pack(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packing is asked for (the default), and given only to a base whose documents stay apart: before step 1."""
    monkeypatch.setenv("COLUMNS", "120")
    llama = write_base(tmp_path / "llama")
    said = {}
    for name, folder in (("stablelm", base), ("llama", llama)):
        options = ("training.max_steps=1", "data.eval_fraction=0", f"output.dir={tmp_path / f'run of {name}'}")
        assert train_command(tiny_config(tmp_path, folder, *options)) == 0
        before_step_1, _, _ = capsys.readouterr().out.partition("step 1/1")
        said[name] = [line.strip() for line in before_step_1.splitlines() if "one document each" in line]
    why = "packed ones would read each other in this architecture"
    assert said == {"stablelm": [f"rows       one document each, padded; {why}"], "llama": []}


@pytest.mark.slow
def test_its_plan_is_one_of_padded_rows(tmp_path: Path, base: Path) -> None:
    config = tiny_config(tmp_path, base)
    padded = tiny_config(tmp_path, base, "data.packing=false")
    plans = [
        watched(plan_on(asked, gpu=None, vram_bytes=8 * 2**30, ram_bytes=None, with_data=True), stderr_console())
        for asked in (config, padded)
    ]
    assert plans[0][0].predicted == plans[1][0].predicted
    for _, told in plans:
        assert told.endswith("; one a row, padded: packed ones would read each other in this architecture")


def test_a_run_that_is_asked_for_padded_rows_does_not_blame_the_base(tmp_path: Path) -> None:
    llama = write_base(tmp_path / "llama")
    config = tiny_config(tmp_path, llama, "data.packing=false", "training.max_steps=1")
    [prepared] = [record for record in run_to_end(config) if isinstance(record, Prepared)]
    assert (prepared.packs, prepared.can_pack) == (False, True)
    assert load_config(tmp_path / "run" / "config.yaml").data.packing is False
    console = Console(width=120)
    with console.capture() as captured:
        console.print(prepared_table(prepared))
        console.print(prepared_table(replace(prepared, can_pack=False)))
        console.print(prepared_table(replace(prepared, packs=True)))
    lines = [line.strip() for line in captured.get().splitlines() if line.startswith("  rows")]
    assert lines == [
        "rows       one document each, padded",
        "rows       one document each, padded; packed ones would read each other in this architecture",
    ]

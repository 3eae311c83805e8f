"""The model card says what the run's files say, as hubs read it, and nothing that is not known."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from rich.console import Console

from qlora_trainer.cli.app import main
from qlora_trainer.export.adapter import Exported
from qlora_trainer.export.card import model_card
from qlora_trainer.export.source import Source, read_source
from qlora_trainer.report.export_tables import exported_lines
from qlora_trainer.run.checkpoint.manifest import read_manifest
from tests.export.made_adapters import PATTERNS, make_adapter, peft_logits
from tests.model.tiny_bases import CONFIGS, write_base
from tests.model.tiny_models import tiny_documents


def card_of(source: Source, title: str = "my adapter") -> str:
    return model_card(source, source.settings, title=title, portable=False).decode()


def front_matter(card: str) -> dict[str, Any]:
    """As the hub reads it."""
    data: Any = ModelCard(card).data
    return dict(data.to_dict())


def facts(card: str) -> dict[str, str]:
    rows = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return {row[0]: row[1] for row in rows if len(row) == 2}


def test_a_run_is_described_by_its_own_files(finished: Path) -> None:
    found = facts(card_of(read_source(finished, model=None)))
    summary = json.loads((finished / "summary.json").read_text())
    hashes = read_manifest(finished / "checkpoints" / "best").fingerprints
    assert found["held-out loss of this adapter"] == f"{summary['eval_loss_after']:.4f}"
    assert found["held-out loss before"] == f"{summary['eval_loss_before']:.4f}"
    assert found["fingerprint of the training data"] == f"`{hashes['training data']}`"
    assert found["fingerprint of the base"] == f"`{hashes['base']}`"
    assert found["trained on"] == "`rows.jsonl`"  # not where it lay
    assert (found["rank"], found["alpha"], found["learning rate"], found["steps"]) == ("4", "8", "0.005", "6")
    assert (found["tokens at once"], found["compute dtype"]) == ("256", "float32")
    assert found["measured peak"] == f"{summary['measured_peak_bytes'] / 2**30:.2f} GiB"
    assert f"torch {summary['versions']['torch']}" in found["versions"]


def test_an_adapter_of_tables_alone_has_no_rank_and_no_linears(finished: Path) -> None:
    source = read_source(finished, model=None)
    settings = replace(source.settings, targets=(), modules_to_save=("lm_head",))
    found = facts(model_card(source, settings, title="tables", portable=False).decode())
    assert (found["linears with an adapter"], found["trained whole"]) == ("none", "`lm_head`")
    assert not {"rank", "alpha", "dropout"} & found.keys()
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(exported_lines(Exported((finished,), 2048, settings)))
    told = console.export_text()
    assert "no LoRA on a linear, lm_head whole; " in told
    assert "of rank" not in told


@pytest.mark.parametrize("begun_with,told", [("/home/me/runs/first", "first"), ("owner/name@main", "owner/name@main")])
def test_what_it_began_with_and_the_rate_of_b_are_told(begun_with: str, told: str, finished: Path) -> None:
    source = read_source(finished, model=None)
    assert source.config is not None
    assert not {"began with the adapter", "times that for B"} & facts(card_of(source)).keys()
    training = source.config.training.model_copy(update={"loraplus_lr_ratio": 16.0})
    lora = source.config.lora.model_copy(update={"init_from": begun_with})
    config = source.config.model_copy(update={"training": training, "lora": lora})
    found = facts(card_of(replace(source, config=config)))
    assert (found["began with the adapter"], found["times that for B"]) == (told, "16")


def test_nothing_is_invented_for_an_adapter_without_its_run(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", CONFIGS["llama"])
    make_adapter(tmp_path / "adapter", base, **PATTERNS)
    card = card_of(read_source(tmp_path / "adapter", model=None))
    assert [line for line in card.splitlines() if line.startswith("## ")] == ["## Adapter", "## Use"]
    assert "(rank-stabilized)" in card
    assert facts(card)["rank pattern"] == r'`{"layers\\.1\\.mlp\\.down_proj": 7, "o_proj": 2}`'


@pytest.mark.parametrize(
    "name, ranges, runs",
    [("qwen3", ((0, 2), (1, 2)), False), ("qwen3", ((1, 2), (1, 2)), True), ("llama", ((0, 2), (1, 2)), True)],
)
def test_where_peft_cannot_run_repeated_layers_it_is_told(
    name: str, ranges: tuple[tuple[int, int], ...], runs: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the card and where it is exported."""
    base = write_base(tmp_path / "base", CONFIGS[name])
    make_adapter(tmp_path / "adapter", base, layer_replication=list(ranges))
    with nullcontext() if runs else pytest.raises(IndexError):
        peft_logits(base, tmp_path / "adapter", tiny_documents(9))
    capsys.readouterr()
    assert main(["export", str(tmp_path / "adapter"), "--to", str(tmp_path / "to")]) == 0
    told, card = "PEFT 0.21 cannot run repeated layers of qwen3", (tmp_path / "to" / "README.md").read_text()
    assert (told in capsys.readouterr().out) == (told in card) == (not runs)
    assert ("from peft import" in card) == runs


@pytest.mark.parametrize("missing", ["plan.json", "summary.json", "checkpoints"])
def test_a_file_of_the_run_that_is_gone_is_left_out(missing: str, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    path = tmp_path / "run" / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    found = facts(card_of(read_source(tmp_path / "run", model=None)))
    told = {
        "plan.json": "tokens at once",
        "summary.json": "held-out loss of this adapter",
        "checkpoints": "fingerprint of the base",
    }
    assert told.pop(missing) not in found
    assert set(told.values()) <= found.keys()


def test_hubs_read_its_front_matter(finished: Path) -> None:
    source = read_source(finished, model=None)
    data = front_matter(card_of(source))
    assert data == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "qlora", "qlora_trainer"],
    }
    data = front_matter(card_of(replace(source, base_name="owner/name")))
    assert (data["base_model"], data["base_model_relation"]) == ("owner/name", "adapter")


def test_what_others_named_cannot_write_into_the_card(finished: Path) -> None:
    source = replace(read_source(finished, model=None), base_name="a`b|c\n---\n# d<script>\x1b[0m")
    card = card_of(source, title="x\n---\nlicense: mit\n<b>|")
    assert card.count("---\n") == card_of(read_source(finished, model=None)).count("---\n")
    assert "\x1b" not in card
    assert "<b>" not in card
    assert "\nlicense" not in card
    assert "license" not in front_matter(card)

"""A run with an adapter of Activated LoRA: begun anew and from PEFT's, cut off, exported, and what cannot be done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from qlora_trainer.cli.app import main
from qlora_trainer.errors import ConfigError
from qlora_trainer.run.answer import answer
from qlora_trainer.run.dry_run import dry_run
from qlora_trainer.run.records import Evaluated, Preparing
from tests.run.peft_runs import begun_with, peft_folder, require_same_after_a_cut
from tests.run.tiny_run import course, run_to_end, run_until_step, tiny_config
from tests.run.told import complaint

pytestmark = pytest.mark.usefixtures("plans_made_once")


def tokens_of(base: Path, text: str) -> list[int]:
    found: list[int] = AutoTokenizer.from_pretrained(base)(text, add_special_tokens=False)["input_ids"]
    return found


def test_it_learns_is_resumed_and_exported(tmp_path: Path, base: Path) -> None:
    """Other than plain LoRA, from the second step on; PEFT's config says where it works."""
    invocation = tokens_of(base, "assistant\n")
    key = f"lora.alora_invocation_tokens={invocation}"
    records = run_to_end(tiny_config(tmp_path, base, key))
    first, *_, last = (one.eval_loss for one in records if isinstance(one, Evaluated))
    assert last < first - 0.1
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["alora_invocation_tokens"] == invocation
    cut = tiny_config(tmp_path, base, key, f"output.dir={tmp_path / 'cut'}")
    run_until_step(cut, 3)
    run_to_end(cut, resume="auto")
    assert course(tmp_path / "cut") == course(tmp_path / "run")
    run_to_end(tiny_config(tmp_path, base, f"output.dir={tmp_path / 'plain'}"))
    assert course(tmp_path / "plain")["adapter"] != course(tmp_path / "run")["adapter"]
    asked = {"base": None, "max_new_tokens": 4, "temperature": 0.0, "seed": 0}
    assert isinstance(answer(tmp_path / "run", "What is 3 + 3?", **asked), str)  # type: ignore[arg-type]


def test_it_goes_on_from_pefts(tmp_path: Path, base: Path) -> None:
    invocation = tokens_of(base, "assistant\n")
    folder = peft_folder(tmp_path / "theirs", base, alora_invocation_tokens=invocation)
    config = begun_with(tmp_path, base, folder, "lora.dtype=float32", "training.max_steps=2")
    assert config.lora.alora_invocation_tokens == ()
    run_to_end(config)
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "run" / "adapter", folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    written = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert written["alora_invocation_tokens"] == invocation
    require_same_after_a_cut(tmp_path, base, folder, "training.max_steps=2")
    other = begun_with(tmp_path, base, folder, "lora.alora_invocation_tokens=[1]", f"output.dir={tmp_path / 'other'}")
    with pytest.raises(ConfigError, match=r"lora\.alora_invocation_tokens: found \(1,\); expected \(\d"):
        run_to_end(other)


def test_documents_in_which_nothing_is_learned_are_told(tmp_path: Path, base: Path) -> None:
    some = f"lora.alora_invocation_tokens={tokens_of(base, ' Please.')}"
    told = [one.what for one in dry_run(tiny_config(tmp_path, base, some)) if isinstance(one, Preparing)]
    assert [one for one in told if one.endswith("documents have no invocation tokens: nothing is learned in them")]
    every = f"lora.alora_invocation_tokens={tokens_of(base, 'assistant')}"
    told = [one.what for one in dry_run(tiny_config(tmp_path, base, every)) if isinstance(one, Preparing)]
    assert not any("invocation" in one for one in told)
    none = tiny_config(tmp_path, base, "lora.alora_invocation_tokens=[5, 5, 5]")
    for command in (dry_run, run_to_end):
        with pytest.raises(ConfigError, match=r"\[5, 5, 5\], which stand in a row in none of \d+ documents"):
            list(command(none))


def test_it_is_not_merged_and_has_no_portable_form(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = peft_folder(tmp_path / "theirs", base, alora_invocation_tokens=[3, 4])
    capsys.readouterr()
    assert main(["merge", str(folder), "--to", str(tmp_path / "merged"), "--force"]) == 2
    assert "found Activated LoRA, which works from the tokens [3, 4] on" in complaint(capsys)
    assert main(["export", str(folder), "--to", str(tmp_path / "portable"), "--portable"]) == 2
    assert "an adapter with invocation tokens (alora_invocation_tokens)" in complaint(capsys)
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / "portable").exists()
    assert main(["export", str(folder), "--to", str(tmp_path / "exported")]) == 0
    assert "works from the tokens" in (tmp_path / "exported" / "README.md").read_text()

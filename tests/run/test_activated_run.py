"""A run with an adapter of Activated LoRA: begun anew and from PEFT's, cut off, exported, and what cannot be done."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, GGUFValueType
from safetensors.torch import load_file
from transformers import AutoTokenizer

from qlora_trainer.cli.app import main
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import ConfigError
from qlora_trainer.run import invocations
from qlora_trainer.run.answer import answer
from qlora_trainer.run.dry_run import dry_run
from qlora_trainer.run.records import Evaluated, Preparing, StepDone
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
    assert answer(tmp_path / "run", "What is 3 + 3?", **asked).note is None  # type: ignore[arg-type]


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
    with pytest.raises(ConfigError, match=r"lora\.alora_invocation_tokens: found \[1\]; expected \[\d"):
        run_to_end(other)


def told_by_a_dry_run(config: RunConfig) -> list[str]:
    return [one.what for one in dry_run(config) if isinstance(one, Preparing) and "invocation" in one.what]


def test_tokens_of_which_nothing_is_learned_are_told(tmp_path: Path, base: Path) -> None:
    """Three rows of four ask politely; in these half of the answer is behind the number."""
    some = f"lora.alora_invocation_tokens={tokens_of(base, ' Please.')}"
    trained_on, judged_on = told_by_a_dry_run(tiny_config(tmp_path, base, some))
    assert re.match(r"it works at 7\d\.\d% of the tokens that are trained on in 48 documents; the others", trained_on)
    assert "judged on in 12 documents" in judged_on
    every = f"lora.alora_invocation_tokens={tokens_of(base, 'assistant')}"
    assert told_by_a_dry_run(tiny_config(tmp_path, base, every)) == []
    at_the_end = f"lora.alora_invocation_tokens={tokens_of(base, '<|im_end|>')}"  # behind which nothing comes
    for tokens in (at_the_end, "lora.alora_invocation_tokens=[5, 5, 5]"):
        for command in (dry_run, run_to_end):
            with pytest.raises(
                ConfigError, match=r"behind which nothing is to be learned in all \d+ documents.*plain LoRA"
            ):
                list(command(tiny_config(tmp_path, base, tokens)))


def test_all_documents_are_looked_at_before_any_run_is_refused(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a mixture whose first documents have none; of a stream later blocks may have some."""
    monkeypatch.setattr(invocations, "MAX_DOCUMENTS", 1)
    key = f"lora.alora_invocation_tokens={tokens_of(base, ' Please. Please. Please.')}"
    (told, _) = told_by_a_dry_run(tiny_config(tmp_path, base, key, "training.max_steps=1"))
    assert re.search(r"trained on in [2-9] documents", told)
    stream = ("data.streaming=true", "data.stream_rows=20", "data.eval_fraction=0", "training.max_steps=1")
    config = tiny_config(tmp_path, base, "lora.alora_invocation_tokens=[5, 5, 5]", *stream)
    assert told_by_a_dry_run(config)[0].startswith("it works at 0.0% of the tokens that are trained on in ")


def test_padding_is_no_invocation(tmp_path: Path, base: Path) -> None:
    """Rows are padded with token 0, which documents begin with here. Mutation tried: padding is looked at."""
    key = f"lora.alora_invocation_tokens={tokens_of(base, '<|im_start|>')}"
    losses = []
    for packing in ("true", "false"):
        to = f"output.dir={tmp_path / packing}"
        records = run_to_end(tiny_config(tmp_path, base, key, f"data.packing={packing}", to, "training.max_steps=3"))
        losses.append([one.loss for one in records if isinstance(one, StepDone)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert tokens_of(base, "<|im_start|>") == [0]


def test_where_it_does_not_work_the_base_answers_and_is_told(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = peft_folder(tmp_path / "theirs", base, alora_invocation_tokens=tokens_of(base, " Please."))
    asked = ["--max-new-tokens", "2", "--model", str(base), "--prompt"]
    capsys.readouterr()
    assert main(["generate", str(folder), *asked, "What is 3 + 3?"]) == 0
    assert "the base answers: the adapter's invocation tokens [" in capsys.readouterr().err
    assert main(["generate", str(folder), *asked, "What is 3 + 3? Please."]) == 0
    assert "the base answers" not in capsys.readouterr().err
    rows = str(tmp_path / "rows.jsonl")
    tiny_config(tmp_path, base)
    assert main(["eval", str(folder), "--data", rows, "--model", str(base)]) == 0
    assert "of the tokens that are judged on" in " ".join(capsys.readouterr().out.split())


def test_a_file_of_llama_cpp_has_the_tokens(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its reader takes an array of unsigned numbers under this key, and no other."""
    folder = peft_folder(tmp_path / "theirs", base, alora_invocation_tokens=[3, 4])
    assert main(["export", str(folder), "--gguf", str(tmp_path / "a.gguf"), "--model", str(base)]) == 0
    (field,) = (own for key, own in GGUFReader(tmp_path / "a.gguf").fields.items() if "alora" in key)
    assert field.name == "adapter.alora.invocation_tokens"
    assert field.types == [GGUFValueType.ARRAY, GGUFValueType.UINT32]
    assert field.contents() == [3, 4]
    assert "a reader that does not know them works at every token" in capsys.readouterr().out


@pytest.mark.parametrize(
    "tokens, found", [([2**31], "numbers of tokens"), ([320_000], r"alora_invocation_tokens with 3")]
)
def test_tokens_that_are_none_are_refused(
    tokens: list[int], found: str, tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = peft_folder(tmp_path / "theirs", base, alora_invocation_tokens=[3])
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alora_invocation_tokens": tokens}))
    capsys.readouterr()
    assert main(["generate", str(folder), "--model", str(base), "--prompt", "x"]) == 2
    assert found in complaint(capsys)


def test_it_is_not_merged_and_has_no_portable_form(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = peft_folder(tmp_path / "theirs", base, alora_invocation_tokens=[3, 4])
    capsys.readouterr()
    assert main(["merge", str(folder), "--to", str(tmp_path / "merged"), "--force"]) == 2
    assert "found Activated LoRA, which works from the tokens [3, 4] on" in complaint(capsys)
    assert main(["export", str(folder), "--to", str(tmp_path / "portable"), "--portable"]) == 2
    told = complaint(capsys)
    assert "an adapter with invocation tokens (alora_invocation_tokens)" in told
    assert "it cannot be merged either" in told
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / "portable").exists()
    assert main(["export", str(folder), "--to", str(tmp_path / "exported")]) == 0
    assert "works from the tokens" in (tmp_path / "exported" / "README.md").read_text()

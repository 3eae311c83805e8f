"""What `eval` says of a run is what the run said of itself; adapters are compared on the same tokens, or not at all."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_trainer.errors import ConfigError, DataError, DivergedError, DoesNotFitError, QloraTrainerError
from qlora_trainer.run.adapted_base import find_adapters
from qlora_trainer.run.eval_config import eval_config
from qlora_trainer.run.evaluation import Evaluation, evaluate_adapters, require_finite
from qlora_trainer.run.records import Preparing
from qlora_trainer.step.scores import Scores, score
from tests.run.tiny_adapters import write_adapter
from tests.run.tiny_run import CHATML, rows, run_to_end, tiny_config, write_rows

DTYPE = "quantization.compute_dtype=float32"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, base: Path, plans_made_once: None) -> Path:
    """A finished run that held a fifth of its rows out; its tests change nothing in it."""
    folder = tmp_path_factory.mktemp("trained")
    run_to_end(tiny_config(folder, base, "training.max_steps=16"))  # enough to get a token right
    return folder / "run"


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copied", symlinks=True))


def judge(
    *targets: Path, data: Sequence[str] = (), base: str | None = None, overrides: Sequence[str] = ()
) -> tuple[Evaluation, list[str]]:
    """The evaluation, and what it told on the way."""
    named = {f"t{number}": target for number, target in enumerate(targets)}
    judged_on = eval_config(named, data, overrides=overrides)
    told: list[str] = []
    steps = evaluate_adapters(judged_on, find_adapters(named, base=base), named)
    while True:
        try:
            record = next(steps)
        except StopIteration as end:
            return end.value, told
        told += [record.what] if isinstance(record, Preparing) else []


def evals(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]


def test_a_run_is_judged_on_its_own_rows_as_it_judged_itself(run: Path) -> None:
    found, told = judge(run)
    base, adapter = found.judged
    lines = evals(run)
    assert base.loss == lines[0]["eval_loss"]  # to the bit: the same rows, cut, chunks, dtype
    assert adapter.loss == min(line["eval_loss"] for line in lines[1:])  # the adapter is the best one
    assert adapter.loss < base.loss
    assert (found.num_documents, found.num_supervised_tokens) == (12, lines[0]["eval_tokens"])
    assert adapter.perplexity == math.exp(adapter.loss)
    assert 0.0 <= base.accuracy < adapter.accuracy <= 1.0
    assert (base.path, adapter.path) == (None, str(run))
    assert told[-2:] == ["judging base, 1 of 2", "judging t0, 2 of 2"]


def test_several_share_a_base_and_do_not_know_of_each_other(run: Path, tmp_path: Path, base: Path) -> None:
    bare = write_adapter(tmp_path / "bare", base, seed=3, target_modules=["q_proj", "up_proj"])
    data = [str(write_rows(tmp_path / "rows.jsonl", 9))]
    alone = {target: judge(target, data=data, overrides=[DTYPE])[0].judged for target in (run, bare)}
    together = judge(run, bare, run / "adapter", data=data)[0].judged
    assert [line.loss for line in together[:3]] == [alone[run][0].loss, alone[run][1].loss, alone[bare][1].loss]
    assert together[3].loss == together[1].loss
    assert len({line.loss for line in together[:3]}) == 3
    assert [line.accuracy for line in together[1:3]] == [alone[run][1].accuracy, alone[bare][1].accuracy]


def test_a_base_that_has_changed_since_the_run_is_refused(copied: Path, tmp_path: Path, base: Path) -> None:
    """Of the same shapes, so nothing else tells. Mutation tried: without the comparison it is judged."""
    other = Path(shutil.copytree(base, tmp_path / "base"))
    weights = load_file(other / "model.safetensors")
    save_file(weights | {"model.norm.weight": 2 * weights["model.norm.weight"]}, other / "model.safetensors")
    config = copied / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base), str(other)))
    data = [str(write_rows(tmp_path / "rows.jsonl", 9))]
    with pytest.raises(
        ConfigError, match=r"copied/adapter: found another base than the adapter was trained on \(sha256"
    ):
        judge(copied, data=data)
    assert judge(copied, data=data, base=str(other))[0].judged  # it was meant
    bare = Path(shutil.copytree(copied / "adapter", tmp_path / "bare"))  # nothing tells what this one was trained on
    assert judge(bare, data=data, overrides=[DTYPE])[0].judged


def test_a_file_is_read_with_the_settings_of_the_run(run: Path, tmp_path: Path) -> None:
    row = {"messages": [*rows(2)[1]["messages"], *rows(8)[7]["messages"]]}
    (tmp_path / "two.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    data = [str(tmp_path / "two.jsonl")]
    text = (run / "config.yaml").read_text()
    both = judge(run, data=data)[0].num_supervised_tokens
    last = judge(run, data=data, overrides=["data.train_on=last_assistant"])[0].num_supervised_tokens
    assert 0 < last < both
    changed = Path(shutil.copytree(run, tmp_path / "changed", symlinks=True))
    (changed / "config.yaml").write_text(text.replace("train_on: assistant", "train_on: last_assistant"))
    assert judge(changed, data=data)[0].num_supervised_tokens == last
    with pytest.raises(ConfigError, match=r"t0 and t1 with different data.train_on \(assistant and last_assistant\)"):
        judge(run, changed, data=data)


def test_the_longest_document_of_any_run_counts(run: Path, copied: Path, tmp_path: Path) -> None:
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace("seq_len: 64", "seq_len: 96"))
    assert "seq_len: 96" in config.read_text()
    data = [str(write_rows(tmp_path / "rows.jsonl", 9))]
    assert judge(run, data=data)[0].seq_len == 64
    assert judge(run, copied, data=data)[0].seq_len == judge(copied, run)[0].seq_len == 96


def test_a_bare_adapter_leaves_no_document_out(tmp_path: Path, base: Path) -> None:
    bare = write_adapter(tmp_path / "bare", base, seed=3)
    long = {"messages": [{"role": "user", "content": "Hi " * 60}, {"role": "assistant", "content": "Hello."}]}
    path = write_rows(tmp_path / "rows.jsonl", 150)
    path.write_text(path.read_text() + f"{json.dumps(long)}\n")
    found, _ = judge(bare, data=[str(path)])
    assert (found.num_documents, found.num_dropped) == (151, 0)
    cut, _ = judge(bare, data=[str(path)], overrides=["data.seq_len=64"])
    assert (cut.num_documents, cut.num_dropped, cut.seq_len) == (150, 1, 64)


def test_an_own_chat_template_is_kept(tmp_path: Path, base: Path) -> None:
    chatty = CHATML.replace("message['content'] + '<|im_end|>", "message['content'] + '!<|im_end|>")
    plain = write_adapter(tmp_path / "plain", base, seed=3)
    own = write_adapter(tmp_path / "own", base, seed=3, chat_template=chatty)
    data = [str(write_rows(tmp_path / "rows.jsonl", 9))]
    plain_tokens, own_tokens = (judge(one, data=data)[0].num_supervised_tokens for one in (plain, own))
    assert own_tokens == plain_tokens + 9
    with pytest.raises(ConfigError, match=r"t0 and t1 with different data.chat_template;"):
        judge(plain, own, data=data)


def test_runs_that_held_out_other_rows_are_compared_on_a_file_only(run: Path, copied: Path, tmp_path: Path) -> None:
    config = copied / "config.yaml"
    text = config.read_text()
    for before, after, key in (
        ("eval_fraction: 0.2", "eval_fraction: 0.1", "data.eval_fraction"),
        ("seed: 0", "seed: 1", "training.seed"),
    ):
        assert before in text
        config.write_text(text.replace(before, after))
        with pytest.raises(ConfigError, match=rf"t0 and t1 with different {key} .*a file that you name with --data"):
            judge(run, copied)
    assert len(judge(run, copied, data=[str(write_rows(tmp_path / "rows.jsonl", 9))])[0].judged) == 3


@pytest.mark.parametrize(
    "change,error_class,found",
    [
        ("eval_fraction: 0.0", DataError, "a run that held no rows out"),
        ("data", DataError, "another training data than when it began"),
        ("weights", ConfigError, "that is not finite"),
        ("no run", ConfigError, "adapter folders without a run, and no --data"),
    ],
)
def test_what_cannot_be_judged_is_one_line(
    change: str, error_class: type[QloraTrainerError], found: str, copied: Path, tmp_path: Path
) -> None:
    config = copied / "config.yaml"
    if change.startswith("eval_fraction"):
        config.write_text(config.read_text().replace("eval_fraction: 0.2", change))
    elif change == "data":
        text = config.read_text()
        other = write_rows(tmp_path / "other.jsonl", 61)
        (line,) = (line for line in text.splitlines() if line.strip().startswith("train:"))
        config.write_text(text.replace(line, f"  train: {other}"))
    elif change == "weights":
        path = copied / "adapter" / "adapter_model.safetensors"
        tensors = load_file(path)
        name = next(iter(tensors))
        save_file(tensors | {name: torch.full_like(tensors[name], math.nan)}, path, metadata={"format": "pt"})
    else:
        config.unlink()
    with pytest.raises(error_class) as caught:
        judge(copied)
    assert found in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_document_to_judge_on_is_one_line(run: Path, tmp_path: Path) -> None:
    for text, said in (
        ("", "an empty file"),
        ('{"messages": [\n', "rows.jsonl:1"),
        (json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + "\n", "rows.jsonl:1"),
        (json.dumps(rows(1)[0]) + "\n", "longer than 8 tokens"),
    ):
        path = tmp_path / "rows.jsonl"
        path.write_text(text)
        with pytest.raises(DataError, match=said):
            judge(run, data=[str(path)], overrides=["data.seq_len=8"])


@pytest.mark.parametrize("override", ["lora.rank=8", "data.train=x", "data.streaming=true", "training.seed=1"])
def test_a_key_that_is_not_looked_at_is_refused(override: str, run: Path) -> None:
    with pytest.raises(ConfigError, match="which eval does not look at"):
        judge(run, overrides=[override])


def test_a_loss_that_is_not_finite_is_told_after_the_table(run: Path) -> None:
    found, _ = judge(run)
    require_finite(found)
    base, adapter = found.judged
    broken = replace(found, judged=(base, replace(adapter, loss=math.nan, perplexity=math.nan)))
    with pytest.raises(DivergedError, match=f"a loss that is not finite, of {run};"):
        require_finite(broken)
    assert [line["loss"] for line in broken.as_json()["judged"]] == [base.loss, None]
    assert json.loads(json.dumps(broken.as_json(), allow_nan=False))["judged"][1]["perplexity"] is None


def test_where_memory_runs_out_smaller_micro_batches_are_tried(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = judge(run)
    lengths: list[int] = []

    def poor(model: Any, micro_batches: Any, *, loss_chunk_tokens: int) -> Scores:
        batches = list(micro_batches)
        lengths.append(max(batch.num_tokens for batch in batches))
        if lengths[-1] > limit:
            raise MemoryError
        return score(model, batches, loss_chunk_tokens=loss_chunk_tokens)

    monkeypatch.setattr("qlora_trainer.run.evaluation.score", poor)
    limit = 100
    found, told = judge(run)
    assert any(line.startswith("memory ran out: again in micro-batches of ") for line in told)
    assert lengths[0] > limit
    for line, other in zip(found.judged, expected.judged, strict=True):
        assert line.loss == pytest.approx(other.loss, rel=1e-5)
    limit = 0
    with pytest.raises(DoesNotFitError, match="no memory left, with one document of"):
        judge(run)

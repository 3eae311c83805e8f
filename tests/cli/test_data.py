"""`qlora-trainer data check` as a user calls it: everything that is wrong is counted, to the last row."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from qlora_trainer.cli.app import main
from qlora_trainer.config.load import load_config
from qlora_trainer.data.split import hold_out
from qlora_trainer.report.data_tables import data_report
from qlora_trainer.report.reading import watched
from qlora_trainer.report.screen import stderr_console
from qlora_trainer.run.data_check import check_data
from qlora_trainer.run.inputs import read_inputs
from qlora_trainer.run.records import Preparing
from tests.run.tiny_run import CHATML, rows, write_base, write_rows


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", 60)


def called(capsys: pytest.CaptureFixture[str], *arguments: str, exit_code: int = 0) -> tuple[str, str]:
    """What `data check` says on stdout and on stderr."""
    assert main(("data", "check", *arguments)) == exit_code
    captured = capsys.readouterr()
    return captured.out, captured.err


def found(capsys: pytest.CaptureFixture[str], *arguments: str, exit_code: int = 0) -> dict[str, Any]:
    out, _ = called(capsys, *arguments, "--json", exit_code=exit_code)
    report: dict[str, Any] = json.loads(out)
    assert report["ok"] is (exit_code == 0)
    return report


def test_good_data_is_counted_as_a_run_would_count_it(
    base: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_a_killed_check = data.parent / "cache" / "qlora_trainer" / ".tmp-check-0"
    of_a_killed_check.mkdir(parents=True)
    os.utime(of_a_killed_check, (0, 0))
    report = found(capsys, str(data), "--model", str(base), "--show", "2")
    assert list(of_a_killed_check.parent.iterdir()) == [], "a check leaves nothing behind, nor does one that was killed"
    config = load_config(None, [f"model.base={base}", f"data.train={data}", "training.global_batch_size=1"])
    inputs = watched(read_inputs(config), stderr_console())
    train = report["train"]
    assert (train["num_rows"], train["num_bad"], train["num_documents"], report["num_held_out"]) == (60, 0, 60, 3)
    assert (report["seq_len"], report["overlong"]) == (inputs.data.seq_len, "drop")
    both = (inputs.data.train, inputs.data.evaluation)
    assert train["num_tokens"] == sum(part.num_tokens for part in both)
    assert train["num_supervised_tokens"] == sum(part.num_supervised_tokens for part in both)
    assert train["num_with_stop"] == 60
    assert (train["num_double_bos"], train["num_empty_answers"], train["num_repeated"]) == (0, 0, 0)
    lengths = sorted(document.num_tokens for part in both for document in part.documents)
    assert train["percentiles"] == [lengths[29], lengths[53], lengths[59], lengths[59]]
    assert sum(count for _, count in train["histogram"]) == 60
    below = 0
    for end, count in train["histogram"]:
        below += count
        assert below == sum(length <= end for length in lengths)


def test_samples_show_every_token_and_what_is_learned_of_it(
    base: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data.write_text(
        json.dumps({"messages": [{"role": "user", "content": "Hé\t日"}, {"role": "assistant", "content": "Ja 😀\nso"}]})
    )
    report = found(capsys, str(data), "--model", str(base), "--set", "data.eval_fraction=0", "--show", "5")
    [sample] = report["samples"]
    assert sample["where"] == f"{data}:1"
    tokenizer = AutoTokenizer.from_pretrained(base)
    token_ids = [token_id for piece in sample["pieces"] for token_id in piece["token_ids"]]
    assert tokenizer.decode(token_ids) == "".join(piece["text"] for piece in sample["pieces"])
    assert "".join(piece["text"] for piece in sample["pieces"] if piece["is_learned"]) == "Ja 😀\nso<|im_end|>"
    out, _ = called(capsys, str(data), "--model", str(base), "--set", "data.eval_fraction=0", "--show", "1")
    assert "⟦Ja 😀↵\nso<|im_end|>⟧↵" in "\n".join(line.rstrip() for line in out.splitlines())
    assert "Hé→日<|im_end|>↵" in out


def test_on_a_terminal_what_is_learned_is_on_green(base: Path, data: Path) -> None:
    config = load_config(None, [f"model.base={base}", f"data.train={data}"])
    console = Console(force_terminal=True, color_system="standard", width=100, record=True, no_color=False)
    with console.capture() as captured:
        console.print(data_report(watched(check_data(config, num_samples=1), stderr_console()), has_colours=True))
    text = captured.get()
    learned = "".join(re.findall(r"\x1b\[30;(?:42|102)m([^\x1b]*)\x1b", text))
    assert learned == "It is 0.<|im_end|>"
    assert "⟦" not in text


def test_all_that_is_wrong_is_counted_by_kind(base: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation tried: the check stops at the first bad batch."""
    empty = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " \n"}]}
    no_answer = {"messages": [{"role": "user", "content": "Hi"}]}
    forged = {"messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "Hi"}]}
    bad = ["broken", json.dumps(empty), json.dumps(no_answer), json.dumps(forged), json.dumps(empty)]
    lines = data.read_text().splitlines()
    data.write_text("\n".join([*lines[:10], *bad, *lines[10:], *lines[:7]]))
    report = found(capsys, str(data), "--model", str(base), exit_code=4)
    train = report["train"]
    assert (train["num_rows"], train["num_bad"], train["num_empty_answers"], train["num_repeated"]) == (72, 5, 2, 7)
    kinds = {problem["kind"]: problem for problem in train["bad"]}
    assert {kind: problem["num_rows"] for kind, problem in kinds.items()} == {
        "bad row": 2,
        "empty answer": 2,
        "row that cannot be tokenised": 1,
    }
    places = [example.partition(": ")[0] for example in kinds["bad row"]["examples"]]
    assert places == [f"{data}:11", f"{data}:13"]
    assert kinds["row that cannot be tokenised"]["examples"][0].startswith(f"{data}:14: the control token")
    out, err = called(capsys, str(data), "--model", str(base), exit_code=4)
    assert "72, of which 5 bad and 7 repeated" in out
    assert "2 rows: empty answer" in out
    assert err.count("\n") == 1
    assert "2 x empty answer" in err
    skip = (str(data), "--model", str(base), "--set", "data.on_bad_row=skip", "--set", "data.eval_fraction=0")
    skipped = found(capsys, *skip, exit_code=4)["train"]
    assert skipped["num_bad"] == 5
    assert skipped["errors"][0].startswith("1 x row that cannot be tokenised"), "a run does not pass over it either"
    assert "4 of 71 rows that cannot be trained on (4 bad ones" in skipped["errors"][1]
    data.write_text("\n".join([*lines[:10], *bad[:3], *lines[10:]]))
    allowed = found(capsys, *skip, "--set", "data.max_dropped_share=0.06")["train"]
    assert (allowed["num_bad"], allowed["errors"]) == (3, [])


def test_a_template_that_writes_bos_twice_is_an_error(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doubled = write_base(tmp_path / "doubled", chat_template="{{ bos_token }}" + CHATML)
    report = found(capsys, str(data), "--model", str(doubled), "--set", "data.eval_fraction=0", exit_code=4)
    assert report["train"]["num_double_bos"] == report["train"]["num_rows"] == 60


def test_too_long_rows_are_counted_by_what_becomes_of_them(
    base: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x " * 100}]}
    data.write_text(data.read_text() + json.dumps(long) + "\n")
    arguments = (str(data), "--model", str(base), "--set", "data.seq_len=64", "--set", "data.eval_fraction=0")
    dropped = found(capsys, *arguments)["train"]
    assert (dropped["num_overlong"], dropped["num_dropped_overlong"], dropped["num_documents"]) == (1, 1, 60)
    assert dropped["num_with_stop"] == 60
    cut = found(capsys, *arguments, "--set", "data.overlong=truncate")["train"]
    assert (cut["num_documents"], cut["num_with_stop"]) == (61, 60)
    split = found(capsys, *arguments, "--set", "data.overlong=split")["train"]
    assert (split["num_overlong"], split["num_dropped_overlong"]) == (1, 0)
    assert split["num_documents"] > 61
    refused = found(capsys, *arguments, "--set", "data.overlong=error", exit_code=4)
    assert "1 rows longer than data.seq_len = 64" in refused["train"]["errors"][0]
    strict = found(capsys, *arguments, "--set", "data.max_dropped_share=0.01", exit_code=4)
    assert "1 of 61 rows that cannot be trained on" in strict["train"]["errors"][0]


def test_a_config_is_checked_with_its_held_out_files_and_its_batch(
    tmp_path: Path, base: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text("\n".join(map(json.dumps, rows(4))) + "\nbroken")
    config = tmp_path / "run.yaml"
    config.write_text(f"model:\n  base: {base}\ndata:\n  train: {data}\n  eval: {held_out}\n")
    report = found(capsys, str(config), exit_code=4)
    assert (report["train"]["errors"], report["num_held_out"]) == ([], 0)
    assert report["evaluation"]["num_rows"] == 5
    assert "1 x bad row" in report["evaluation"]["errors"][0]
    held_out.write_text(json.dumps(rows(1)[0]))
    report = found(capsys, str(config), "--set", "training.global_batch_size=61", exit_code=4)
    assert report["train"]["errors"] == ["60 documents for a global batch of 61"]


def test_of_a_stream_the_first_rows_are_checked_and_that_is_said(
    tmp_path: Path, base: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutations tried: all is read; the last batch of rows that were read is not counted."""
    second = write_rows(tmp_path / "second.jsonl", 40)
    lines = second.read_text().splitlines()
    second.write_text("\n".join([*lines[:7], "broken", *lines[7:30], "broken", *lines[30:]]))
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model:\n  base: {base}\ndata:\n  train: [{data}, {second}]\n  streaming: true\n  stream_rows: 80\n"
        "  eval_fraction: 0\ntraining:\n  max_steps: 3\n"
    )
    monkeypatch.setattr("qlora_trainer.data.check.MAX_STREAMED_ROWS", 50)
    report = found(capsys, str(config), exit_code=4)["train"]
    assert (report["num_rows"], report["num_bad"], report["is_beginning"]) == (80, 1, True)
    assert [(file["num_rows"], file["num_bad"]) for file in report["files"]] == [(60, 0), (19, 1)]
    [error] = report["errors"]
    assert error.startswith(f"1 x bad row ({second}:8: broken JSON")
    out, _ = called(capsys, str(config), exit_code=4)
    assert "80, the first of a stream (--set data.streaming=false reads all), of which 1 bad" in " ".join(out.split())
    monkeypatch.setattr("qlora_trainer.data.check.MAX_STREAMED_ROWS", 103)
    assert found(capsys, str(config), exit_code=4)["train"]["is_beginning"] is False
    whole = found(capsys, str(config), "--set", "data.streaming=false", exit_code=4)["train"]
    assert (whole["num_rows"], whole["is_beginning"]) == (102, False)


def test_text_that_the_tokenizer_cannot_give_back_is_a_warning(
    tmp_path: Path, base: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "lossy"
    write_base(folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(tokenizer))
    report = found(capsys, str(data), "--model", str(folder))
    [warning] = report["train"]["warnings"]
    assert (warning["kind"], warning["num_rows"]) == ("text that the tokenizer cannot give back", 60)
    assert found(capsys, str(data), "--model", str(base))["train"]["warnings"] == []


@pytest.mark.parametrize(
    "arguments, exit_code, message",
    [
        (("no-such.jsonl",), 4, "data.train no-such.jsonl: found no such file"),
        (("no-such.yaml",), 2, "no-such.yaml"),
        (("no-*.jsonl",), 4, "found no file of this pattern"),
        ((), 2, "Missing argument"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: tuple[str, ...], exit_code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = called(capsys, *arguments, exit_code=exit_code)
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_one_long_row_of_a_small_held_out_part_is_no_error(
    base: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run counts it only; one more in what is trained on is beyond 1 %, of 57 rows."""
    lines = data.read_text().splitlines()
    long = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x " * 100}]})
    train, held_out = (list(numbers) for numbers in hold_out(60, 0.05, 0))
    options = (str(data), "--model", str(base), "--set", "data.seq_len=64", "--set", "data.max_dropped_share=0.01")
    lines[held_out[0]] = long
    data.write_text("\n".join(lines))
    assert found(capsys, *options)["train"]["num_dropped_overlong"] == 1
    lines[train[0]] = long
    data.write_text("\n".join(lines))
    assert "1 of 57 rows" in found(capsys, *options, exit_code=4)["train"]["errors"][0]


def test_a_path_with_brackets_is_shown_as_it_is(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutation tried: as the title of the rule, which cuts a path that is longer than the line."""
    path = write_rows(tmp_path / f"{'a' * 100}[v2].jsonl", 60)
    out, _ = called(capsys, str(path), "--model", str(base), "--show", "1")
    assert "a[v2].jsonl:1" in out.replace("\n", "")


def test_data_without_a_good_row_is_refused(base: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data.write_text("broken\nbroken\n")
    out, err = called(capsys, str(data), "--model", str(base), exit_code=4)
    assert out == ""
    assert "no rows but 2 bad ones" in err


def test_questions_without_text_are_told(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They train, as rows whose answer is empty do not; a system prompt or a tool's result may be empty."""
    path = tmp_path / "blank.jsonl"
    asked = [" \n", "Hi", "", "Hi"]
    path.write_text("".join(f"{json.dumps({'instruction': a, 'output': 'Hello', 'system': ''})}\n" for a in asked))
    report = found(capsys, str(path), "--model", str(base))["train"]
    assert (report["num_empty_questions"], report["num_documents"]) == (2, 4)
    out, _ = called(capsys, str(path), "--model", str(base))
    assert "no question   in 2 rows" in out
    told = "".join(out.split())  # a long path is broken anywhere
    assert told.index(f"{path}:1") < told.index(f"{path}:3"), "which they are is told"
    assert "2 rows: question without text" in out


def test_names_that_the_template_does_not_render_are_told(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [{"role": "user", "content": "Hi", "name": "Ann"}, {"role": "assistant", "content": "Hello"}]
    path = tmp_path / "named.jsonl"
    path.write_text("".join(f"{json.dumps({'messages': messages})}\n" for _ in range(3)))
    assert found(capsys, str(path), "--model", str(base))["train"]["num_lost_names"] == 3
    out, _ = called(capsys, str(path), "--model", str(base))
    assert "lost name     of 3 messages: the chat template does not render it" in out
    options = [f"model.base={base}", f"data.train={path}", "data.eval_fraction=0", "training.global_batch_size=1"]
    told = watched(read_inputs(load_config(None, options)), stderr_console()).data.told
    line = "3 messages have a name that the chat template does not render: who speaks is not learned"
    assert line in [record.what for record in told if isinstance(record, Preparing)]


def test_answers_that_the_template_rewrites_are_told(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Qwen 3 forgets the thoughts of earlier answers: they are read, and not learned."""
    thought = "<think>\nWho?\n</think>\n\nHello"
    turns = [("user", "Hi"), ("assistant", thought)] * 2
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    path = tmp_path / "thoughts.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for _ in range(3)))
    template = Path(__file__).parents[1] / "data" / "templates" / "qwen_3.jinja"
    given = (str(path), "--set", f"model.base={base}", "--set", f"data.chat_template={template}")

    assert found(capsys, *given)["train"]["num_rewritten_turns"] == 3
    out, _ = called(capsys, *given)
    assert "3 earlier answers are read, not learned: the chat template rewrites them" in " ".join(out.split())

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from dataclasses import make_dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from qlora_trainer.cli.app import main
from qlora_trainer.config.load import load_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import ConfigError, DoesNotFitError, InterruptedAndSaved

ROW = '{"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}\n'
VERBS = (
    *("plan", "train", "runs", "generate", "chat", "eval", "export", "merge"),
    *("doctor", "config", "quickstart-data", "data"),
)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "train.jsonl").write_text(ROW * 4)
    (tmp_path / "run.yaml").write_text("model: {base: owner/name}\ndata: {train: train.jsonl}\noutput: {dir: out}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: object) -> None:
    """Put a module of another room in place, so that a verb is seen alone and torch stays out."""
    module = ModuleType(name)
    module.__dict__.update(attributes)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, child = name.rpartition(".")
    monkeypatch.setattr(import_module(parent), child, module, raising=False)


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """What stderr says: one line, and nothing on stdout."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("qlora-trainer: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_names_every_verb(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert f"Usage: qlora-trainer {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments,said",
    [
        (["--frobnicate"], "No such option: --frobnicate"),
        (["frobnicate"], "No such command 'frobnicate'"),
        (["train", "--resum", "auto"], "No such option: --resum"),
        (["train", "a", "b"], "unexpected extra argument"),
        (["train", "--set"], "--set"),
        (["generate"], "Missing argument 'RUN_OR_ADAPTER'"),
        (["generate", "."], "--prompt"),
        (["generate", ".", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", ".", "--prompt", "x", "--temperature", "-1"], "--temperature"),
        (["generate", ".", "--prompt", "x", "--seed", "one"], "--seed"),
        (["generate", ".", "--prompt", " "], "an empty question"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere: found no such folder"),
        (["generate", __file__, "--prompt", "x"], "found a file"),
        (["chat"], "neither a run, nor --adapter, nor --model"),
        (["chat", "nowhere"], "nowhere: found no such folder"),
        (["chat", "--adapter", "runs/a"], "--adapter: found 'runs/a'; expected NAME=FOLDER"),
        (["chat", "--adapter", "../x=runs/a"], "the name of an adapter: found '../x'"),
        (["chat", "--adapter", "a=nowhere", "--adapter", "a=."], "found 'a' twice"),
        (["chat", "--adapter", "base=nowhere"], "'base', which is the model without any adapter"),
        (["chat", ".", "--temperature", "-1"], "--temperature"),
        (["eval"], "Missing argument 'RUN_OR_ADAPTER...'"),
        (["eval", "nowhere"], "nowhere: found no such folder"),
        (["eval", "nowhere", "--set", "lora.rank=8"], "lora.rank, which eval does not look at"),
        (["export", "."], "neither --to nor --gguf"),
        (["export", ".", "--gguf", "x.gguf", "--portable"], "--portable without --to"),
        (["export", ".", "--to", "x", "--ollama"], "no --gguf"),
        (["export", "nowhere", "--to", "x"], "nowhere: found no such folder"),
        (["merge", "."], "Missing option '--to'"),
        (["merge", "nowhere", "--to", "x"], "nowhere: found no such folder"),
        (["merge", ".", "--to", "x", "--base", "nf4"], "--base"),
        (["merge", ".", "--to", "x", "--dtype", "int8"], "--dtype"),
        (["config"], "neither --print nor --schema"),
        (["config", "--print", "--schema"], "a mixture"),
        (["config", "--schema", "--set", "lora.rank=8"], "a mixture"),
        (["config", "--print", "nowhere.yaml"], "nowhere.yaml: found no such file"),
        (["config", "--print", "--set", "lora_r=8"], "Did you mean lora.rank?"),
        (["train", "a.yaml", "--allow-change", "training.learning_rate"], "without --resume"),
        (["train", "--resume", "auto", "--allow-change", "lora.rank"], "No other key can be changed at a resume"),
        (["train", "--resume", "auto", "--allow-change", "training.save_every"], "changed without the flag"),
        (["runs", "nowhere"], "nowhere: found no such folder"),
        (["runs", "verify"], "verify without a run"),
        (["runs", "a", "b"], "two folders, a and b"),
        (["runs", "verify", "nowhere"], "nowhere: found no such folder"),
        (["quickstart-data"], "Missing argument 'DIR'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert said in complaint(capsys)


def test_config_print_gives_a_file_to_start_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--print", "--set", "lora.rank=8"]) == 0
    path = tmp_path / "run.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_config(path).lora.rank == 8
    assert load_config(path).model.base == "smollm2-135m"
    assert main(["config", "--print", str(path), "--set", "lora.rank=4"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["lora"]["rank"] == 4


def test_config_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "RunConfig"


def test_train_hands_the_run_to_the_report(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[RunConfig, str | None, Collection[str]]] = []
    shown: list[str] = []

    def train(config: RunConfig, *, resume: str | None, allow_change: Collection[str]) -> Iterator[str]:
        started.append((config, resume, allow_change))
        yield "record"

    stand_in(monkeypatch, "qlora_trainer.run.loop", train=train)
    stand_in(monkeypatch, "qlora_trainer.report.progress", show=lambda records, console: shown.extend(records))
    assert main(["train", "run.yaml", "--set", "lora.rank=8", "--set", "lora.dropout=0.5"]) == 0
    assert shown == ["record"]
    assert started[0][0] == load_config(work / "run.yaml", ["lora.rank=8", "lora.dropout=0.5"])
    assert started[0][1:] == (None, ())


ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.mark.parametrize("given", [{}, {ALLOCATOR[0]: "backend:native"}, {ALLOCATOR[1]: "max_split_size_mb:64"}])
def test_segments_expand_unless_the_user_said_otherwise(
    given: dict[str, str], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set before the room that imports torch is entered."""
    seen: list[dict[str, str]] = []

    def run(*_: Any, **__: Any) -> SimpleNamespace:
        seen.append({name: os.environ[name] for name in ALLOCATOR if name in os.environ})
        return SimpleNamespace(text="", note=None)

    (work / "adapter_config.json").touch()
    stand_in(monkeypatch, "qlora_trainer.run.loop", train=run)
    stand_in(monkeypatch, "qlora_trainer.report.progress", show=lambda records, console: None)
    stand_in(monkeypatch, "qlora_trainer.run.answer", answer=run)
    for arguments in (["train", "run.yaml"], ["generate", str(work), "--prompt", "2 + 2?"]):
        with monkeypatch.context() as patch:
            patch.setattr(
                os, "environ", {name: os.environ[name] for name in os.environ if name not in ALLOCATOR} | given
            )
            assert main(arguments) == 0
    assert seen == [given or {ALLOCATOR[0]: "expandable_segments:True"}] * 2


def test_train_resumes_in_a_folder_that_is_not_empty(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resumed: list[tuple[str | None, Collection[str]]] = []

    def train(config: RunConfig, *, resume: str | None, allow_change: Collection[str]) -> None:
        resumed.append((resume, allow_change))

    stand_in(monkeypatch, "qlora_trainer.run.loop", train=train)
    stand_in(monkeypatch, "qlora_trainer.report.progress", show=lambda records, console: None)
    (work / "out").mkdir()
    (work / "out" / "config.yaml").touch()
    assert main(["train", "run.yaml"]) == 2
    assert "--resume auto" in complaint(capsys)
    assert main(["train", "run.yaml", "--resume", "auto"]) == 0
    flags = ["--allow-change", "training.learning_rate", "--allow-change", "training.schedule"]
    assert main(["train", "run.yaml", "--resume", "auto", *flags]) == 0
    assert resumed == [("auto", ()), ("auto", flags[1::2])]


@pytest.mark.parametrize(
    "error_class,exit_code",
    [(ConfigError, 2), (DoesNotFitError, 3), (InterruptedAndSaved, 75), (KeyboardInterrupt, 130)],
)
@pytest.mark.usefixtures("work")
def test_a_run_that_fails_gives_its_exit_code(
    error_class: type[BaseException], exit_code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {} if error_class is KeyboardInterrupt else dict.fromkeys(("where", "found", "expected", "fix"), "x")

    def train(config: RunConfig, *, resume: str | None, allow_change: Collection[str]) -> Iterator[Any]:
        raise error_class(**words)
        yield

    stand_in(monkeypatch, "qlora_trainer.run.loop", train=train)
    stand_in(monkeypatch, "qlora_trainer.report.progress", show=lambda records, console: list(records))
    assert main(["train", "run.yaml"]) == exit_code


@pytest.mark.usefixtures("work")
def test_an_unexpected_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own bugs are not dressed up as a mistake of the user."""

    def train(config: RunConfig, *, resume: str | None, allow_change: Collection[str]) -> None:
        raise ZeroDivisionError

    stand_in(monkeypatch, "qlora_trainer.run.loop", train=train)
    with pytest.raises(ZeroDivisionError):
        main(["train", "run.yaml"])


def test_generate_prints_the_answer(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, object]] = []

    def answer(target: Path, prompt: str, **settings: object) -> SimpleNamespace:
        asked.append({"target": target, "prompt": prompt, **settings})
        return SimpleNamespace(text="Four.", note="the base answers" if settings["seed"] else None)

    (work / "adapter_config.json").touch()
    stand_in(monkeypatch, "qlora_trainer.run.answer", answer=answer)
    assert main(["generate", str(work), "--prompt", "2 + 2?"]) == 0
    assert capsys.readouterr() == ("Four.\n", "")
    options = ["--model", "a/b", "--max-new-tokens", "5", "--temperature", "0.7", "--seed", "3"]
    assert main(["generate", str(work), "--prompt", "2 + 2?", *options]) == 0
    assert capsys.readouterr() == ("Four.\n", "the base answers\n")
    common = {"target": work, "prompt": "2 + 2?"}
    assert asked == [
        {**common, "base": None, "max_new_tokens": 128, "temperature": 0.0, "seed": 0},
        {**common, "base": "a/b", "max_new_tokens": 5, "temperature": 0.7, "seed": 3},
    ]


def test_chat_starts_with_the_run_and_knows_the_others(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[dict[str, object]] = []
    begun: list[dict[str, object]] = []

    def open_chat(targets: dict[str, Path], *, base: str | None) -> str:
        opened.append({"targets": targets, "base": base})
        return "chat"

    def converse(chat: str, lines: object, **settings: object) -> list[object]:
        begun.append(settings)
        return []

    for name in ("one", "two"):
        (work / name).mkdir()
        (work / name / "adapter_config.json").touch()
    stand_in(
        monkeypatch, "qlora_trainer.run.chat", open_chat=open_chat, converse=converse, AnswerSettings=lambda **own: own
    )
    screen = {"TypedLines": lambda stream, **_: stream, "is_held_by_a_person": lambda: False}
    screen |= {"show_chat": lambda *_: None, "show_greeting": lambda *_: None}
    stand_in(monkeypatch, "qlora_trainer.report.chat_screen", **screen)
    stand_in(monkeypatch, "qlora_trainer.report.reading", working=lambda *_: nullcontext())
    settings = {"max_new_tokens": 512, "temperature": 0.0, "seed": 0}
    assert main(["chat", "one", "--adapter", "b=two"]) == 0
    assert main(["chat", "--adapter", "b=two", "--adapter", "a=one", "--temperature", "0.5", "--seed", "3"]) == 0
    assert main(["chat", "--model", "smollm2-135m", "--max-new-tokens", "9"]) == 0
    assert opened == [
        {"targets": {"one": Path("one"), "b": Path("two")}, "base": None},
        {"targets": {"b": Path("two"), "a": Path("one")}, "base": None},
        {"targets": {}, "base": "smollm2-135m"},
    ]
    assert begun == [
        {"speaker": "one", "settings": settings},
        {"speaker": "b", "settings": {**settings, "temperature": 0.5, "seed": 3}},
        {"speaker": "base", "settings": {**settings, "max_new_tokens": 9}},
    ]


def test_doctor_prints_a_table_or_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    finding = make_dataclass("Finding", ["name", "value", "verdict", "note"])
    findings = [finding("device", "cpu", "ok", ""), finding("[b]cuda", "none", "warn", "training will be slow")]
    stand_in(monkeypatch, "qlora_trainer.hardware.doctor", examine=lambda: findings)
    assert main(["doctor", "--json"]) == 0
    assert [entry["verdict"] for entry in json.loads(capsys.readouterr().out)] == ["ok", "warn"]
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "[b]cuda" in out  # text of the machine is no markup
    assert "training will be slow" in out


def test_quickstart_data_is_written_where_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart-data", str(tmp_path / "data")]) == 0
    assert (tmp_path / "data" / "train.jsonl").stat().st_size > 0
    assert (tmp_path / "data" / "eval.jsonl").stat().st_size > 0
    assert str(tmp_path / "data") in capsys.readouterr().out


def test_a_reader_that_left_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(SystemExit) as caught:
        main(["config", "--schema"])
    assert caught.value.code == 1

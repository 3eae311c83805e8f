from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from qlora_trainer.config.data_files import HubDataset
from qlora_trainer.config.dataset_folder import DatasetFolder
from qlora_trainer.config.schema import DataSection
from qlora_trainer.data import token_job
from qlora_trainer.data.known_tokenizer import KnownTokenizer, tokenizer_content, tokenizer_hash, tokenizer_of
from qlora_trainer.data.rows import Reading
from qlora_trainer.data.token_job import TokenJob
from qlora_trainer.data.token_maker import hashes_of, make_tokens
from qlora_trainer.data.token_process import make_tokens_apart
from qlora_trainer.errors import ConfigError, DataError, DoesNotFitError, StorageError
from qlora_trainer.hardware.cache_folder import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PATIENCE_SECONDS = 60.0
NUM_ROWS = 20_000

Begun = tuple[Generator[Reading], psutil.Process]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qlora_trainer"


@pytest.fixture
def tokenizer(chatml: PreTrainedTokenizerFast) -> KnownTokenizer:
    return KnownTokenizer(chatml, tokenizer_hash(chatml), "the base")


def job_of(path: Path, tokenizer: KnownTokenizer, *, name: str = "made") -> TokenJob:
    return TokenJob(
        folder=cache_folder() / "tokens" / name,
        sources=(path,),
        hashes=hashes_of((path,), "train"),
        section=DataSection(train=str(path)),
        key="train",
        tokenizer=tokenizer,
    )


def write_rows(path: Path, num_rows: int) -> Path:
    lines = [
        json.dumps({"prompt": f"What is {number}?", "completion": f"It is {number}."}) for number in range(num_rows)
    ]
    path.write_text("\n".join(lines))
    return path


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_a_process_makes_what_is_made_here_and_leaves_nothing_in_this_one(
    cache: Path, tmp_path: Path, tokenizer: KnownTokenizer
) -> None:
    """Mutations tried: the checked rows are tokenised in another order; a reading is not told."""
    path = write_rows(tmp_path / "rows.jsonl", 2500)
    job = job_of(path, tokenizer)
    apart = list(make_tokens_apart(job))
    here = list(make_tokens(job_of(path, tokenizer, name="here")))
    assert apart == here
    assert [(reading.doing, reading.num_rows) for reading in apart] == [
        (doing, num_rows) for doing in ("checking", "tokenising") for num_rows in (1000, 2000)
    ]
    for made in (cache / "tokens" / "here").iterdir():
        assert made.read_bytes() == (job.folder / made.name).read_bytes(), made.name
    assert psutil.Process().children() == []


def test_the_process_imports_no_torch_and_this_one_no_datasets(
    cache: Path, tmp_path: Path, tokenizer: KnownTokenizer
) -> None:
    """Neither library's memory is there beside the other's. Both are asked in processes that have just begun."""
    modules = "import sys; import qlora_trainer.data.token_process, datasets, transformers; "
    asked = modules + "from transformers import PreTrainedTokenizerFast; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout == "False\n"
    path = write_rows(tmp_path / "rows.jsonl", 40)
    saved = tmp_path / "tokenizer"
    tokenizer.tokenizer.save_pretrained(saved)
    code = f"""
import sys
from collections import deque
from transformers import PreTrainedTokenizerFast
from qlora_trainer.config.schema import DataSection
from qlora_trainer.data.known_tokenizer import KnownTokenizer
from qlora_trainer.data.token_cache import tokenize_named
fast = PreTrainedTokenizerFast.from_pretrained({str(saved)!r})
deque(tokenize_named(DataSection(train={str(path)!r}), "train", KnownTokenizer(fast, "hash", "base")))
print([name for name in ("datasets", "pyarrow", "pandas") if name in sys.modules])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"
    assert len(list((cache / "tokens").iterdir())) == 1


@pytest.mark.parametrize("kind", [DataError, ConfigError, StorageError])
def test_an_error_is_the_one_that_is_raised_here(
    cache: Path, tmp_path: Path, chatml: PreTrainedTokenizerFast, kind: type[Exception]
) -> None:
    """Mutation tried: an error's kind is not told."""
    path = write_rows(tmp_path / "rows.jsonl", 3)
    known = KnownTokenizer(chatml, "hash", "the base")
    if kind is DataError:
        path.write_text(path.read_text() + '\n{"prompt": "<|im_end|>", "completion": "yes"}')
    elif kind is ConfigError:
        plain = tokenizer_of(tokenizer_content(chatml) | {"chat_template": None})
        known = KnownTokenizer(plain, "hash", "the base")
    else:
        (cache_folder() / "tokens").write_text("not a folder")
    raised = []
    for make in (make_tokens, make_tokens_apart):
        with pytest.raises(kind) as refused:
            list(make(job_of(path, known)))
        raised.append((type(refused.value), vars(refused.value), str(refused.value)))
    assert raised[0] == raised[1]
    assert psutil.Process().children() == []


@pytest.fixture
def begun(cache: Path, tmp_path: Path, tokenizer: KnownTokenizer) -> Iterator[Begun]:
    """A process in the midst of tokenising, and what it tells."""
    job = job_of(write_rows(tmp_path / "rows.jsonl", NUM_ROWS), tokenizer)
    readings = make_tokens_apart(job)
    while next(readings).doing != "tokenising":
        pass
    [process] = psutil.Process().children()
    assert len(list((cache / "tokens").glob(".tmp-*"))) == 1
    yield readings, process
    readings.close()


def test_who_waits_no_longer_ends_it_and_it_leaves_nothing(cache: Path, begun: Begun) -> None:
    """Mutation tried: the process dies of SIGTERM as any does, and its unfinished folder stays."""
    readings, process = begun
    readings.close()
    assert not process.is_running()
    assert [path for path in cache.rglob("*") if path.is_file()] == []
    assert list((cache / "tokens").iterdir()) == []


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGABRT])
def test_one_that_is_ended_from_outside_is_told_as_such(cache: Path, begun: Begun, sent: signal.Signals) -> None:
    """As the kernel, a daemon and libraries do where memory is short. One that is killed leaves its folder."""
    readings, process = begun
    process.send_signal(sent)
    with pytest.raises(DoesNotFitError, match=r"tokenising the data: found a process that was ended from outside"):
        list(readings)
    assert len(list((cache / "tokens").iterdir())) == (sent != signal.SIGTERM)


def test_one_that_ends_without_a_word_is_an_error_of_ours(cache: Path, begun: Begun) -> None:
    readings, process = begun
    process.send_signal(signal.SIGSEGV)
    with pytest.raises(RuntimeError, match=r"tokenises data\.train ended with -11"):
        list(readings)


@pytest.mark.parametrize("failing", ["MemoryError()", "OSError(12, 'Cannot allocate memory')"])
def test_too_little_memory_is_told_as_such(
    cache: Path, tmp_path: Path, tokenizer: KnownTokenizer, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """Mutation tried: any OSError is told as a broken disk."""
    code = f"""
import datasets
def fails(*_, **__):
    raise {failing}
datasets.Dataset.from_file = fails
"""
    (tmp_path / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(
        DoesNotFitError, match=r"tokenising the data: found too little of it; expected memory .* Free memory"
    ):
        list(make_tokens_apart(job_of(write_rows(tmp_path / "rows.jsonl", 3), tokenizer)))
    assert list((cache / "tokens").iterdir()) == []


def test_a_python_that_cannot_be_started_is_told(
    cache: Path, tmp_path: Path, tokenizer: KnownTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no python"))
    with pytest.raises(StorageError, match=r"found a Python that cannot be started again.*\(No such file"):
        list(make_tokens_apart(job_of(write_rows(tmp_path / "rows.jsonl", 3), tokenizer)))


@pytest.mark.parametrize("sent", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_it_ends_with_the_process_that_began_it(
    cache: Path, tmp_path: Path, tokenizer: KnownTokenizer, sent: signal.Signals
) -> None:
    """A real command, killed or interrupted while its data is tokenised: nobody goes on, nothing is left or printed.

    It does not get to the next line: there is none before a thousand rows, and rows are of 20 kB. Mutations tried: it
    learns of the other's end by a line that nobody reads; it flushes what nobody reads.
    """
    long = " ".join(map(str, range(4000)))
    path = tmp_path / "rows.jsonl"
    row = json.dumps({"prompt": "Count.", "completion": long})
    path.write_text("\n".join([row] * 500))
    saved = tmp_path / "tokenizer"
    tokenizer.tokenizer.save_pretrained(saved)
    code = f"""
import signal
from transformers import PreTrainedTokenizerFast
from qlora_trainer.config.schema import DataSection
from qlora_trainer.data.known_tokenizer import KnownTokenizer
from qlora_trainer.data.token_cache import tokenize_named
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
fast = PreTrainedTokenizerFast.from_pretrained({str(saved)!r})
list(tokenize_named(DataSection(train={str(path)!r}), "train", KnownTokenizer(fast, "hash", "base")))
"""
    tokens = cache / "tokens"
    with (
        (tmp_path / "stderr").open("w") as stderr,
        subprocess.Popen([sys.executable, "-c", code], stderr=stderr) as command,
    ):
        until(lambda: bool(list(tokens.glob(".tmp-*"))), "nothing is tokenised")
        [maker] = psutil.Process(command.pid).children()
        command.send_signal(sent)
        command.wait(PATIENCE_SECONDS)
        ended = time.monotonic()
        until(lambda: not maker.is_running(), "the process goes on")
        assert time.monotonic() - ended < 3, "it went on to its next line"
    assert command.returncode == -sent
    assert list(tokens.iterdir()) == []
    told = (tmp_path / "stderr").read_text()
    assert told == "" if sent == signal.SIGKILL else told.endswith("\nKeyboardInterrupt\n")
    assert "BrokenPipe" not in told
    assert "SystemExit" not in told


@pytest.mark.slow
def test_closed_descriptors_do_no_harm(cache: Path, tmp_path: Path, tokenizer: KnownTokenizer) -> None:
    """Of a daemon, say. Mutation tried: the pipe has the numbers that are free."""
    path = write_rows(tmp_path / "rows.jsonl", 1200)
    saved = tmp_path / "tokenizer"
    tokenizer.tokenizer.save_pretrained(saved)
    code = f"""
import os, sys
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from qlora_trainer.config.schema import DataSection
from qlora_trainer.data.known_tokenizer import KnownTokenizer
from qlora_trainer.data.token_cache import tokenize_named
for number in (0, 1, 2):
    os.close(number)
fast = PreTrainedTokenizerFast.from_pretrained({str(saved)!r})
seen = list(tokenize_named(DataSection(train={str(path)!r}), "train", KnownTokenizer(fast, "hash", "base")))
Path({str(tmp_path / "seen")!r}).write_text(str([reading.num_rows for reading in seen]))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "seen").read_text() == "[1000, 1000]"


def test_modules_are_those_of_the_process_that_begins_it(
    cache: Path, tmp_path: Path, tokenizer: KnownTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the working folder that has a library's name is no library. Mutation tried: `python -m`."""
    (tmp_path / "datasets.py").write_text("raise SystemExit('not this one')")
    (tmp_path / "json.py").write_text("raise SystemExit('nor this one')")
    path = write_rows(tmp_path / "rows.jsonl", 3)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    assert list(make_tokens_apart(job_of(path, tokenizer))) == []
    assert (cache / "tokens" / "made").is_dir()


def test_what_a_library_prints_is_no_line_of_the_process(
    cache: Path,
    tmp_path: Path,
    tokenizer: KnownTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Neither when Python begins, nor in the midst of tokenising. Mutation tried: lines go to the standard output."""
    prints = "print('begun')\nimport datasets\ndatasets.Dataset.with_format = lambda *_: print('7') or 1 / 0\n"
    (tmp_path / "sitecustomize.py").write_text(prints)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="ended with 1"):
        list(make_tokens_apart(job_of(write_rows(tmp_path / "rows.jsonl", 3), tokenizer)))
    told = capfd.readouterr()
    assert told.out == ""
    assert "begun\n7\n" in told.err
    assert "ZeroDivisionError" in told.err


def test_sources_are_those_that_were_sent() -> None:
    sources = (
        Path("a/\udcff.jsonl"),  # a name that is no UTF-8
        DatasetFolder("f:train", Path("f/train"), (Path("f/train/x.arrow"), Path("f/train/y.arrow"))),
        HubDataset("o/n/s:t", "o/n", "s", "t", "a" * 40),
    )
    to_json, from_json = vars(token_job)["_source_as_json"], vars(token_job)["_source_of"]
    assert tuple(from_json(json.loads(json.dumps(to_json(source)))) for source in sources) == sources


def test_a_tokenizer_is_made_from_its_content(
    chatml: PreTrainedTokenizerFast, llama3: PreTrainedTokenizerFast, mistral: PreTrainedTokenizerFast
) -> None:
    """Tokens, special tokens by name, template. Mutations tried, for each of the three: it is not written down."""
    text = "<|im_start|>user\nHello, world!<|im_end|>\n[INST] é"
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "World"}]
    for tokenizer in (chatml, llama3, mistral):
        made = tokenizer_of(json.loads(json.dumps(tokenizer_content(tokenizer))))
        assert tokenizer_hash(made) == tokenizer_hash(tokenizer)
        assert made(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert made.apply_chat_template(messages, tokenize=False) == tokenizer.apply_chat_template(
            messages, tokenize=False
        )
        assert made.added_tokens_decoder == tokenizer.added_tokens_decoder


def test_special_tokens_that_are_plain_text_stay_so(chatml: PreTrainedTokenizerFast) -> None:
    """`tokenizers` writes nothing of it. Mutation tried: nor do we."""
    splits = tokenizer_of(tokenizer_content(chatml) | {"split_special_tokens": True})
    made = tokenizer_of(json.loads(json.dumps(tokenizer_content(splits))))
    text = "<|im_start|>a"
    assert made(text)["input_ids"] == splits(text)["input_ids"] != chatml(text)["input_ids"]
    assert tokenizer_hash(splits) != tokenizer_hash(chatml)
    assert "split_special_tokens" not in tokenizer_content(chatml), "hashes of runs that were begun before"


def test_a_tokenizer_that_would_be_another_one_is_not_taken(chatml: PreTrainedTokenizerFast) -> None:
    """Mutation tried: nobody looks."""
    content = tokenizer_content(chatml)
    with pytest.raises(ConfigError, match="another when it is made"):
        tokenizer_of(content | {"backend": content["backend"] + " "})

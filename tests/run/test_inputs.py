"""What is refused, or told, before any weight is loaded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers.normalizers import Lowercase
from transformers import PreTrainedConfig

from qlora_trainer.data.split import hold_out
from qlora_trainer.hardware.sealed_folder import sha256_of
from qlora_trainer.report.reading import watched
from qlora_trainer.report.screen import stderr_console
from qlora_trainer.run import prepare
from qlora_trainer.run.answer import answer
from qlora_trainer.run.checkpoint.manifest import read_manifest
from qlora_trainer.run.inputs import decide_seq_len, find_base, known_tokenizer, read_inputs
from qlora_trainer.run.records import Prepared, Preparing, RowsSkipped, StepDone
from tests.data.saved_sets import save_splits
from tests.run.tiny_run import CHATML, rows, run_to_end, run_until_step, tiny_config, write_base, write_rows
from tests.run.told import complaint, train_command

LONG_MESSAGES = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "It is 2. " * 60}]


pytestmark = pytest.mark.usefixtures("plans_made_once")


@pytest.fixture
def base(base: Path, tmp_path: Path) -> Path:
    """A copy, which may be changed."""
    return Path(shutil.copytree(base, tmp_path / "base"))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def loading(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were touched")

    for name in ("fetch_weights", "prepare_nf4_cache", "load_quantized"):
        monkeypatch.setattr(prepare, name, loading)


@pytest.mark.usefixtures("nothing_loaded")
def test_fewer_documents_than_a_batch_are_refused_with_counts(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "rows.jsonl", 9)
    assert train_command(tiny_config(tmp_path, base)) == 4
    assert (
        "found 7 documents to train on (0 dropped, 2 held out); expected at least training.global_batch_size = 8"
        in (complaint(capsys))
    )
    assert not (tmp_path / "run").exists()


def test_a_base_without_a_limit_takes_any_seq_len(tmp_path: Path, base: Path) -> None:
    """Mutation tried: no more than the longest document has, which is no limit of the base."""
    config = tiny_config(tmp_path, base, "data.seq_len=200")
    found = watched(read_inputs(config), stderr_console())
    assert found.data.train.documents.lengths.longest < 200
    assert decide_seq_len(config, replace(found.base, config=PreTrainedConfig()), found.data.train) == 200


@pytest.mark.usefixtures("nothing_loaded")
def test_too_small_a_seq_len_is_refused_with_counts(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_command(tiny_config(tmp_path, base, "data.seq_len=16")) == 4
    assert "48 of 48 rows that cannot be trained on" in complaint(capsys)


@pytest.mark.usefixtures("nothing_loaded")
def test_no_data_is_refused(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text("\n\n")
    assert train_command(tiny_config(tmp_path, base)) == 4
    assert "rows.jsonl: found no rows" in complaint(capsys)


@pytest.mark.usefixtures("nothing_loaded")
def test_a_tokenizer_without_chat_template_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_base(tmp_path / "base", chat_template=None)
    capsys.readouterr()  # transformers shows how it writes
    assert train_command(tiny_config(tmp_path, base)) == 2
    assert "chat template" in complaint(capsys)


@pytest.mark.usefixtures("nothing_loaded")
def test_a_tokenizer_of_another_base_is_refused(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its ids would be rows that the embedding does not have; a smaller tokenizer is normal, and every other test's."""
    path = base / "config.json"
    config = json.loads(path.read_text())
    config["vocab_size"] -= 1
    path.write_text(json.dumps(config))
    assert train_command(tiny_config(tmp_path, base)) == 2
    largest_id = config["vocab_size"]
    assert f"a tokenizer with the id {largest_id}" in complaint(capsys)


def test_a_tokenizer_without_padding_token_is_enough(tmp_path: Path, base: Path) -> None:
    path = base / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["pad_token"]
    path.write_text(json.dumps(config))
    overrides = ("training.max_steps=1", "data.packing=false", "output.sample_questions=2")
    assert run_to_end(tiny_config(tmp_path, base, *overrides))


def test_bad_rows_are_skipped_only_where_that_is_asked(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 60)
    path.write_text(path.read_text() + '{"messages": 3}\nnonsense\n')
    assert train_command(tiny_config(tmp_path, base)) == 4
    assert "rows.jsonl:61: found" in complaint(capsys)
    assert train_command(tiny_config(tmp_path, base, "data.on_bad_row=skip", "training.max_steps=1")) == 0
    out = capsys.readouterr().out
    assert "2 bad rows of" in out
    assert "rows.jsonl:62: broken JSON" in out
    options = ("data.on_bad_row=skip", "training.max_steps=1", f"output.dir={tmp_path / 'other'}")
    records = run_to_end(tiny_config(tmp_path, base, *options))
    (skipped,) = [record for record in records if isinstance(record, RowsSkipped)]
    assert skipped.num_rows == 2
    (prepared,) = [record for record in records if isinstance(record, Prepared)]
    assert prepared.num_train_documents == 48


@pytest.mark.usefixtures("nothing_loaded")
def test_a_hub_id_that_is_nothing_is_told_before_anything_is_loaded(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No test has a network."""
    assert train_command(tiny_config(tmp_path, base, "data.train=nobody/nothing:train")) == 4
    assert "nobody/nothing:train: found no such file or folder, and nothing that could be fetched" in complaint(capsys)


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize("key", ["train", "eval"])
def test_more_bad_rows_than_may_be_dropped_are_refused_with_counts(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    """Mutation tried: bad rows of the evaluation files not counted."""
    path = write_rows(tmp_path / "some.jsonl", 60)
    path.write_text(path.read_text() + "nonsense\n" * 4)
    options = ("data.on_bad_row=skip", f"data.{key}={path}")
    assert train_command(tiny_config(tmp_path, base, *options)) == 4
    num_rows = 52 if key == "train" else 64
    assert f"found 4 of {num_rows} rows that cannot be trained on (4 bad ones, " in complaint(capsys)
    with pytest.raises(AssertionError, match="weights were touched"):
        run_to_end(tiny_config(tmp_path, base, *options, "data.max_dropped_share=0.08"))


def test_a_folder_of_datasets_is_trained_on_and_known_again(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The course is that of the same rows in a file; other rows are other training data."""
    folder = save_splits(tmp_path / "set", train=rows(60), test=rows(4))
    options = ("training.max_steps=3", "training.save_every=1")
    of_file = run_to_end(tiny_config(tmp_path, base, *options))
    config = tiny_config(tmp_path, base, *options, f"data.train={folder}:train", f"output.dir={tmp_path / 'other'}")
    run_until_step(config, 3)  # a save is done once the next record is asked for
    of_folder = run_to_end(config, resume="auto")
    losses = [[record.loss for record in records if isinstance(record, StepDone)] for records in (of_file, of_folder)]
    assert 0 < len(losses[1]) < 3, "it did not go on"
    assert losses[0][-len(losses[1]) :] == losses[1]
    told = [record.what for record in of_folder if isinstance(record, Preparing)]
    assert f"60 rows of the form messages in {folder}:train" in told
    shutil.rmtree(folder)
    save_splits(folder, train=rows(61)[1:], test=rows(4))
    capsys.readouterr()  # the library shows how it writes
    assert train_command(config, "--resume", "auto") == 2
    assert "found another training data than this run began with" in complaint(capsys)


def test_a_plain_text_needs_no_chat_template(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", chat_template=None)
    texts = [json.dumps({"text": f"{number} and {number} are {2 * number}. " * 6}) for number in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(texts))
    records = run_to_end(tiny_config(tmp_path, base, "training.max_steps=1", "output.sample_questions=2"))
    (prepared,) = [record for record in records if isinstance(record, Prepared)]
    assert prepared.num_train_documents == 24
    assert prepared.num_tokens - prepared.num_supervised_tokens == 24  # only the first token of each
    told = [record.what for record in records if isinstance(record, Preparing)]
    assert f"30 rows of the form text in {tmp_path / 'rows.jsonl'}" in told


def test_a_template_of_the_config_is_used_and_kept_beside_the_adapter(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutation tried: `generate` with the template of the base; the model is asked in other words than it learned."""
    template = tmp_path / "mine.jinja"
    template.write_text("Be brief. " + CHATML)
    config = tiny_config(tmp_path, base, f"data.chat_template={template}", "training.max_steps=2")
    run_to_end(config)
    assert (tmp_path / "run" / "adapter" / "chat_template.jinja").read_text() == template.read_text()
    asked: list[str] = []

    def encode_prompt(text: str, tokenizer: object) -> list[int]:
        asked.append(text)
        return [0]

    monkeypatch.setattr("qlora_trainer.data.chat.encode_prompt", encode_prompt)
    answer(tmp_path / "run", "2 + 2?", base=None, max_new_tokens=1, temperature=0.0, seed=0)
    assert asked[0].startswith("Be brief. <|im_start|>user")
    template.write_text(CHATML)
    capsys.readouterr()
    assert train_command(config, "--resume", "auto") == 2
    assert "found another tokenizer than this run began with" in complaint(capsys)


def test_a_conversation_needs_a_chat_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_base(tmp_path / "base", chat_template=None)
    capsys.readouterr()
    assert train_command(tiny_config(tmp_path, base)) == 2
    assert "a tokenizer without a chat template" in complaint(capsys)


@pytest.mark.parametrize("overlong", ["drop", "truncate", "split", "error"])
def test_what_is_too_long_is_handled_as_asked_and_told(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], overlong: str
) -> None:
    lines = write_rows(tmp_path / "rows.jsonl", 40).read_text().splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:20]))
    (tmp_path / "b.jsonl").write_text("\n".join([*lines[20:], json.dumps({"messages": LONG_MESSAGES})]))
    config = tiny_config(
        tmp_path,
        base,
        f"data.train={tmp_path / '[ab].jsonl'}",
        f"data.eval={tmp_path / 'rows.jsonl'}",
        "data.seq_len=64",
        f"data.overlong={overlong}",
        "training.max_steps=1",
    )
    if overlong == "error":
        assert train_command(config) == 4
        assert "b.jsonl:21: found a row of" in complaint(capsys)
        return
    records = run_to_end(config)
    (prepared,) = [record for record in records if isinstance(record, Prepared)]
    told = "; ".join(record.what for record in records if isinstance(record, Preparing))
    assert f"81 rows of the form messages in {tmp_path / 'a.jsonl'} and 2 more" in told
    assert prepared.num_dropped_documents == (1 if overlong == "drop" else 0)
    assert ("1 rows were cut" in told, "1 rows were split" in told) == (overlong == "truncate", overlong == "split")
    assert (prepared.num_train_documents > 41) == (overlong == "split")


def test_one_long_row_of_a_small_held_out_part_does_not_stop_a_run(tmp_path: Path, base: Path) -> None:
    """Mutation tried: 5 % of what is held out, which is less than one row."""
    lines = write_rows(tmp_path / "rows.jsonl", 60).read_text().splitlines()
    options = ("data.eval_fraction=0.1", "data.seq_len=64", "training.max_steps=1")
    number = hold_out(60, 0.1, 0)[1][0]
    lines[number] = json.dumps({"messages": LONG_MESSAGES})
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (prepared,) = [r for r in run_to_end(tiny_config(tmp_path, base, *options)) if isinstance(r, Prepared)]
    assert (prepared.num_train_documents, prepared.num_eval_documents) == (54, 5)


def test_another_base_at_resume_is_refused(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path, base)
    run_until_step(config, 3)
    path = base / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1  # the lowest bit of a weight
    path.write_bytes(data)
    assert train_command(config, "--resume", "auto") == 2
    assert "found another base than this run began with (sha256: base " in complaint(capsys)


@pytest.mark.parametrize("change", ["the normalizer", "the special token that ends a turn", "the template"])
def test_a_tokenizer_is_known_by_what_it_does(tmp_path: Path, base: Path, change: str) -> None:
    """Whatever file says so. Mutation tried: a list of file names, of which the changed one is none."""
    found = find_base(tiny_config(tmp_path, base))
    before = known_tokenizer(tiny_config(tmp_path, base), *found).content_hash
    assert known_tokenizer(tiny_config(tmp_path, base), *find_base(tiny_config(tmp_path, base))).content_hash == before
    tokenizer = found[1]
    if change == "the normalizer":
        tokenizer.backend_tokenizer.normalizer = Lowercase()
    elif change == "the template":
        tokenizer.chat_template = f"{tokenizer.chat_template} "
    else:
        tokenizer.eos_token = "<|im_start|>"
    assert known_tokenizer(tiny_config(tmp_path, base), *found).content_hash != before


def test_a_manifest_has_a_fingerprint_of_all_that_a_run_is_made_of(tmp_path: Path, base: Path) -> None:
    """Mutation tried: without the config's."""
    made_of = []
    for rate in ("1e-3", "2e-3"):
        config = tiny_config(tmp_path, base, f"training.learning_rate={rate}", f"output.dir={tmp_path / rate}")
        run_until_step(config, 3)
        made_of.append(dict(read_manifest(tmp_path / rate / "checkpoints" / "last").fingerprints))
    first, second = made_of
    assert set(first) == {"base", "tokenizer", "training data", "config"}
    assert all(len(value) >= 32 for value in first.values())
    assert first.pop("config") != second.pop("config")
    assert first == second


def test_all_that_changed_is_named_at_resume_with_both_hashes(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutations tried: naming the first change only; no hash of the tokenizer, or of the evaluation data."""
    held_out = write_rows(tmp_path / "eval.jsonl", 8)
    config = tiny_config(tmp_path, base, f"data.eval={held_out}", "data.eval_fraction=0")
    run_until_step(config, 3)
    began_with = read_manifest(tmp_path / "run" / "checkpoints" / "last").fingerprints
    template = base / "chat_template.jinja"
    template.write_text("{# changed #}" + template.read_text())
    for path in (tmp_path / "rows.jsonl", held_out):
        path.write_text(path.read_text().replace("What is 3 + 3", "What is 3+3"))
    assert train_command(config, "--resume", "auto") == 2
    told = complaint(capsys)
    assert "another tokenizer and another training data and another evaluation data than this run began with" in told
    for name, path in (("training data", tmp_path / "rows.jsonl"), ("evaluation data", held_out)):
        assert f"{name} {began_with[name][:12]} -> {sha256_of(path)[:12]}" in told
    assert f"tokenizer {began_with['tokenizer'][:12]} -> " in told

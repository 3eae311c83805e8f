from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_trainer.config.did_you_mean import DOTTED_KEYS
from qlora_trainer.config.load import load_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.errors import ConfigError

SMALLEST = ("model.base=owner/name", "data.train=train.jsonl")


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path | None, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_file_with_overrides(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        model: {base: smollm2-135m}
        data:
          train: train.jsonl
          seq_len: 256
        training:
          learning_rate: 1e-4
        memory:
          budget: 8GiB
        lora:
          # every key of this section is commented out
        """,
    )
    config = load_config(
        path, ["training.learning_rate=3e-4", "lora.target_modules=[q_proj, v_proj]", "data.seq_len=auto"]
    )
    assert config.model.base == "smollm2-135m"
    assert config.training.learning_rate == 3e-4
    assert config.memory.budget == 8 * 2**30
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert config.data.seq_len == "auto"


def test_overrides_alone_and_the_last_one_wins() -> None:
    config = load_config(None, [*SMALLEST, "lora.rank=8", "lora.rank=4", "data.train=a=b.jsonl", "data.eval="])
    assert config.lora.rank == 4
    assert config.data.train == "a=b.jsonl"
    assert config.data.eval is None


def test_an_override_heals_a_wrong_value_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "model: {base: a/b}\ndata: {train: t}\nlora: {rank: many}\n")
    assert load_config(path, ["lora.rank=8"]).lora.rank == 8


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = written(tmp_path, "\ufeffmodel: {base: a/b}\ndata: {train: t}\n")
    assert load_config(path).model.base == "a/b"


@pytest.mark.parametrize(
    "text,where,said",
    [
        ("lora:\n  rank: many\n", "run.yaml:2", 'lora.rank = "many"; expected a valid integer'),
        ("lora:\n  rank: 8\n  lora_r: 8\n", "run.yaml:3", "the unknown key lora.lora_r; expected a key of lora"),
        ("learning_rate: 1e-4\n", "run.yaml:1", "Did you mean training.learning_rate?"),
        ("\n\ntraning:\n  epochs: 1\n", "run.yaml:3", "Did you mean the section training?"),
        ("training:\n  learnin_rate: 1\n", "run.yaml:2", "Did you mean training.learning_rate?"),
        ("data:\n  cutoff_len: 512\n", "run.yaml:2", "Did you mean data.seq_len?"),
        ("lora: 16\n", "run.yaml:1", "Its keys are rank, alpha"),
        ("memory:\n  budget: 8 bananas\n", "run.yaml:2", 'memory.budget = "8 bananas"; expected a size above zero'),
        (
            "data: {seq_len: 64}\nmemory:\n  micro_batch_tokens: 8\n",
            "run.yaml:3",
            "expected at least data.seq_len = 64",
        ),
        ("training: {optimizer: adam}", "run.yaml:1", "'adamw_32bit'"),
        ("a: [", "run.yaml:1", "plain YAML"),
        ("- a\n", "run.yaml", "the sections model, quantization"),
        ("just text", "run.yaml", '"just text"'),
    ],
)
def test_mistakes_are_told_with_their_line(tmp_path: Path, text: str, where: str, said: str) -> None:
    error = refusal(written(tmp_path, text), *SMALLEST)
    assert error.where == str(tmp_path / where)
    assert said in str(error)


def test_the_first_mistake_is_told_and_the_others_counted(tmp_path: Path) -> None:
    path = written(tmp_path, "model:\n  base: 3\ntraining:\n  epochs: -1\n  lr: 1\nlora: {rank: 0}\n")
    error = refusal(path, "lora.dropout=2")
    assert error.where == f"{path}:2"
    assert str(error).endswith("(5 more problems.)")  # epochs, lr, rank, dropout and the missing data.train
    assert str(refusal(path, "model.base=a/b", "data.train=t", "lora.rank=1")).endswith("(1 more problem.)")


@pytest.mark.parametrize(
    "override,said",
    [
        ("lora.rank", "--set lora.rank: found no section.key=value"),
        ("lora=8", "--set lora=8: found no section.key=value"),
        ("=8", "--set =8: found no section.key=value"),
        ("rank=8", "--set rank: found the unknown key rank; expected a section. Did you mean lora.rank?"),
        ("lora.rank.x=8", "the unknown key lora.rank.x"),
        ("lora.rank={", "--set lora.rank:1: found a YAML error"),
        ("lora.rank=eight", '--set lora.rank: found lora.rank = "eight"; expected a valid integer'),
        ("load_in_4bit=true", "Delete it: the base is always quantized to NF4."),
    ],
)
def test_wrong_overrides(override: str, said: str) -> None:
    assert said in str(refusal(None, *SMALLEST, override))


def test_missing_keys_are_named() -> None:
    error = str(refusal(None))
    assert "no model.base" in error
    assert "--set model.base=VALUE" in error
    assert "1 more problem" in error


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in str(refusal(None, *SMALLEST, 'lora.dtype="\\e[2J"'))


@pytest.mark.parametrize(
    "content,said",
    [(b"a: \xff", "not UTF-8 at offset 3"), (b"x" * 2**21, "2,097,152 characters")],
)
def test_files_that_are_no_config(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    assert said in str(refusal(path))


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    assert "no such file" in str(refusal(tmp_path / "none.yaml"))
    assert "is a directory" in str(refusal(tmp_path))
    assert "NUL" in str(refusal(Path("a\0b")))
    assert "too long" in str(refusal(Path("x" * 300)))


@given(st.lists(st.sampled_from(DOTTED_KEYS) | st.text(max_size=9), max_size=3), st.text(max_size=12))
def test_any_override_is_applied_or_refused(keys: list[str], value: str) -> None:
    try:
        config = load_config(None, [*SMALLEST, *(f"{key}={value}" for key in keys)])
    except ConfigError as error:
        assert error.where.startswith("--set")
    else:
        assert isinstance(config, RunConfig)


@settings(max_examples=30)
@given(
    st.dictionaries(st.sampled_from(["model", "data", "lora", "x"]), st.none() | st.integers() | st.text(max_size=5))
)
def test_any_top_level_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, top: dict[str, object]) -> None:
    lines = [f"{key}: {'' if value is None else repr(value)}" for key, value in top.items()]
    path = written(tmp_path_factory.mktemp("any"), "\n".join(lines))
    refusal(path)  # model.base is missing at least

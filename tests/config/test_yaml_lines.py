from __future__ import annotations

import re

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qlora_trainer.config.yaml_lines import MAX_TEXT_CHARACTERS, read_yaml, write_yaml, write_yaml_line
from qlora_trainer.errors import ConfigError

TEXTS = st.text(st.characters(codec="utf-8"), max_size=20) | st.from_regex(r"[-+0-9.eE_:xob~]{1,8}", fullmatch=True)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(TEXTS, SCALARS, max_size=3)


@settings(max_examples=50)
@given(st.dictionaries(TEXTS, VALUES, max_size=3))
def test_written_values_are_read_back(value: dict[str, object]) -> None:
    assert read_yaml(write_yaml(value), name="run.yaml").value == value


@given(SCALARS | st.lists(SCALARS, max_size=3))
@example("\n")
@example(["a\nb", "\n\n"])
def test_values_on_one_line_are_read_back(value: object) -> None:
    line = write_yaml_line(value)
    assert "\n" not in line
    assert read_yaml(f"key: {line}\n", name="run.yaml").value == {"key": value}


def is_read_differently(text: str) -> bool:
    return re.match(r"[-+.0-9]+e|[0-9]{4}-", text, re.IGNORECASE) is not None


@settings(max_examples=50)
@given(st.dictionaries(TEXTS.filter(lambda text: not is_read_differently(text)), st.integers() | st.booleans()))
def test_reads_what_safe_load_reads(value: dict[str, object]) -> None:
    text = yaml.safe_dump(value)
    assert read_yaml(text, name="run.yaml").value == yaml.safe_load(text)


@pytest.mark.parametrize(
    "text,value",
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5e1", 5.0),
        ("1.e2", 100.0),
        ("'1e-4'", "1e-4"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("1e-4x", "1e-4x"),
        ("2026-01-31", "2026-01-31"),
        ("null", None),
        ("", None),
        ("8GiB", "8GiB"),
    ],
)
def test_scalars(text: str, value: object) -> None:
    read = read_yaml(text, name="--set").value
    assert read == value
    assert type(read) is type(value)


def test_remembers_lines() -> None:
    lines = read_yaml("# first\na:\n  b: 1\n\n  c: [x,\n    y]\nd: {e: 2}\n", name="run.yaml").lines
    assert lines == {
        ("a",): 2,
        ("a", "b"): 3,
        ("a", "c"): 5,
        ("a", "c", "0"): 5,
        ("a", "c", "1"): 6,
        ("d",): 7,
        ("d", "e"): 7,
    }


@pytest.mark.parametrize(
    "text,where,found",
    [
        ("a: 1\nb: {c: 1,\n  c: 2}\n", "run.yaml:3", "b.c a second time (first on line 2)"),
        ("a: 1\n? [x]\n: 2", "run.yaml:2", "the key a list or mapping"),
        ("yes: 1", "run.yaml:1", "the key yes"),
        ("3: 1", "run.yaml:1", "the key 3"),
        ("a: &x 1\nb: *x", "run.yaml:2", "the alias *x"),
        ("a: &x [*x]", "run.yaml:1", "the alias *x"),
        ("a: !!python/object/apply:os.system [ls]", "run.yaml:1", "a tag"),
        ("a: !!bool x", "run.yaml:1", "a tag"),
        ("a: 1\n<<: {b: 1}", "run.yaml:2", "a YAML error"),
        ("a: 'open\nb: 1", "run.yaml:2", "a YAML error"),
        ("a:\n\tb: 1", "run.yaml:2", "a YAML error"),
        ("a: 1\n---\nb: 1", "run.yaml:2", "a YAML error"),
        ("a: 1\nb: \x07", "run.yaml:2", "the character U+0007"),
        ("a: 0b_", "run.yaml", "a number that cannot be read"),
        (f"a: {'9' * 5000}", "run.yaml", "a number that cannot be read"),
        ("[" * 100_000, "run.yaml:1", "values nested more than 8 deep"),
        ("a:\n" + "".join(f"{' ' * depth}a:\n" for depth in range(1, 99)), "run.yaml:9", "more than 8 deep"),
        ("#" * (MAX_TEXT_CHARACTERS + 1), "run.yaml", "1,048,577 characters"),
    ],
)
def test_refuses_with_the_line(text: str, where: str, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_yaml(text, name="run.yaml")
    assert caught.value.where == where
    assert found in caught.value.found
    assert "\n" not in str(caught.value)


@given(st.text(st.characters(codec="utf-8")) | st.text("a:-[]{}!&*? \n\t'\"#|>%@,0123e.x<="))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        located = read_yaml(text, name="run.yaml")
    except ConfigError as error:
        assert error.where.startswith("run.yaml")
    else:
        assert all(1 <= line <= text.count("\n") + text.count("\r") + 3 for line in located.lines.values())

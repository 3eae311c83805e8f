"""Names that come from outside: they are shown, typed, and may become a file's name."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.config.adapter_names import check_adapter_name, name_of_folder, parse_named_folders
from qlora_trainer.errors import ConfigError


@pytest.mark.parametrize("name", ["a", "sums-2", "v1.0", "_x", "A" * 64])
def test_a_plain_name_is_taken(name: str) -> None:
    assert check_adapter_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "../x", "/abs", "a/b", "a\0", "x" * 300, "base", ".", "..", "a b", "é", "-x", "a\n"]
)
def test_others_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_adapter_name(name)
    message = str(caught.value)
    assert len(message) < 300
    assert message.isprintable()


def test_options_name_folders() -> None:
    assert parse_named_folders(["a=runs/lr=1e-4", "b=../x"]) == {"a": Path("runs/lr=1e-4"), "b": Path("../x")}
    for options, found in (
        (["runs/a"], "'runs/a'"),
        (["a="], "'a='"),
        (["=x"], "''"),
        (["a=x", "a=y"], "'a' twice"),
        (["../x=y"], "'../x'"),
    ):
        with pytest.raises(ConfigError, match=f"found {found}"):
            parse_named_folders(options)


@given(parts=st.lists(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"])), max_size=4))
def test_any_folder_gives_a_name_that_can_be_one(parts: list[str]) -> None:
    first = name_of_folder(Path("/", *parts))
    second = name_of_folder(Path("/", *parts), taken=(first,))
    assert check_adapter_name(second, taken=(check_adapter_name(first),)) == second


def test_a_run_gives_its_name_to_its_adapter() -> None:
    assert name_of_folder(Path("runs/quickstart")) == name_of_folder(Path("runs/quickstart/adapter")) == "quickstart"
    assert name_of_folder(Path("runs/sums v2")) == "sums-v2"
    assert name_of_folder(Path("runs/base")) == "base-adapter"
    assert name_of_folder(Path("b/run"), taken=("run",)) == "run-2"

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.config.sizes import MAX_SIZE_BYTES, format_size, parse_size_bytes


@pytest.mark.parametrize(
    "text,size_bytes",
    [
        ("8GiB", 8 * 2**30),
        ("500MiB", 500 * 2**20),
        ("6GB", 6_000_000_000),
        ("1.5 GiB", 3 * 2**29),
        ("1.1GiB", 1181116006),  # 1181116006.4 rounded down, not what a binary float gives
        ("12kb", 12_000),
        ("2 TiB", 2**41),
        ("1", 1),
        ("1073741824", 2**30),
        (" 7B ", 7),
        (str(MAX_SIZE_BYTES), MAX_SIZE_BYTES),
    ],
)
def test_reads_sizes(text: str, size_bytes: int) -> None:
    assert parse_size_bytes(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    [
        *["8 bananas", "", " ", "0", "0GiB", "0.1B", "-1GiB", "8G", "GiB", "1.5", "1e9", "1,000", "8  GiB", "8GiB!"],
        *["nan", "٣GiB", str(MAX_SIZE_BYTES + 1), "9" * 400, "99999999TiB", "8\nGiB", "0x10"],
    ],
)
def test_refuses_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="8GiB"):
        parse_size_bytes(text)


@given(st.integers(1, MAX_SIZE_BYTES))
def test_written_sizes_are_read_back_exactly(size_bytes: int) -> None:
    assert parse_size_bytes(format_size(size_bytes)) == size_bytes


def test_writes_the_largest_unit_that_is_exact() -> None:
    assert [format_size(size) for size in (2**33, 3 * 2**29, 2**20 + 1)] == ["8GiB", "1536MiB", "1048577B"]

"""What is promised of small cards, by trace: issue 8's figures for Llama 3.1 8B at rank 32 and Llama 2 70B."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.small_cards import GIB, PUBLISHED_CONTEXTS, traced, traced_row

MAX_BYTES_A_TOKEN = 100_000
TIMES_THE_PUBLISHED = 3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """All that the benchmark tells."""
    return traced()


def test_a_token_takes_a_hundred_kilobytes_at_most(rows: list[dict[str, Any]]) -> None:
    """Short of the model's positions and at the end of them. Without a lever it is four times that."""
    (row,) = [row for row in rows if row["what"] == "bytes a token"]
    assert len(row["spans"]) == 2
    for span in row["spans"]:
        assert 0 < span["pulled"] <= MAX_BYTES_A_TOKEN < span["recompute"]


@pytest.mark.parametrize("gib", PUBLISHED_CONTEXTS)
def test_a_context_is_three_times_the_published_one(gib: int, rows: list[dict[str, Any]]) -> None:
    (row,) = [row for row in rows if row.get("gib") == gib and row["what"] == "context"]
    assert row["published"] == PUBLISHED_CONTEXTS[gib]
    assert row["tokens"] >= TIMES_THE_PUBLISHED * row["published"]
    assert row["allocated_bytes"] < gib * GIB
    assert row["tokens_per_second"] > 0


@pytest.mark.parametrize("model, gib", [("llama-3.1-8b", 4), ("llama-2-70b", 12)])
def test_documents_of_2048_tokens_fit(model: str, gib: int, rows: list[dict[str, Any]]) -> None:
    """By plans that a trace at full depth confirmed."""
    (row,) = [row for row in rows if row["what"] == "card" and row["model"] == model]
    plan = row["plan"]
    assert plan["fits"]
    assert (plan["knobs"]["seq_len"], plan["budget_bytes"]) == (2048, gib * GIB)
    assert plan["predicted"]["process_peak_bytes"] <= gib * GIB
    assert "does not fit" not in traced_row(row)

"""What was given up, in words; the levers among it by name, unless they were asked for."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from qlora_trainer.config.levers import NO_LEVERS, Levers
from qlora_trainer.planning.explain import gave_up
from qlora_trainer.planning.price import Layout, Usage
from qlora_trainer.planning.search import Candidate, Space

SPACE = Space(
    rank=8,
    seq_len=64,
    rows_of=lambda _: 1,
    tokens=(64, 4096),
    loss_chunks=(64,),
    recompute=(0, 4),
    optimizer="adamw_32bit",
    offload=(0, 4),
)
ALL = Levers(tile_tokens=1024, embedding_residency="host", optimizer_on_host=True, base_residency="streamed")
WORDS = {
    "tile_tokens": "recomputed layers take 1,024 tokens at a time",
    "embedding_residency": "embedding and head live on the host",
    "optimizer_on_host": "the optimizer's state lives on the host",
    "base_residency": "the base is streamed from the host",
}


def told(levers: Levers, asked: Levers = NO_LEVERS, *, tokens: int = 4096, **layers: int) -> tuple[str, ...]:
    layout = Layout(rank=8, tokens=tokens, seq_len=64, rows=1, loss_chunk=64, levers=levers, num_recomputed=0)
    layout = replace(layout, **layers)  # type: ignore[arg-type]
    return gave_up(Candidate(layout, "adamw_32bit", Usage({"load": 0}, "load", {}, {}), 1.0), SPACE, asked)


def test_each_lever_that_a_plan_may_pull_has_words() -> None:
    assert WORDS.keys() == {field.name for field in fields(Levers)} - {"nf4_head"}  # which is only ever asked for
    assert told(ALL) == tuple(WORDS.values())
    assert told(NO_LEVERS) == ()


@pytest.mark.parametrize("name", WORDS)
def test_what_was_asked_for_is_not_given_up(name: str) -> None:
    asked = replace(NO_LEVERS, **{name: getattr(ALL, name)})
    assert told(ALL, asked) == tuple(words for other, words in WORDS.items() if other != name)
    assert told(asked) == (WORDS[name],)


def test_a_head_in_nf4_is_asked_for() -> None:
    packed = Levers(nf4_head=True)
    assert told(packed, packed) == ()


def test_the_least_is_told_first() -> None:
    assert told(ALL, tokens=64, num_recomputed=4, num_offloaded=1) == (
        "micro-batches of 64 tokens instead of 4,096",
        "4 layers recompute their activations",
        "the input of 1 layer waits on the host",
        *WORDS.values(),
    )

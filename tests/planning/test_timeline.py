"""Sizes as functions of tokens and rank, against a replay of the same events with plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.planning.timeline import (
    PROBE_PRIMES,
    Outline,
    Probe,
    choose_probe,
    outline,
    read_levels,
    read_segments,
)
from qlora_trainer.planning.tracker import CATEGORIES, Inside, StorageTracker

PROBE = Probe(tokens=PROBE_PRIMES[-1], rank=PROBE_PRIMES[0])
OTHER = CATEGORIES.index("other")


@dataclass(frozen=True, slots=True)
class Size:
    """`factor * T^0|1 * R^0|1` bytes."""

    factor: int
    has_tokens: bool
    has_rank: bool

    def at(self, tokens: int, rank: int) -> int:
        return self.factor * (tokens if self.has_tokens else 1) * (rank if self.has_rank else 1)


@dataclass(frozen=True, slots=True)
class Made:
    """A storage is made."""

    size: Size
    category: int
    is_device: bool


@dataclass(frozen=True, slots=True)
class Dropped:
    """The storage that was made `age` storages ago, of those alive, is dropped."""

    age: int


@dataclass(frozen=True, slots=True)
class Ran:
    """An operation that allocates inside itself ran."""

    factor: int
    category: int


Action = Made | Dropped | Ran | str  # a string is a mark

SIZES = st.builds(Size, st.integers(0, 1000), st.booleans(), st.booleans())
ACTIONS = st.one_of(
    st.builds(Made, SIZES, st.integers(0, len(CATEGORIES) - 1), st.sampled_from([True, True, False])),
    st.builds(Dropped, st.integers(0, 5)),
    st.builds(Ran, st.integers(0, 100), st.integers(0, len(CATEGORIES) - 1)),
)
PARTS = st.lists(st.lists(ACTIONS, max_size=12), min_size=1, max_size=4)


@dataclass(slots=True)
class Script:
    """What a tracker would have noted of some actions, at given tokens and rank."""

    tokens: int
    rank: int
    tracker: StorageTracker
    alive: list[tuple[int, int]]

    @classmethod
    def play(cls, before: Sequence[Action], parts: Sequence[Sequence[Action]], tokens: int, rank: int) -> Script:
        script = cls(tokens, rank, StorageTracker(), [])
        for action in before:
            script.act(action)
        for number, part in enumerate(parts):
            script.tracker.mark(number)
            for action in part:
                script.act(action)
        return script

    def act(self, action: Action) -> None:
        if isinstance(action, Made):
            index = self._note(action.size.at(self.tokens, self.rank), None, action.category, action.is_device)
            self.alive.append((index, self.tracker.events.num_bytes[index]))
        elif isinstance(action, Dropped) and self.alive:
            index, num_bytes = self.alive.pop(-1 - action.age % len(self.alive))
            events = self.tracker.events
            self._note(-num_bytes, index, events.category[index], events.is_device[index])
        elif isinstance(action, Ran):
            num_bytes = inside_of(action.factor, self.tokens)
            index = self._note(num_bytes, None, action.category, True)
            self.tracker.insides.append(Inside(index, "op", (action.factor,)))
            self._note(-num_bytes, index, action.category, True)

    def _note(self, num_bytes: int, made_at: int | None, category: int, is_device: bool) -> int:
        events, index = self.tracker.events, len(self.tracker.events.num_bytes)
        events.num_bytes.append(num_bytes)
        events.allocation.append(index if made_at is None else made_at)
        events.category.append(category)
        events.is_device.append(is_device)
        return index


def inside_of(factor: int, tokens: int) -> int:
    """What an operation of the script allocates inside itself: no line in tokens."""
    return factor * (tokens // 3) ** 2


@dataclass(frozen=True, slots=True)
class Replayed:
    net: dict[int, int]
    peak: int
    at_peak: dict[int, int]


def replay(script: Script, alignment: int, start: int, end: int, first: int) -> Replayed:
    """Add the events from `first` up to `end` one by one; the peak is looked for from `start` on."""
    events = script.tracker.events
    levels = dict.fromkeys(range(len(CATEGORIES)), 0)
    peak, at_peak = 0, dict(levels)
    for index in range(first, end):
        if events.is_device[index]:
            num_bytes = events.num_bytes[index]
            rounded = -(-abs(num_bytes) // alignment) * alignment
            levels[events.category[index]] += rounded if num_bytes > 0 else -rounded
        if index >= start and sum(levels.values()) > peak:
            peak, at_peak = sum(levels.values()), dict(levels)
    return Replayed(levels, peak, at_peak)


def by_category(found: Any) -> dict[int, int]:
    return dict(enumerate(found.tolist()))


@given(
    before=st.lists(ACTIONS, max_size=6),
    parts=PARTS,
    tokens=st.integers(1, 5000),
    rank=st.integers(1, 300),
    alignment=st.sampled_from([1, 512]),
)
def test_a_segment_at_any_size_is_what_a_replay_gives(
    before: list[Action], parts: list[list[Action]], tokens: int, rank: int, alignment: int
) -> None:
    segments = read_segments(Script.play(before, parts, PROBE.tokens, PROBE.rank).tracker, PROBE)
    script = Script.play(before, parts, tokens, rank)
    starts = [start for start, _ in script.tracker.events.marks] + [len(script.tracker.events.num_bytes)]
    assert list(segments) == list(range(len(parts)))
    for number, segment in enumerate(segments.values()):
        sizes = segment.sizes(
            tokens,
            rank,
            tile=0,
            alignment_bytes=alignment,
            inside_bytes=lambda one: inside_of(one.arguments[0], tokens),
        )
        found = outline(segment, sizes)
        expected = replay(script, alignment, starts[number], starts[number + 1], first=starts[number])
        assert by_category(found.net) == expected.net
        assert found.peak_bytes == expected.peak
        assert by_category(found.at_peak) == expected.at_peak


@given(before=st.lists(ACTIONS, max_size=6), parts=PARTS, alignment=st.sampled_from([1, 512]))
def test_levels_are_what_a_replay_gives(before: list[Action], parts: list[list[Action]], alignment: int) -> None:
    script = Script.play(before, parts, 100, 7)
    starts = [start for start, _ in script.tracker.events.marks] + [len(script.tracker.events.num_bytes)]
    levels = read_levels(script.tracker, alignment, lambda one: inside_of(one.arguments[0], 100))
    for number, level in enumerate(levels):
        whole = replay(script, alignment, starts[number], starts[number + 1], first=0)
        at_start = replay(script, alignment, 0, starts[number], first=0)
        assert level.label == number
        assert level.peak_bytes == max(whole.peak, sum(at_start.net.values()))
        assert sum(level.at_peak.values()) == level.peak_bytes
        if whole.peak > sum(at_start.net.values()):
            assert list(level.at_peak.values()) == list(whole.at_peak.values())


def crossing(first: object, second: object, *, category: int = OTHER) -> StorageTracker:
    """A storage that is made in one part and dropped in another."""
    script = Script(PROBE.tokens, PROBE.rank, StorageTracker(), [])
    script.tracker.mark(first)
    script.act(Made(Size(8, True, False), category, True))
    script.act(Made(Size(3, False, False), OTHER, True))
    script.tracker.mark(second)
    script.act(Dropped(1))
    return script.tracker


@pytest.mark.parametrize(
    "first, second, category, expected",
    [
        (("forward", 0), ("backward", 0), "other", "saved_activation"),
        ("embed", ("backward", 3), "other", "saved_activation"),
        ("loss", ("backward", 3), "other", "saved_activation"),
        (("forward", 0), ("forward", 1), "other", "other"),
        (("forward", 0), "loss", "other", "other"),
        (("backward", 1), ("backward", 0), "other", "other"),
        (("forward", 0), ("backward", 0), "logits", "logits"),
        (("forward", 0), ("backward", 0), "dequant_workspace", "dequant_workspace"),
        (("backward", 1), ("backward", 0), "recompute", "recompute"),
    ],
)
def test_what_forward_keeps_for_backward_is_saved(first: object, second: object, category: str, expected: str) -> None:
    number = CATEGORIES.index(category)
    segments = read_segments(crossing(first, second, category=number), PROBE)
    assert [CATEGORIES[value] for value in segments[first].category] == [expected, "other"]
    assert [CATEGORIES[value] for value in segments[second].category] == [expected]
    level = read_levels(crossing(first, second, category=number), 1, lambda _: 0)[0]
    split = dict.fromkeys((expected, "other"), 0)
    split[expected] += 8 * PROBE.tokens
    split["other"] += 3
    assert {name: num_bytes for name, num_bytes in level.at_peak.items() if num_bytes} == split


def test_a_part_without_events_raises_nothing() -> None:
    tracker = StorageTracker()
    tracker.mark("only")
    segment = read_segments(tracker, PROBE)["only"]
    found = outline(segment, segment.sizes(5, 5, tile=0, alignment_bytes=512, inside_bytes=lambda _: 1))
    assert (found.peak_bytes, int(found.net.sum()), int(found.at_peak.sum())) == (0, 0, 0)


def test_a_part_that_only_drops_lowers_the_level() -> None:
    segment = read_segments(crossing(("forward", 0), ("backward", 0)), PROBE)["backward", 0]
    found: Outline = outline(segment, segment.sizes(100, 1, tile=0, alignment_bytes=512, inside_bytes=lambda _: 0))
    assert (found.peak_bytes, int(found.net.sum()), int(found.at_peak.sum())) == (0, -1024, 0)


@given(
    st.lists(st.one_of(st.integers(1, 2**40), st.builds(int.__mul__, st.sampled_from(PROBE_PRIMES), st.integers(1))))
)
def test_a_probe_divides_none_of_the_sizes(sizes: list[int]) -> None:
    sizes = [size for size in sizes if size < 2**62]
    free = [prime for prime in PROBE_PRIMES if all(size % prime for size in sizes)]
    if len(free) < 2:
        with pytest.raises(RuntimeError, match="no prime is left"):
            choose_probe(sizes)
        return
    probe = choose_probe(sizes)
    assert probe.tokens != probe.rank
    assert not any(size % prime == 0 for size in sizes for prime in (probe.tokens, probe.rank))


def test_probes_are_primes_that_no_power_of_two_or_usual_size_has() -> None:
    for prime in PROBE_PRIMES:
        assert all(prime % divisor for divisor in range(2, int(prime**0.5) + 1))
    assert len(set(PROBE_PRIMES)) == len(PROBE_PRIMES)
    assert min(PROBE_PRIMES) > 1000  # a factor below it is told from a multiple of it


@given(SIZES)
def test_a_size_is_taken_apart_as_it_was_put_together(size: Size) -> None:
    script = Script.play([], [[Made(size, OTHER, True)]], PROBE.tokens, PROBE.rank)
    segment = read_segments(script.tracker, PROBE)[0]
    rebuilt = segment.sizes(10, 3, tile=0, alignment_bytes=1, inside_bytes=lambda _: 0)
    assert rebuilt.dtype == np.int64
    assert rebuilt.tolist() == [size.at(10, 3)]

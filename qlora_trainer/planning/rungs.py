"""Which levers are pulled: none where that is nearly as fast, else the fewest of those that come near the fastest.

What a set of levers costs in time is the roofline's to say. All sets are looked at, since one that gains little alone,
or does not even fit alone, may gain much beside another. They share their traces: only tiles and tables on the host
change what a step makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from qlora_trainer.config.levers import Levers
from qlora_trainer.planning.search import Candidate, Space


@dataclass(frozen=True, slots=True)
class Lever:
    """One lever that a space may pull beyond what is settled: the cheapest first in a list of them.

    Attributes:
        name: the field of `Levers` that it sets, or "offload".
        value: what the field becomes; of "offload" the most layers.
    """

    name: str
    value: Any

    def pulled(self, space: Space) -> Space:
        """The space with this lever pulled."""
        if self.name == "offload":
            return replace(space, offload=(space.offload[0], self.value))
        return replace(space, levers=replace(space.levers, **{self.name: self.value}))


# By how much levers must be faster than none where none is needed: a chosen figure, as estimates are no better.
MIN_GAIN = 0.05
# By how much a set of levers may be slower than the fastest if it has fewer of them: errors of estimates that are so
# alike are nearly equal.
MAX_LOSS = 0.03

Found = list[Candidate]
Search = Callable[[Space], Found]


def fastest_that_fits(space: Space, levers: Sequence[Lever], search: Search) -> tuple[Found, Space]:
    """What fits with the fewest levers that come near the fastest set of them, and the space that it was found in.

    Args:
        space: with what is settled.
        levers: that may be pulled, in the order of giving up.
        search: what fits of a space, fastest first.

    Returns:
        What fits, fastest first; nothing and the space with all levers pulled, if nothing fits.
    """
    found = search(space)
    if not levers or (found and _keeps_all(found[0], space)):
        return found, space
    speeds = dict(_speeds(space, levers, search))
    fastest = max(speeds.values())
    if not fastest:
        return [], with_levers(space, levers)
    if found and fastest <= found[0].tokens_per_second * (1 + MIN_GAIN):
        return found, space
    near = [pulled for pulled, speed in speeds.items() if speed >= fastest * (1 - MAX_LOSS)]
    fewest = min(map(len, near))
    pulled = max((one for one in near if len(one) == fewest), key=lambda one: speeds[one])
    chosen = with_levers(space, pulled)
    return search(chosen), chosen


def tried(space: Space, levers: Sequence[Lever]) -> list[Space]:
    """The spaces of all sets of levers, those with the fewest first."""
    return [with_levers(space, pulled) for pulled in _sets(levers)]


def with_levers(space: Space, levers: Sequence[Lever]) -> Space:
    """The space with all of these pulled."""
    for lever in levers:
        space = lever.pulled(space)
    return space


def pulled_levers(levers: Levers, *, num_offloaded: int) -> dict[str, Any]:
    """What is not off: name -> value, for words and tests."""
    off = Levers()
    named = {name: getattr(levers, name) for name in Levers.__dataclass_fields__}
    found = {name: value for name, value in named.items() if value != getattr(off, name)}
    return found | ({"offload": num_offloaded} if num_offloaded else {})


def _keeps_all(one: Candidate, space: Space) -> bool:
    return (one.layout.num_recomputed, one.layout.num_offloaded) == space.policy(space.num_policies - 1)


def _sets(levers: Sequence[Lever]) -> Iterator[tuple[Lever, ...]]:
    for number in range(len(levers) + 1):
        yield from combinations(levers, number)


def _speeds(space: Space, levers: Sequence[Lever], search: Search) -> Iterator[tuple[tuple[Lever, ...], float]]:
    """Each set of levers, and the tokens a second of the fastest that fits with it; 0 where nothing does.

    Whoever may offload need not: where the fastest with offloading does not, it is the fastest without too.
    """
    offload = tuple(lever for lever in levers if lever.name == "offload")
    for others in _sets([lever for lever in levers if lever.name != "offload"]):
        found = search(with_levers(space, (*offload, *others)))
        if offload:
            yield (*offload, *others), _speed(found)
            if not found or found[0].layout.num_offloaded > space.offload[0]:
                found = search(with_levers(space, others))
        yield others, _speed(found)


def _speed(found: Found) -> float:
    return found[0].tokens_per_second if found else 0.0

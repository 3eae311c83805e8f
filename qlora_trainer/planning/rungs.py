"""Which levers are tried, and in which order: none first, then one alone, then more of them together.

What a set of levers costs in time is the roofline's to say: one lever alone may be faster than to recompute without it.
Several together are not looked at while fewer fit. From a set of several that fits, what is not needed is left out
again, the most expensive first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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


# By how much a lever must be faster than none where none is needed: a chosen figure, as estimates are no better.
MIN_GAIN = 0.05

Found = list[Candidate]
Search = Callable[[Space], Found]


def fastest_that_fits(space: Space, levers: Sequence[Lever], search: Search) -> tuple[Found, Space]:
    """What fits with the fewest levers, fastest first, and the space that it was found in.

    Args:
        space: with what is settled.
        levers: that may be pulled, in the order of giving up.
        search: what fits of a space, fastest first.

    Returns:
        Nothing and the space with all levers pulled, if nothing fits.
    """
    found = search(space)
    if not levers or (found and _keeps_all(found[0], space)):
        return found, space
    best, best_space = found, space
    for lever in levers:
        one = lever.pulled(space)
        own = search(one)
        if own and (not best or _speed(own) > _speed(best) * ((1 + MIN_GAIN) if best is found else 1)):
            best, best_space = own, one
    if best:
        return best, best_space
    for number in range(2, len(levers) + 1):
        found = search(with_levers(space, levers[:number]))
        if found:
            return _without_needless(space, levers[:number], found, search)
    return [], with_levers(space, levers)


def tried(space: Space, levers: Sequence[Lever]) -> list[Space]:
    """All spaces that `fastest_that_fits` looks for something in, but for those that leave a needless lever out."""
    alone = [lever.pulled(space) for lever in levers]
    return [space, *alone, *(with_levers(space, levers[:number]) for number in range(2, len(levers) + 1))]


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


def _speed(found: Found) -> float:
    return found[0].tokens_per_second


def _without_needless(space: Space, levers: Sequence[Lever], found: Found, search: Search) -> tuple[Found, Space]:
    kept = list(levers)
    for lever in reversed(levers[:-1]):  # the last one was the one that made it fit
        fewer = [one for one in kept if one is not lever]
        again = search(with_levers(space, fewer))
        if again and _speed(again) >= _speed(found):
            kept, found = fewer, again
    return found, with_levers(space, kept)

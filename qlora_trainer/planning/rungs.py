"""Which levers are tried, and in which order: none first, then one alone, then more of them together.

What a set of levers costs in time is the roofline's to say, so among sets of one size the fastest is taken; a larger
set is not looked at while a smaller one fits. From a set of several that fits, what is not needed is left out again,
the most expensive first.
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


Found = list[Candidate]
Search = Callable[[Space], Found]


def first_that_fits(space: Space, levers: Sequence[Lever], search: Search) -> tuple[Found, Space]:
    """What fits with the fewest and cheapest levers, fastest first, and the space that it was found in.

    Args:
        space: with what is settled.
        levers: that may be pulled, the cheapest first.
        search: what fits of a space, fastest first.

    Returns:
        Nothing and the space with all levers pulled, if nothing fits.
    """
    found = search(space)
    if found or not levers:
        return found, space
    alone = [(search(one), one) for one in (lever.pulled(space) for lever in levers)]
    fitting = [(own, one) for own, one in alone if own]
    if fitting:
        return max(fitting, key=lambda pair: pair[0][0].tokens_per_second)
    for number in range(2, len(levers) + 1):
        found = search(with_levers(space, levers[:number]))
        if found:
            return _without_needless(space, levers[:number], found, search)
    return [], with_levers(space, levers)


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


def _without_needless(space: Space, levers: Sequence[Lever], found: Found, search: Search) -> tuple[Found, Space]:
    kept = list(levers)
    for lever in reversed(levers[:-1]):  # the last one was the one that made it fit
        fewer = [one for one in kept if one is not lever]
        again = search(with_levers(space, fewer))
        if again and again[0].tokens_per_second >= found[0].tokens_per_second:
            kept, found = fewer, again
    return found, with_levers(space, kept)

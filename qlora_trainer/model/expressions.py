"""What a regular expression may cost: one from a file of others can take longer than anyone lives.

Python's matcher tries, one after the other, all ways in which an expression can be laid over a name, where none fits.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import sre_parse  # the only parser of them in Python; its name without an underscore is deprecated

MOST_BITS = 24.0  # under half a second a name; Unsloth's expressions, the longest that are usual, have 20
_BITS_OF_ANY = 4.0  # where one of several `.*` ends in a name of some 50 letters


def bits_of_ways(pattern: str) -> float:
    r"""The logarithm, to base 2, of about how many ways there are to match a name; infinite of nested repeats.

    Args:
        pattern: a regular expression. One that repeats what holds a repeat or a choice is taken for infinite even where
            only one way can fit, as in `(\w+\.)*q_proj`.

    Raises:
        re.error: it is none.
        RecursionError, OverflowError: it is too deep, or a number in it too large.
    """
    return _bits(sre_parse.parse(pattern))


def _bits(part: Any) -> float:
    """Of a parsed expression, or of what an operation in it is of: parts of its own, numbers and names."""
    if isinstance(part, sre_parse.SubPattern):
        return _bits(part.data)
    if isinstance(part, list) or (isinstance(part, tuple) and len(part) != 2):
        return sum((_bits(own) for own in part), 0.0)
    if not isinstance(part, tuple):
        return 0.0
    operation, of = part
    if str(operation) == "BRANCH":
        return 1.0 + max(map(_bits, of[1]))
    if str(operation) in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        least, most, body = of
        inner = _bits(body)
        if most is sre_parse.MAXREPEAT:
            return math.inf if inner else _BITS_OF_ANY
        return min(_BITS_OF_ANY, math.log2(1 + int(most) - int(least))) + (inner * int(most) if inner else 0.0)
    return _bits(of)

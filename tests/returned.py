"""What a generator comes to."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

T = TypeVar("T")


def returned(generator: Generator[Any, None, T]) -> T:
    """What it returns, whatever it yields before."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            value: T = end.value
            return value

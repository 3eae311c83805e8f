"""One thing that a self test looked at, and how a check that breaks becomes one that failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from qlora_trainer.errors import QloraTrainerError

Verdict = Literal["ok", "failed", "not on this device"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        verdict: whether it is as it should be; or that this device cannot show it.
        found, expected: in a few words, without anything of whose machine it is: both go into the report.
        reason: of a check that broke, the library's own words; told on the screen, no part of the report.
    """

    name: str
    verdict: Verdict
    found: str
    expected: str
    reason: str = ""


def judged(name: str, *, is_right: bool, found: str, expected: str) -> Check:
    """A check that came to an end."""
    return Check(name, "ok" if is_right else "failed", found, expected)


def within(name: str, error: float, limit: float) -> Check:
    """A check of a relative error; one that is NaN is not within any limit."""
    return judged(name, is_right=error <= limit, found=f"error {error:.1e}", expected=f"at most {limit:.0e}")


def attempted(name: str, attempt: Callable[[], Check]) -> Iterator[Check]:
    """The check, or a failed one where it breaks: what is wrong with a machine must not hide the other checks."""
    try:
        yield attempt()
    except QloraTrainerError as error:
        yield Check(name, "failed", type(error).__name__, "to run", str(error))
    # What a library that does not fit this machine raises: a missing symbol or file, a failing kernel.
    except (AttributeError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        yield Check(name, "failed", type(error).__name__, "to run", " ".join(str(error).split())[:300])

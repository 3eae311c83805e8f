"""The mistakes a user can make, each with its exit code (0 is done).

Every message is one line that says where, what was found, what was expected and what to do.
"""

from __future__ import annotations


class QloraTrainerError(Exception):
    """A failure that the user can act on; `cli` prints it without a traceback.

    Args:
        where: file, `file:line`, config key or command that is wrong.
        found: what is there now.
        expected: what should be there.
        fix: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, *, where: str, found: str, expected: str, fix: str) -> None:
        self.where, self.found, self.expected, self.fix = where, found, expected, fix
        text = f"{where}: found {found}; expected {expected}. {fix}"
        super().__init__(" ".join(text.split()))

    @property
    def short(self) -> str:
        """Where, and what was found: for one of many."""
        return f"{self.where}: {self.found}"


class ConfigError(QloraTrainerError):
    """Wrong config or usage, a base or tokenizer that cannot be used included."""

    exit_code = 2


class DoesNotFitError(QloraTrainerError):
    """The run needs more memory than it was given."""

    exit_code = 3


class DataError(QloraTrainerError):
    """Training data that is missing, empty or broken.

    Args:
        kind: what a count of such rows is called.
    """

    exit_code = 4

    def __init__(self, *, where: str, found: str, expected: str, fix: str, kind: str = "bad row") -> None:
        super().__init__(where=where, found=found, expected=expected, fix=fix)
        self.kind = kind


class StorageError(QloraTrainerError):
    """A checkpoint, cache or run folder that cannot be read or written."""

    exit_code = 5


class DivergedError(QloraTrainerError):
    """The loss or the gradients are no longer finite."""

    exit_code = 6


class SelfTestError(QloraTrainerError):
    """A self test found something that is not as it should be."""

    exit_code = 7


class InterruptedAndSaved(QloraTrainerError):
    """A signal stopped the run after its state was saved."""

    exit_code = 75

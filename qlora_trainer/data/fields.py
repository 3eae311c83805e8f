"""Single values of a row, and how an error shows them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from qlora_trainer.config.strict_json import decode_value
from qlora_trainer.errors import DataError

MAX_SHOWN_CHARS = 60


def read_text(value: object, where: str, name: str) -> str:
    """A value that must be text which UTF-8 can hold.

    Raises:
        DataError: it is not.
    """
    if not isinstance(value, str):
        raise DataError(
            where=where, found=f"{name} = {shown(value)}", expected="a string", fix=f'Write "{name}" as text.'
        )
    try:
        value.encode("utf-8")  # JSON escapes can spell what no tokenizer takes
    except UnicodeEncodeError as error:
        raise DataError(
            where=where,
            found=f"half of a surrogate pair at character {error.start} of {name}",
            expected="text that UTF-8 can hold",
            fix="Write both halves of the pair, or remove the \\ud8xx escape.",
        ) from error
    return value


def optional_text(value: Mapping[str, object], key: str, where: str, name: str) -> str:
    """The text under a key of the object `name`; empty where there is none.

    Raises:
        DataError: it is no text.
    """
    found = value.get(key)
    return "" if found is None else read_text(found, where, f"{name}.{key}")


def refuse_unknown(value: Mapping[str, object], known: Collection[str], where: str, name: str) -> None:
    """Refuses an object with keys that nothing reads: what they say would silently not be learned.

    A key that says nothing (null, "", [] or {}) is passed over: Arrow and OpenAI's library write those.

    Raises:
        DataError: it has some.
    """
    unknown = [key for key, item in value.items() if key not in known and item not in (None, "", [], {})]
    if unknown:
        raise DataError(
            where=where,
            found=f"unknown keys {shown(unknown)} in {name}",
            expected=f"only {', '.join(known)}",
            fix="Remove them: they would not be learned.",
        )


def from_json(value: object) -> object:
    """What JSON text holds; text that is not JSON, and what is no text, as it is: the caller says what was expected."""
    try:
        return decode_value(value) if isinstance(value, str) else value
    except ValueError:
        return value


def shown(value: object) -> str:
    """A value as an error shows it: its repr, cut short."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 1] + "…"

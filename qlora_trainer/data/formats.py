"""One JSON object becomes one conversation: `messages`, prompt/completion or alpaca keys.

The format is told by the keys of each row. A key that would change what is learned but is not understood here is an
error; keys that only describe a row (`METADATA_KEYS`) are passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qlora_trainer.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
METADATA_KEYS = frozenset({"id", "idx", "index", "prompt_id", "source", "dataset", "category", "language", "metadata"})
EXPECTED_KEYS = '"messages", or "prompt" + "completion", or "instruction" + "output" (+ "input", "system")'
MAX_SHOWN_CHARS = 60


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Format:
    """The keys by which a row format is known.

    Attributes:
        name: what errors call it.
        required: keys that must all be there.
        optional: keys that may be there too.
    """

    name: str
    required: frozenset[str]
    optional: frozenset[str]


# Sets such as UltraChat and No Robots repeat the first question as `prompt` beside complete `messages`.
MESSAGES = Format("messages", frozenset({"messages"}), frozenset({"prompt"}))
PROMPT_COMPLETION = Format("prompt/completion", frozenset({"prompt", "completion"}), frozenset())
ALPACA = Format("alpaca", frozenset({"instruction", "output"}), frozenset({"input", "system"}))
FORMATS = (MESSAGES, PROMPT_COMPLETION, ALPACA)


def parse_conversation(row: Mapping[str, object], *, where: str) -> tuple[Message, ...]:
    """Reads one row in whichever format its keys tell.

    Args:
        row: the decoded JSON object.
        where: `file:line` for errors.

    Returns:
        The turns in order; at least one is the assistant's, the first is not, and no assistant text is blank.

    Raises:
        DataError: unknown keys, wrong types, unknown roles, or nothing to learn.
    """
    row_format = _detect(row, where)
    if row_format is MESSAGES:
        messages = _message_list(row["messages"], where, "messages")
    elif row_format is PROMPT_COMPLETION:
        messages = _prompt_completion(row, where)
    else:
        messages = _alpaca(row, where)
    _require_answers(messages, where, row_format.name)
    return messages


def shown(value: object) -> str:
    """A value as an error shows it: its repr, cut short."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 1] + "…"


def _detect(row: Mapping[str, object], where: str) -> Format:
    for row_format in FORMATS:
        if not row_format.required <= row.keys():
            continue
        known = row_format.required | row_format.optional | METADATA_KEYS
        unknown = [key for key, value in row.items() if key not in known and value is not None]
        if unknown:
            raise DataError(
                where=where,
                found=f"unknown keys {shown(unknown)} in a row of {row_format.name} form",
                expected=f"only {', '.join(sorted(row_format.required | row_format.optional))}",
                fix="Remove them, or rename them to the keys that are meant.",
            )
        return row_format
    raise DataError(
        where=where,
        found=f"a row with keys {shown(list(row))}",
        expected=EXPECTED_KEYS,
        fix="Rename the keys of every row to one of these forms.",
    )


def _message_list(value: object, where: str, name: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise DataError(
            where=where,
            found=f"{name} = {shown(value)}",
            expected='a non-empty list of {"role": ..., "content": ...}',
            fix=f'Write "{name}" as a list of messages.',
        )
    return tuple(_message(item, where, f"{name}[{index}]") for index, item in enumerate(value))


def _message(value: object, where: str, name: str) -> Message:
    if not isinstance(value, dict) or not {"role", "content"} <= value.keys():
        raise DataError(
            where=where,
            found=f"{name} = {shown(value)}",
            expected='an object with "role" and "content"',
            fix='Rename its keys (ShareGPT\'s "from"/"value" are "role"/"content" here).',
        )
    unknown = [key for key, item in value.items() if key not in ("role", "content") and item is not None]
    if unknown:
        raise DataError(
            where=where,
            found=f"unknown keys {shown(unknown)} in {name}",
            expected='only "role" and "content"',
            fix="Remove them: they would not be learned.",
        )
    role = value["role"]
    if role not in ROLES:
        raise DataError(
            where=where,
            found=f"{name}.role = {shown(role)}",
            expected=f"one of {', '.join(ROLES)}",
            fix='Rename the role (ShareGPT\'s "human"/"gpt" are "user"/"assistant" here).',
        )
    return Message(role=role, content=_text(value["content"], where, f"{name}.content"))


def _prompt_completion(row: Mapping[str, object], where: str) -> tuple[Message, ...]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _message_list(prompt, where, "prompt") + _message_list(completion, where, "completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return (
            Message("user", _text(prompt, where, "prompt")),
            Message("assistant", _text(completion, where, "completion")),
        )
    raise DataError(
        where=where,
        found=f"prompt = {shown(prompt)}, completion = {shown(completion)}",
        expected="two strings, or two lists of messages",
        fix="Give both in the same form.",
    )


def _alpaca(row: Mapping[str, object], where: str) -> tuple[Message, ...]:
    system = _optional_text(row, "system", where)
    question = _text(row["instruction"], where, "instruction")
    if context := _optional_text(row, "input", where):
        question = f"{question}\n\n{context}"
    turns = (Message("user", question), Message("assistant", _text(row["output"], where, "output")))
    return (Message("system", system), *turns) if system else turns


def _optional_text(row: Mapping[str, object], name: str, where: str) -> str:
    value = row.get(name)
    return "" if value is None else _text(value, where, name)


def _text(value: object, where: str, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            where=where,
            found=f"{name} = {shown(value)}",
            expected="a string",
            fix=f'Write "{name}" as text.',
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


def _require_answers(messages: tuple[Message, ...], where: str, format_name: str) -> None:
    if messages[0].role == "assistant":
        raise DataError(
            where=where,
            found="a conversation that the assistant begins",
            expected="a system or user turn first",
            fix="Remove the greeting, or put the user's turn before it.",
        )
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise DataError(
            where=where,
            found=f"a row of {format_name} form without an assistant turn",
            expected="at least one answer to learn from",
            fix="Add the answer, or remove the row.",
        )
    if any(not answer.content.strip() for answer in answers):
        raise DataError(
            where=where,
            found=f"an empty assistant text in a row of {format_name} form",
            expected="text to learn from",
            fix="Fill in the answer, or remove the row.",
        )

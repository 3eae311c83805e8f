"""The forms that a row may have: which keys tell them, and how each becomes a conversation or a plain text.

A file has one form: the keys of its first row tell it, or the config does. A key that would change what is learned but
is not understood here is an error; keys that only describe a row (`METADATA_KEYS`) are passed over.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from qlora_trainer.data.fields import read_text, shown
from qlora_trainer.data.messages import Message, read_messages, read_sharegpt
from qlora_trainer.data.tool_calls import read_tools
from qlora_trainer.errors import DataError

METADATA_KEYS = frozenset({"id", "idx", "index", "prompt_id", "source", "dataset", "category", "language", "metadata"})


@dataclass(frozen=True, slots=True)
class Format:
    """The keys by which a form is known.

    Attributes:
        name: what the config and errors call it.
        required: keys that must all be there.
        optional: keys that may be there too.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


# Sets such as UltraChat and No Robots repeat the first question as `prompt` beside complete `messages`;
# `parallel_tool_calls` is a setting of OpenAI's service that no template renders.
MESSAGES = Format("messages", ("messages",), ("tools", "functions", "prompt", "parallel_tool_calls"))
SHAREGPT = Format("sharegpt", ("conversations",), ("system", "tools"))
PROMPT_COMPLETION = Format("prompt_completion", ("prompt", "completion"))
QUESTION_ANSWER = Format("question_answer", ("question", "answer"))
ALPACA = Format("alpaca", ("instruction", "output"), ("input", "system", "text"))  # Stanford's file repeats all as text
TEXT = Format("text", ("text",))
FORMATS = (MESSAGES, SHAREGPT, PROMPT_COMPLETION, QUESTION_ANSWER, ALPACA, TEXT)


@dataclass(frozen=True, slots=True)
class Content:
    """What one row holds: a conversation, or a plain text.

    Attributes:
        messages: in order; at least one is the assistant's, the first is not. Empty for a plain text.
        tools: functions that the assistant may ask for, as JSON text; may be empty.
        text: the plain text; empty for a conversation.
    """

    messages: tuple[Message, ...] = ()
    tools: str = ""
    text: str = ""


def format_named(name: str) -> Format:
    """The form that the config names.

    Raises:
        KeyError: there is none of that name.
    """
    return {row_format.name: row_format for row_format in FORMATS}[name]


def detect_format(fields: Mapping[str, object], *, where: str) -> Format:
    """Tells the form of a row by its keys.

    Args:
        fields: the row.
        where: the row, for errors.

    Raises:
        DataError: the keys of no form are there.
    """
    for row_format in FORMATS:
        if set(row_format.required) <= fields.keys():
            return row_format
    forms = "; ".join(f"{row_format.name} ({' + '.join(row_format.required)})" for row_format in FORMATS)
    raise DataError(
        where=where,
        found=f"a row with keys {shown(list(fields))}",
        expected=f"the keys of one of these forms: {forms}",
        fix="Name the columns that are meant, e.g. data.columns: {prompt: THEIRS, completion: THEIRS}.",
    )


def rename_columns(
    fields: Mapping[str, object], columns: tuple[tuple[str, str], ...], *, where: str
) -> Mapping[str, object]:
    """Takes the columns that the config names, under our names; no other is read.

    Args:
        fields: the row.
        columns: (our key, their column) pairs; empty takes the row as it is.
        where: the row, for errors.

    Raises:
        DataError: a column is not there.
    """
    if not columns:
        return fields
    for ours, theirs in columns:
        if theirs not in fields:
            raise DataError(
                where=where,
                found=f"a row with keys {shown(list(fields))}",
                expected=f"the column {theirs!r} that data.columns names for {ours} (null stands for nothing)",
                fix="Correct data.columns, or the row.",
            )
    return {ours: fields[theirs] for ours, theirs in columns}


def read_content(fields: Mapping[str, object], row_format: Format, *, where: str) -> Content:
    """Reads one row.

    Args:
        fields: the row, under our keys.
        row_format: of the file.
        where: the row, for errors.

    Raises:
        DataError: missing or unknown keys, wrong types, unknown roles, or nothing to learn.
    """
    _require_keys(fields, row_format, where)
    if row_format is TEXT:
        return Content(text=_plain_text(fields, where))
    messages, tools = _conversation(fields, row_format, where)
    _require_answers(messages, where, row_format.name)
    return Content(messages=messages, tools=sys.intern(tools))  # often the same in every row


def _require_keys(fields: Mapping[str, object], row_format: Format, where: str) -> None:
    known = (*row_format.required, *row_format.optional)
    if not set(row_format.required) <= fields.keys():
        raise DataError(
            where=where,
            found=f"a row with keys {shown(list(fields))}",
            expected=f"{' + '.join(row_format.required)}, the form {row_format.name} of this file",
            fix="Give all rows of a file one form (see data.format and data.columns), or correct this one.",
        )
    unknown = [
        key for key, value in fields.items() if key not in known and key not in METADATA_KEYS and value is not None
    ]
    if unknown:
        raise DataError(
            where=where,
            found=f"unknown keys {shown(unknown)} in a row of {row_format.name} form",
            expected=f"only {', '.join(known)}",
            fix="Remove them, rename them to the keys that are meant, or name the columns to read in data.columns.",
        )


def _conversation(fields: Mapping[str, object], row_format: Format, where: str) -> tuple[tuple[Message, ...], str]:
    if row_format is MESSAGES:
        return read_messages(fields["messages"], where, "messages"), _tools(fields, where)
    if row_format is SHAREGPT:
        messages = read_sharegpt(fields["conversations"], where, "conversations")
        return (*_system(fields, where), *messages), read_tools(fields.get("tools"), where, "tools")
    if row_format is ALPACA:
        return (*_system(fields, where), *_alpaca(fields, where)), ""
    return _pair(fields, *row_format.required, where=where), ""


def _tools(fields: Mapping[str, object], where: str) -> str:
    newer, older = (read_tools(fields.get(key), where, key) for key in ("tools", "functions"))
    if newer and older:
        raise DataError(
            where=where,
            found="tools and functions",
            expected="one of them: the latter is OpenAI's older name",
            fix="Put all of them under tools.",
        )
    return newer or older


def _pair(fields: Mapping[str, object], asked: str, answered: str, *, where: str) -> tuple[Message, ...]:
    prompt, completion = fields[asked], fields[answered]
    if isinstance(prompt, list) and isinstance(completion, list):
        return read_messages(prompt, where, asked) + read_messages(completion, where, answered)
    if isinstance(prompt, str) and isinstance(completion, str):
        return (
            Message("user", read_text(prompt, where, asked)),
            Message("assistant", read_text(completion, where, answered)),
        )
    raise DataError(
        where=where,
        found=f"{asked} = {shown(prompt)}, {answered} = {shown(completion)}",
        expected="two strings, or two lists of messages",
        fix="Give both in the same form.",
    )


def _alpaca(fields: Mapping[str, object], where: str) -> tuple[Message, ...]:
    question = read_text(fields["instruction"], where, "instruction")
    if context := _optional_text(fields, "input", where):
        question = f"{question}\n\n{context}"
    return Message("user", question), Message("assistant", read_text(fields["output"], where, "output"))


def _system(fields: Mapping[str, object], where: str) -> tuple[Message, ...]:
    system = _optional_text(fields, "system", where)
    return (Message("system", system),) if system else ()


def _optional_text(fields: Mapping[str, object], name: str, where: str) -> str:
    value = fields.get(name)
    return "" if value is None else read_text(value, where, name)


def _plain_text(fields: Mapping[str, object], where: str) -> str:
    text = read_text(fields["text"], where, "text")
    if not text.strip():
        raise DataError(
            where=where, found="an empty text", expected="text to learn from", fix="Fill it in, or remove the row."
        )
    return text


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
    if any(answer.weight and not answer.content.strip() and not answer.tool_calls for answer in answers):
        raise DataError(
            where=where,
            found=f"an empty assistant text in a row of {format_name} form",
            expected="text to learn from",
            fix="Fill in the answer, or remove the row.",
            kind="empty answer",
        )

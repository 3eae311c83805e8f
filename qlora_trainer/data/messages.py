"""One turn of a conversation, and how OpenAI's fine-tuning files and ShareGPT write it.

What a turn says that this does not understand is an error: it would silently not be learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qlora_trainer.data.fields import from_json, optional_text, read_text, refuse_unknown, shown
from qlora_trainer.data.tool_calls import ToolCall, read_tool_calls
from qlora_trainer.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # one thing under the names of Qwen 3, GPT-OSS and vLLM
MESSAGE_KEYS = ("role", "content", "name", "weight", "tool_calls", "tool_call_id", "function_call", *REASONING_KEYS)
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: one of `ROLES`.
        content: its text; may be empty where there are tool calls.
        tool_calls: what the assistant asks for.
        name: of the speaker or the tool; may be empty.
        tool_call_id: the call that a tool's message answers; may be empty.
        weight: 0 for a turn of the assistant that is read, but not learned; else 1.
        reasoning: what the assistant thought before it answered, where that is not part of `content`; may be empty.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    name: str = ""
    tool_call_id: str = ""
    weight: int = 1
    reasoning: str = ""


def read_messages(value: object, where: str, name: str) -> tuple[Message, ...]:
    """Reads a list of messages as OpenAI's fine-tuning files hold them.

    Args:
        value: what the row has.
        where: the row, for errors.
        name: the key that held it, for errors.

    Raises:
        DataError: not such a list.
    """
    return tuple(_message(item, where, f"{name}[{index}]") for index, item in enumerate(_list(value, where, name)))


def read_sharegpt(value: object, where: str, name: str) -> tuple[Message, ...]:
    """Reads a list of `{"from": ..., "value": ...}`, or of messages, which some files of that kind hold.

    Raises:
        DataError: neither.
    """
    turns = _list(value, where, name)
    return tuple(_message(_from_sharegpt(turn), where, f"{name}[{index}]") for index, turn in enumerate(turns))


def _list(value: object, where: str, name: str) -> list[object]:
    if not isinstance(value, list) or not value:
        raise DataError(
            where=where,
            found=f"{name} = {shown(value)}",
            expected='a non-empty list of {"role": ..., "content": ...}',
            fix=f'Write "{name}" as a list of messages.',
        )
    return value


def _from_sharegpt(turn: object) -> object:
    """The same turn under OpenAI's names; what is no ShareGPT turn comes back as it is."""
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        return turn
    speaker, value = turn["from"], turn["value"]
    role = SHAREGPT_ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
    rest = {key: item for key, item in turn.items() if key not in ("from", "value")}
    if speaker == "function_call":
        return {**rest, "role": role, "content": None, "function_call": from_json(value)}
    return {**rest, "role": role, "content": value}


def _message(value: object, where: str, name: str) -> Message:
    if not isinstance(value, dict) or "role" not in value:
        raise DataError(
            where=where,
            found=f"{name} = {shown(value)}",
            expected='an object with "role" and "content"',
            fix='Rename its keys; a list of "from" and "value" belongs under the key "conversations".',
        )
    refuse_unknown(value, MESSAGE_KEYS, where, name)
    role = "tool" if value["role"] == "function" else value["role"]  # OpenAI's older name
    if role not in ROLES:
        raise DataError(
            where=where,
            found=f"{name}.role = {shown(role)}",
            expected=f"one of {', '.join(ROLES)}",
            fix="Rename the role.",
        )
    _require_role(value, role, where, name)
    tool_calls = read_tool_calls(value, where, name)
    content = value.get("content")
    return Message(
        role=role,
        content="" if content is None and tool_calls else _content(content, where, f"{name}.content"),
        tool_calls=tool_calls,
        name=optional_text(value, "name", where, name),
        tool_call_id=optional_text(value, "tool_call_id", where, name),
        weight=_weight(value.get("weight"), where, f"{name}.weight"),
        reasoning=_reasoning(value, where, name),
    )


def _require_role(value: Mapping[str, object], role: str, where: str, name: str) -> None:
    of_assistant = ("weight", "tool_calls", "function_call", *REASONING_KEYS)
    owners = {**dict.fromkeys(of_assistant, "assistant"), "tool_call_id": "tool"}
    for key, owner in owners.items():
        if role != owner and value.get(key) not in (None, [], ""):
            raise DataError(
                where=where,
                found=f"{key} in {name}, whose role is {role}",
                expected=f"it in messages of the role {owner} only",
                fix="Remove it, or correct the role.",
            )


def _content(value: object, where: str, name: str) -> str:
    """Text, or OpenAI's list of text parts."""
    if not isinstance(value, list):
        return read_text(value, where, name)
    texts = []
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise DataError(
                where=where,
                found=f"{name}[{index}] = {shown(part)}",
                expected='parts of {"type": "text", "text": ...} only',
                fix="Remove the row: images and sound cannot be learned here.",
            )
        refuse_unknown(part, ("type", "text"), where, f"{name}[{index}]")
        texts.append(read_text(part.get("text"), where, f"{name}[{index}].text"))
    return "".join(texts)


def _reasoning(value: Mapping[str, object], where: str, name: str) -> str:
    texts = {key: text for key in REASONING_KEYS if (text := optional_text(value, key, where, name)).strip()}
    if len(set(texts.values())) > 1:
        raise DataError(
            where=where,
            found=f"{' and '.join(texts)} in {name} that differ",
            expected="one of them: they are names of the same thing",
            fix="Remove the other.",
        )
    return next(iter(texts.values()), "")


def _weight(value: object, where: str, name: str) -> int:
    if value is None:
        return 1
    if value in (0, 1) and not isinstance(value, bool):
        return 1 if value else 0
    raise DataError(
        where=where,
        found=f"{name} = {shown(value)}",
        expected="0 (read, not learned) or 1",
        fix="Use 0 or 1: a turn is learned or it is not.",
    )

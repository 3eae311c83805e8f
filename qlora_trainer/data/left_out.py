"""Refuses conversations of which a chat template passes over a part in silence, and those that would forge a turn.

Qwen 2.5 says nothing of the role `developer`, Gemma nothing of tools, and neither complains: what is not in the text is
not learned.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from jinja2.exceptions import TemplateError

from qlora_trainer.data.fields import shown
from qlora_trainer.data.messages import Message
from qlora_trainer.data.rows import Row
from qlora_trainer.data.template import Beginnings, render
from qlora_trainer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Tags of thoughts stand on lines of their own in one place and inside of lines in another.
_LINE_ENDS = re.compile(r"\n|</?think>|\[/?THINK\]")
_LEADING_THOUGHTS = re.compile(r"\A\s*(<think>.*?</think>|\[THINK\].*?\[/THINK\])", re.DOTALL)


def refuse_controls(row: Row, controls: Sequence[str]) -> None:
    """Refuses a message that holds a token by which the template marks turns.

    Raises:
        DataError: one does.
    """
    for index, message in enumerate(row.messages):
        calls = (text for call in message.tool_calls for text in (call.name, call.arguments, call.call_id))
        names = (message.name, message.tool_call_id)
        texts = (message.content, message.reasoning, *names, *calls, row.tools if index == 0 else "")
        written = "\n".join(texts)
        for control in controls:
            if control in written:
                raise DataError(
                    where=row.where,
                    found=f"the control token {shown(control)} in the text of message {index}",
                    expected="plain text; the chat template writes the control tokens",
                    fix="Remove it from the text (was the row rendered through a template already?), or drop the row.",
                )


def require_whole(row: Row, messages: Sequence[Message], text: str) -> None:
    """Refuses what a template passes over: roles and tools that it does not know.

    The last line of a message stands for it, since templates trim. An answer without tool calls is looked at by
    `require_answer`; a tool's result may be rendered as JSON.

    Raises:
        DataError: something is not in the text.
    """
    parts = {f"the tool {name}": name for name in _tool_names(row.tools)}
    for index, message in enumerate(messages):
        if message.role in ("system", "developer", "user") or message.tool_calls:
            last_line = message.content.strip().rpartition("\n")[2].strip()
            parts[f"the text of message {index}, whose role is {message.role}"] = last_line
        parts |= {f"the call of {call.name} in message {index}": call.name for call in message.tool_calls}
    for what, part in parts.items():
        if part not in text:
            raise _left_out(row, what)


def require_answer(row: Row, index: int, text: str, *, forgets_thoughts: bool) -> None:
    """Refuses a template that passes over a part of an answer that is learned: each of its lines must be there.

    Thoughts may be written as a part of the answer, in `<think>`; many templates move those, and some drop them, or
    what stands before them.

    Args:
        row: the conversation.
        index: of the message.
        text: what the template made of it.
        forgets_thoughts: thoughts that it begins with may be missing.

    Raises:
        DataError: a line is missing, or before another one that it follows in the message.
    """
    content, place = row.messages[index].content, 0
    if forgets_thoughts:
        content = _LEADING_THOUGHTS.sub("", content)
    for line in map(str.strip, _LINE_ENDS.split(content)):
        found = text.find(line, place)
        if found < 0:
            raise _left_out(row, f"a part of the text of message {index}: {shown(line)}")
        place = found + len(line)


def require_reasoning(row: Row, beginnings: Beginnings, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a template that passes over the reasoning: it must read otherwise without it.

    That is asked of the conversation up to that message. Templates that forget it once others follow (Qwen 3) render it
    there; such an answer is then one that was rewritten, or is learned as the template marks it.

    Raises:
        DataError: it does not.
    """
    messages = beginnings.messages
    for index, message in enumerate(messages):
        if message.reasoning:
            upto = beginnings.text(index + 1)
            without = render((*messages[:index], replace(message, reasoning="")), tokenizer, row.tools)
            if message.reasoning.strip() not in upto or upto == without:
                raise _left_out(row, f"the reasoning of message {index}")


def require_tool_turns(row: Row, beginnings: Beginnings, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a template that passes over calls or results: it must read otherwise without them.

    That their words are somewhere in the text would say little: a question often has them too.

    Raises:
        DataError: it does not.
    """
    messages = beginnings.messages
    parts = [
        *((index, "the calls", replace(m, tool_calls=())) for index, m in enumerate(messages) if m.tool_calls),
        *((i, "the result", replace(m, content="")) for i, m in enumerate(messages) if m.role == "tool" and m.content),
    ]
    for index, what, without in parts:
        changed = (*messages[:index], without, *messages[index + 1 :])
        try:
            is_left_out = render(changed, tokenizer, row.tools) == beginnings.text(len(messages))
        except (TemplateError, TypeError, ValueError):  # it looks at them, and misses them
            continue
        if is_left_out:
            raise _left_out(row, f"{what} of message {index}")


def num_lost_names(row: Row, beginnings: Beginnings, tokenizer: PreTrainedTokenizerBase) -> int:
    """Messages whose `name` the template passes over: it reads the same without the names of that role.

    A tool's message is not counted where a call has the name too. A name is no text to learn, and OpenAI's files have
    them for any model, so they are counted where texts are refused.
    """
    messages = beginnings.messages
    called = {call.name for message in messages for call in message.tool_calls}
    named = [m for m in messages if m.name and not (m.role == "tool" and m.name in called)]
    num_lost = 0
    for role in {message.role for message in named}:
        nameless = tuple(replace(m, name="") if m.role == role else m for m in messages)
        try:
            is_lost = render(nameless, tokenizer, row.tools) == beginnings.text(len(messages))
        except (TemplateError, TypeError, ValueError):  # it looks at them, and misses them
            continue
        num_lost += sum(message.role == role for message in named) if is_lost else 0
    return num_lost


def _left_out(row: Row, what: str) -> DataError:
    return DataError(
        where=row.where,
        found=f"a chat template that leaves out {what}",
        expected="a template that renders all of the conversation",
        fix="Use a base whose template knows such messages, or take them out of the row.",
    )


def _tool_names(tools: str) -> list[str]:
    functions = [tool.get("function", tool) for tool in json.loads(tools)] if tools else []
    return [str(function["name"]) for function in functions if isinstance(function, dict) and "name" in function]

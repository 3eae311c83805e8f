"""Finds the assistant's turns in the text of a conversation.

Where the template marks them with `{% generation %}`, they are taken from there. Else a turn begins where the prompt
for it ends: the template renders the messages before the turn, with its generation prompt, and that text must be a
prefix of the whole conversation's. So what is trained on follows exactly what generation will have seen, for any
template, without a rule of our own about its markers. A template that rewrites earlier turns once others follow (Qwen 3
forgets what was thought) breaks that for those turns: they are read, but not learned.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from jinja2.exceptions import TemplateError

from qlora_trainer.data.messages import Message, shown
from qlora_trainer.data.rows import Row
from qlora_trainer.data.template import marks_answers, render, render_marked, render_prompt
from qlora_trainer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["assistant", "last_assistant", "all"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of the assistant in a rendered conversation, as character positions.

    Attributes:
        start: where the prompt for it ends.
        end: where its stop token ends; whitespace that the template writes after that is not part of it.
        is_learned: whether its tokens are labels.
    """

    start: int
    end: int
    is_learned: bool = True


@dataclass(frozen=True, slots=True)
class Rendered:
    """What is tokenised, special tokens included.

    Attributes:
        text: the whole.
        turns: the assistant's, those left out that nothing is said about.
        learns_all: the text between the turns is learned too.
        num_rewritten: turns that would be learned, had the template not rewritten them.
    """

    text: str
    turns: tuple[Turn, ...]
    learns_all: bool = False
    num_rewritten: int = 0


def render_text(row: Row, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """A plain text: BOS before it where the tokenizer puts one by itself, EOS after it, both unless it has them.

    Raises:
        ConfigError: the tokenizer has no EOS token, so the end of a text could not be learned.
    """
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token
    if eos is None:
        raise ConfigError(
            where=row.where,
            found="a plain text for a tokenizer without EOS token",
            expected="an EOS token, which ends a text",
            fix="Use a base whose tokenizer has one.",
        )
    assert isinstance(bos, str)
    assert isinstance(eos, str)
    adds_bos = bool(bos) and list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]
    before = bos if adds_bos and not row.text.startswith(bos) else ""
    after = "" if row.text.endswith(eos) else eos
    return Rendered(text=f"{before}{row.text}{after}", turns=(), learns_all=True)


def render_row(
    row: Row, tokenizer: PreTrainedTokenizerBase, *, controls: Sequence[str], train_on: TrainOn = "assistant"
) -> Rendered:
    """Renders one conversation and finds its assistant's turns.

    Args:
        row: the conversation.
        tokenizer: carries the chat template.
        controls: `control_texts(tokenizer)`; a message that holds one would forge a turn or an end.
        train_on: which turns are learned; those of weight 0 never are.

    Returns:
        The text; it ends with the last answer, unless all is learned.

    Raises:
        DataError: the template refuses the conversation, leaves out a part of it, rewrites the turn that would be
            learned, or a message holds a control token.
    """
    _refuse_controls(row, controls)
    answers = [index for index, message in enumerate(row.messages) if message.role == "assistant"]
    messages = row.messages if train_on == "all" else row.messages[: answers[-1] + 1]  # what follows is learned by none
    chosen = answers[-1:] if train_on == "last_assistant" else answers
    learned = frozenset(index for index in chosen if messages[index].weight)
    try:
        if marks_answers(tokenizer):
            rendered = _marked_turns(row, messages, answers, learned, tokenizer)
        else:
            rendered = _prefix_turns(row, messages, answers, learned, tokenizer, train_on)
        _require_reasoning(row, messages, tokenizer)
    except (TemplateError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        roles = ", ".join(message.role for message in messages)
        raise DataError(
            where=row.where,
            found=f"a conversation that the chat template refuses ({error}); its roles: {roles}",
            expected="roles in the order that the model's template knows",
            fix="Reorder or merge the turns, or remove the row.",
        ) from error
    _require_whole(row, messages, rendered.text)
    _require_tool_turns(row, messages, tokenizer)
    return replace(rendered, learns_all=train_on == "all")


def _marked_turns(
    row: Row,
    messages: Sequence[Message],
    answers: Sequence[int],
    learned: frozenset[int],
    tokenizer: PreTrainedTokenizerBase,
) -> Rendered:
    """Turns as the template marks them, one passage an answer."""
    text, passages = render_marked(messages, tokenizer, row.tools)
    if len(passages) > len(answers):  # an answer in parts, such as Phi-3's EOS after the last one
        passages = _joined(passages)
    if len(passages) != len(answers):
        raise DataError(
            where=row.where,
            found=f"{len(passages)} passages that the chat template marks as generated, for {len(answers)} answers",
            expected="one for each of the assistant's turns",
            fix="Correct the {% generation %} marks of the template, or remove the row.",
        )
    turns = tuple(
        Turn(start, start + len(text[start:end].rstrip()), index in learned)
        for index, (start, end) in zip(answers, passages, strict=True)
    )
    return Rendered(text, turns)


def _joined(passages: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Passages with nothing between them as one."""
    joined: list[tuple[int, int]] = []
    for start, end in passages:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def _prefix_turns(
    row: Row,
    messages: Sequence[Message],
    answers: Sequence[int],
    learned: frozenset[int],
    tokenizer: PreTrainedTokenizerBase,
    train_on: TrainOn,
) -> Rendered:
    """Turns that follow in the text what follows their prompt."""
    text = render(messages, tokenizer, row.tools)
    turns: list[Turn] = []
    rewritten: dict[int, str] = {}
    for index in answers if train_on == "all" else sorted(learned):
        prompt = render_prompt(messages[:index], tokenizer, row.tools)
        upto = _open_end(messages[: index + 1], tokenizer, row.tools)
        if upto.startswith(prompt) and text.startswith(upto):
            turns.append(Turn(len(prompt), max(len(prompt), len(upto.rstrip())), index in learned))
        else:
            rewritten[index] = (
                f"message {index} reads otherwise once others follow"
                if upto.startswith(prompt)
                else f"the text before message {index} reads otherwise once that answer is there"
            )
    num_rewritten = len(learned.intersection(rewritten))
    if rewritten and (num_rewritten < len(rewritten) if train_on == "all" else not turns):
        raise DataError(
            where=row.where,
            found=f"a chat template that rewrites history ({list(rewritten.values())[-1]})",
            expected="a turn rendered as it was when the model wrote it",
            fix="Let rows end with the answer to learn, or use a template that leaves earlier turns unchanged.",
        )
    return Rendered(text, tuple(turns), num_rewritten=0 if train_on == "all" else num_rewritten)


def _open_end(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: str) -> str:
    """The text up to the end of the last turn, as it reads when others follow.

    Phi-3's template, for one, writes EOS after a whole conversation, which no answer ends with.
    """
    text, eos = render(messages, tokenizer, tools), tokenizer.eos_token
    if not isinstance(eos, str) or not text.endswith(eos):
        return text
    try:
        going_on = render_prompt(messages, tokenizer, tools)
    except TemplateError:  # some allow no answer after an answer
        return text
    without = text.removesuffix(eos)
    return without if going_on.startswith(without) and not going_on.startswith(text) else text


def _refuse_controls(row: Row, controls: Sequence[str]) -> None:
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


def _require_whole(row: Row, messages: Sequence[Message], text: str) -> None:
    """Refuses what a template passes over in silence: roles and tools that it does not know.

    The last line of a message stands for it, since templates trim. An answer without tool calls is looked at where it
    is labelled; a tool's result may be rendered as JSON.
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


def _require_reasoning(row: Row, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a template that passes over the reasoning in silence: it must read otherwise without it.

    That is asked of the conversation up to that message. Templates that forget it once others follow (Qwen 3) render it
    there; such an answer is then one that was rewritten, or is learned as the template marks it.
    """
    for index, message in enumerate(messages):
        if message.reasoning:
            upto = render(messages[: index + 1], tokenizer, row.tools)
            without = render((*messages[:index], replace(message, reasoning="")), tokenizer, row.tools)
            if message.reasoning.strip() not in upto or upto == without:
                raise _left_out(row, f"the reasoning of message {index}")


def _require_tool_turns(row: Row, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a template that passes over calls or results in silence: it must read otherwise without them.

    That their words are somewhere in the text would say little: a question often has them too.
    """
    parts = [
        *((index, "the calls", replace(message, tool_calls=())) for index, message in enumerate(messages)),
        *((i, "the result", replace(m, content="")) for i, m in enumerate(messages) if m.role == "tool"),
    ]
    changed = [(index, what, without) for index, what, without in parts if without != messages[index]]
    text = render(messages, tokenizer, row.tools) if changed else ""
    for index, what, without in changed:
        try:
            is_left_out = render((*messages[:index], without, *messages[index + 1 :]), tokenizer, row.tools) == text
        except (TemplateError, TypeError, ValueError):  # it looks at them, and misses them
            continue
        if is_left_out:
            raise _left_out(row, f"{what} of message {index}")


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

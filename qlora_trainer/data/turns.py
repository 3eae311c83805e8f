"""Finds the assistant's turns in the text of a conversation.

Where the template marks them with `{% generation %}`, they are taken from there. Else a turn begins where the prompt
for it ends: the template renders the messages before the turn, with its generation prompt, and that text must be a
prefix of the whole conversation's. So what is trained on follows exactly what generation will have seen, for any
template, without a rule of our own about its markers. A template that rewrites earlier turns once others follow (Qwen 3
forgets what was thought) breaks that for those turns: they are read, but not learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from jinja2.exceptions import TemplateError

from qlora_trainer.data.left_out import (
    num_lost_names,
    refuse_controls,
    require_reasoning,
    require_tool_turns,
    require_whole,
)
from qlora_trainer.data.messages import Message
from qlora_trainer.data.rows import Row
from qlora_trainer.data.template import Beginnings, marks_answers, render_marked
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
        message: index of the message that it renders.
        is_learned: whether its tokens are labels.
        forgets_thoughts: whether they may be missing: before the last answer, where the template marks what is learned.
    """

    start: int
    end: int
    message: int
    is_learned: bool = True
    forgets_thoughts: bool = False


@dataclass(frozen=True, slots=True)
class Rendered:
    """What is tokenised, special tokens included.

    Attributes:
        text: the whole.
        turns: the assistant's, those left out that nothing is said about.
        learns_all: the text between the turns is learned too.
        num_rewritten: turns that would be learned, had the template not rewritten them.
        num_lost_names: messages whose `name` the template does not render.
    """

    text: str
    turns: tuple[Turn, ...]
    learns_all: bool = False
    num_rewritten: int = 0
    num_lost_names: int = 0


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
    refuse_controls(row, controls)
    answers = [index for index, message in enumerate(row.messages) if message.role == "assistant"]
    messages = row.messages if train_on == "all" else row.messages[: answers[-1] + 1]  # what follows is learned by none
    chosen = answers[-1:] if train_on == "last_assistant" else answers
    learned = frozenset(index for index in chosen if messages[index].weight)
    beginnings = Beginnings(messages, tokenizer, row.tools)
    try:
        if marks_answers(tokenizer):
            rendered = _marked_turns(row, messages, answers, learned, tokenizer)
        else:
            rendered = _prefix_turns(row, beginnings, answers, learned, tokenizer, train_on)
        require_reasoning(row, beginnings, tokenizer)
    except (TemplateError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        roles = ", ".join(message.role for message in messages)
        raise DataError(
            where=row.where,
            found=f"a conversation that the chat template refuses ({error}); its roles: {roles}",
            expected="roles in the order that the model's template knows",
            fix="Reorder or merge the turns, or remove the row.",
        ) from error
    require_whole(row, messages, rendered.text)
    require_tool_turns(row, beginnings, tokenizer)
    lost_names = num_lost_names(row, beginnings, tokenizer)
    return replace(rendered, learns_all=train_on == "all", num_lost_names=lost_names)


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
        Turn(start, start + len(text[start:end].rstrip()), index, index in learned, index < answers[-1])
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
    beginnings: Beginnings,
    answers: Sequence[int],
    learned: frozenset[int],
    tokenizer: PreTrainedTokenizerBase,
    train_on: TrainOn,
) -> Rendered:
    """Turns that follow in the text what follows their prompt."""
    text = beginnings.text(len(beginnings.messages))
    turns: list[Turn] = []
    rewritten: dict[int, str] = {}
    for index in answers if train_on == "all" else sorted(learned):
        prompt = beginnings.prompt(index)
        upto = _open_end(beginnings, index + 1, tokenizer.eos_token)
        if upto.startswith(prompt) and text.startswith(upto):
            turns.append(Turn(len(prompt), max(len(prompt), len(upto.rstrip())), index, index in learned))
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


def _open_end(beginnings: Beginnings, num_messages: int, eos: object) -> str:
    """The text up to the end of the last turn, as it reads when others follow.

    Phi-3's template, for one, writes EOS after a whole conversation, which no answer ends with.
    """
    text = beginnings.text(num_messages)
    if not isinstance(eos, str) or not text.endswith(eos):
        return text
    try:
        going_on = beginnings.prompt(num_messages)
    except TemplateError:  # some allow no answer after an answer
        return text
    without = text.removesuffix(eos)
    return without if going_on.startswith(without) and not going_on.startswith(text) else text

"""Any conversation, drawn by hypothesis, and what of it is to be learned, by what is spelled out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from qlora_trainer.data.messages import Message
from qlora_trainer.data.rows import Row
from qlora_trainer.data.template import control_texts
from qlora_trainer.data.tool_calls import ToolCall
from qlora_trainer.data.turns import TrainOn
from qlora_trainer.step.document import IGNORE_INDEX, Document
from tests.data.published import PUBLISHED, Published, Segments, make_tokenizer

Labelled = list[tuple[str, bool]]  # text, and whether it is learned
BY_NAME = {published.name: published for published in PUBLISHED}
NAMES = list(BY_NAME)
MARKS = ("think>", "tool_response>")  # plain text that Qwen's templates look for
# SentencePiece's visible space stands for a space; nothing can tell them apart.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="▁")


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    return make_tokenizer(BY_NAME[name])


@cache
def all_controls() -> frozenset[str]:
    return frozenset(control for name in NAMES for control in control_texts(tokenizer_of(name)))


def is_plain(text: str) -> bool:
    """Hypothesis also draws the constants that it finds in our code; a control token among them is rightly refused."""
    return not any(control in text for control in (*all_controls(), *MARKS))


TEXT = st.text(CHARACTERS | st.sampled_from(" \n\t") | st.sampled_from("Hello"), max_size=30).filter(is_plain)
ANSWER = st.builds(str.__add__, st.sampled_from(["", "", "\n\n", " \n\n", "  "]), TEXT).filter(str.strip)
VALUES = st.recursive(TEXT | st.integers(-9, 9) | st.booleans(), lambda item: st.lists(item, max_size=2), max_leaves=3)
NAME = st.sampled_from(["add", "find_flights", "Füge_hinzu"])
CALLS = st.builds(
    ToolCall,
    name=NAME,
    arguments=st.dictionaries(TEXT, VALUES, max_size=2).map(json.dumps),
    call_id=st.sampled_from(["call00001", "aB3dE6gH9"]),
)
TOOLS = st.lists(NAME, max_size=2, unique=True).map(
    lambda names: [{"type": "function", "function": {"name": name, "parameters": {}}} for name in names]
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row, and what is learned of it.

    Attributes:
        messages: they hold an answer, and may go on after it.
        tools: functions that may be called.
        train_on: the option.
    """

    messages: tuple[Message, ...]
    tools: list[Any]
    train_on: TrainOn

    @property
    def row(self) -> Row:
        tools = json.dumps(self.tools, ensure_ascii=False) if self.tools else ""
        return Row(path="x", index=0, line=1, messages=self.messages, tools=tools)

    @property
    def learned(self) -> list[int]:
        """The numbers of the messages that are to be learned."""
        answers = [at for at, message in enumerate(self.messages) if message.role == "assistant"]
        chosen = answers[-1:] if self.train_on == "last_assistant" else answers
        return [at for at in chosen if self.messages[at].weight]


@st.composite
def conversations(draw: st.DrawFn, published: Published, *, most_calls: int | None = None) -> Conversation:
    """What the template knows; `most_calls` replaces how many calls it allows in an answer."""
    most_calls = published.most_calls if most_calls is None else most_calls
    messages = [Message("system", draw(TEXT))] if published.takes_system and draw(st.booleans()) else []
    weights = st.integers(0, 3).map(bool).map(int)
    reasoning = TEXT.filter(lambda text: text == "" or text.strip()) if published.name == "qwen_3" else st.just("")
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(TEXT)))
        for _ in range(draw(st.integers(0, 2)) if most_calls else 0):
            calls = tuple(draw(st.lists(CALLS, min_size=1, max_size=most_calls)))
            text = draw(st.just("") | ANSWER) if published.takes_text_with_calls else ""
            messages.append(Message("assistant", text, calls, weight=draw(weights), reasoning=draw(reasoning)))
            messages += [Message("tool", draw(TEXT), name=call.name, tool_call_id=call.call_id) for call in calls]
        messages.append(Message("assistant", draw(ANSWER), weight=draw(weights), reasoning=draw(reasoning)))
    if draw(st.booleans()):
        messages.append(Message("user", draw(TEXT)))
    tools = draw(TOOLS) if most_calls else []
    train_on: TrainOn = draw(st.sampled_from(["assistant", "assistant", "last_assistant", "all"]))
    return Conversation(tuple(messages), tools, train_on)


class RewritesHistoryError(Exception):
    """Nothing, or something else than is asked for, could be learned."""


def expected_labels(
    conversation: Conversation, written: Callable[[Sequence[Message], list[Any]], Segments]
) -> Labelled:
    """What is learned: answers that read as they did when they were the last, each with its stop token.

    Args:
        conversation: all of it.
        written: what the template writes of some messages.

    Raises:
        RewritesHistoryError: the template reads otherwise once others follow, where that matters.
    """
    learned, is_all = conversation.learned, conversation.train_on == "all"
    answers = [at for at, message in enumerate(conversation.messages) if message.role == "assistant"]
    messages = conversation.messages if is_all else conversation.messages[: answers[-1] + 1]
    text = joined(written(messages, conversation.tools))
    spans: dict[int, tuple[int, int]] = {}
    for at in answers if is_all else learned:
        upto = written(messages[: at + 1], conversation.tools)
        number = next(number for number, (_, of) in enumerate(upto) if of == at)
        begin = joined(upto[: number + 1])
        if text.startswith(begin):
            spans[at] = (len(begin) - len(upto[number][0]), len(begin))
    rewritten = set(answers if is_all else learned) - spans.keys()
    if rewritten and (rewritten - set(learned) if is_all else not spans):
        raise RewritesHistoryError
    is_learned = [is_all] * len(text)
    for at, (start, end) in spans.items():
        is_learned[start:end] = [at in learned] * (end - start)
    runs = groupby(range(len(text)), key=lambda character: is_learned[character])
    return [("".join(text[character] for character in run), learns) for learns, run in runs]


def joined(segments: Segments) -> str:
    return "".join(text for text, _ in segments)


def labelled(document: Document, tokenizer: PreTrainedTokenizerFast) -> Labelled:
    """The text of each run of tokens that are, or are not, labels."""
    is_label_T = (document.labels_T != IGNORE_INDEX).tolist()
    runs = groupby(zip(document.input_ids_T.tolist(), is_label_T, strict=True), key=lambda pair: pair[1])
    return [(str(tokenizer.decode([token for token, _ in run])), is_learned) for is_learned, run in runs]


def as_openai(message: Message) -> dict[str, Any]:
    """The message as users of transformers write it."""
    written: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        written["tool_calls"] = [
            {
                "id": call.call_id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.loads(call.arguments)},
            }
            for call in message.tool_calls
        ]
    optional = {"name": message.name, "tool_call_id": message.tool_call_id, "reasoning_content": message.reasoning}
    return written | {key: value for key, value in optional.items() if value}

"""A conversation with a base and its adapters, as a generator of what is said: lines go in, events come out."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event

from jinja2.exceptions import TemplateError

from qlora_trainer.config.adapter_names import BASE
from qlora_trainer.config.did_you_mean import closest
from qlora_trainer.data.chat import prompt_ids
from qlora_trainer.data.rows import Message
from qlora_trainer.data.template import require_chat_template
from qlora_trainer.hardware.memory import OutOfMemoryError
from qlora_trainer.model.adapter_set import AdapterSet
from qlora_trainer.model.positions import max_positions
from qlora_trainer.run.adapted_base import NamedAdapters, find_adapters, load_adapters
from qlora_trainer.run.chat_commands import HELP, Command, Said, Unknown, read_line
from qlora_trainer.run.invocations import not_at_work_told
from qlora_trainer.run.signals import watch_interrupt
from qlora_trainer.run.streamed_answer import Streamed, stream_answer


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerSettings:
    """How answers are made: longest in tokens; 0 takes the likeliest token each time; seed of the draws otherwise."""

    max_new_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class Ready:
    """Another line is asked for; `speaker` will answer it."""

    speaker: str


@dataclass(frozen=True, slots=True)
class Speaking:
    """Of several that answer the same, this one is next."""

    speaker: str


@dataclass(frozen=True, slots=True)
class Piece:
    """Some words of an answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """An answer is at its end."""

    answer: Streamed


@dataclass(frozen=True, slots=True)
class Note:
    """A line of ours, not of the model."""

    text: str


ChatEvent = Ready | Speaking | Piece | Ended | Note


@dataclass(frozen=True, slots=True)
class Chat:
    """What a conversation is held with: see `open_chat`."""

    named: NamedAdapters
    adapters: AdapterSet

    @property
    def speakers(self) -> tuple[str, ...]:
        """The base, and every adapter."""
        return (BASE, *self.adapters.names)


@dataclass(frozen=True, slots=True)
class _Talk:
    """How far a conversation is.

    Attributes:
        messages: what was said, and answered.
        speaker: who answers next.
        num_asked: questions so far, since each draws anew.
    """

    messages: tuple[Message, ...]
    speaker: str
    num_asked: int = 0


def open_chat(targets: Mapping[str, Path], *, base: str | None) -> Chat:
    """Load a base with its adapters.

    Raises:
        ConfigError: see `find_adapters` and `load_adapters`; or there is no chat template.
    """
    named = find_adapters(targets, base=base)
    for tokenizer in named.tokenizers.values():
        require_chat_template(tokenizer, str(named.base.folder))
    return Chat(named, load_adapters(named))


def converse(chat: Chat, lines: Iterator[str], *, speaker: str, settings: AnswerSettings) -> Iterator[ChatEvent]:
    """Answer `lines` until they end, or one of them asks for the end.

    Args:
        chat: its adapters are swapped as they are asked for.
        lines: messages and commands (see `chat_commands`); the next is taken after each `Ready`.
        speaker: who answers first: `BASE`, or the name of an adapter.
        settings: of every answer.

    Raises:
        KeyboardInterrupt: Ctrl+C twice in one answer; once stops the answer.
    """
    talk = _Talk((), speaker)
    while True:
        yield Ready(talk.speaker)
        line = next(lines, None)
        if line is None:
            return
        match read_line(line):
            case None:
                continue
            case Said(text):
                talk = yield from _answered(chat, talk, text, settings)
            case Command("/quit", _):
                return
            case Command("/help", _):
                yield from map(Note, HELP.values())
            case Command("/reset", _):
                talk = replace(talk, messages=())
                yield Note("a new conversation")
            case Command("/use", name):
                talk = yield from _used(chat, talk, name)
            case Command("/compare", text):
                yield from _compared(chat, talk, text, settings)
                talk = replace(talk, num_asked=talk.num_asked + 1)
            case Unknown(word, hint):
                yield Note(f"no command {word[:40]}. {hint or 'See /help.'}")


def _answered(chat: Chat, talk: _Talk, text: str, settings: AnswerSettings) -> Generator[ChatEvent, None, _Talk]:
    """The conversation with the message and its answer; without both where there was none."""
    asked = (*talk.messages, Message(role="user", content=text))
    with watch_interrupt() as stop:
        answer = yield from _say(chat, asked, talk.speaker, settings, talk.num_asked, stop)
    talk = replace(talk, num_asked=talk.num_asked + 1)
    if answer is None:
        return talk
    if answer.ending == "interrupted" and not answer.text:
        yield Note("stopped before the first word: the message is not kept")
        return talk
    return replace(talk, messages=(*asked, Message(role="assistant", content=answer.text)))


def _used(chat: Chat, talk: _Talk, name: str) -> Generator[ChatEvent, None, _Talk]:
    there = ", ".join(f"{one} (now)" if one == talk.speaker else one for one in chat.speakers)
    if not name:
        yield Note(there)
        return talk
    if name not in chat.speakers:
        hint = closest(name, chat.speakers)
        yield Note(f"no adapter {name[:40]}. {hint or f'There are: {there}.'}")
        return talk
    yield Note(f"{name} goes on with this conversation" if talk.messages else f"now {name}")
    return replace(talk, speaker=name)


def _compared(chat: Chat, talk: _Talk, text: str, settings: AnswerSettings) -> Iterator[ChatEvent]:
    """What each would say to a message here, or would have said to the last one; the conversation stays as it is."""
    if text:
        asked = (*talk.messages, Message(role="user", content=text))
    elif talk.messages:
        asked = talk.messages[:-1]  # without the answer that it got
    else:
        yield Note("nothing was said yet: /compare TEXT")
        return
    with watch_interrupt() as stop:
        for speaker in chat.speakers:
            yield Speaking(speaker)
            answer = yield from _say(chat, asked, speaker, settings, talk.num_asked, stop)
            if answer is None or stop.is_set():  # also where the answer was at its end when the flag was seen
                return


def _say(
    chat: Chat, asked: tuple[Message, ...], speaker: str, settings: AnswerSettings, number: int, stop: Event
) -> Generator[ChatEvent, None, Streamed | None]:
    """One answer; None where there can be none, which is told."""
    base = chat.named.base
    tokenizer = chat.named.tokenizers[speaker]
    try:
        ids = prompt_ids(asked, tokenizer)
    except (TemplateError, TypeError, ValueError) as error:
        yield Note(f"the chat template of {speaker} refuses this conversation ({error}); /reset begins a new one")
        return None
    most = max_positions(base.config)
    room = settings.max_new_tokens if most is None else min(settings.max_new_tokens, most - len(ids))
    if room < 1:
        yield Note(f"too long: {len(ids):,} tokens, and {base.name} has {most:,} positions; /reset begins a new one")
        return None
    chat.adapters.activate(None if speaker == BASE else speaker)
    if (told := not_at_work_told(ids, chat.adapters.model.of_tokens.invocation)) is not None:
        yield Note(told)
    pieces = stream_answer(
        chat.adapters.model,
        tokenizer,
        base,
        ids,
        max_new_tokens=room,
        temperature=settings.temperature,
        seed=settings.seed + number,
        stop=stop,
    )
    try:
        answer = yield from _as_pieces(pieces)
    except OutOfMemoryError:
        yield Note(f"memory ran out at {len(ids):,} tokens; /reset begins a new conversation")
        return None
    yield Ended(answer)
    if answer.ending == "length":
        is_full = room < settings.max_new_tokens
        yield Note(
            f"cut: {base.name} has no more positions; /reset begins a new conversation"
            if is_full
            else f"cut after {room} tokens (--max-new-tokens)"
        )
    return answer


def _as_pieces(texts: Generator[str, None, Streamed]) -> Generator[Piece, None, Streamed]:
    while True:
        try:
            yield Piece(next(texts))
        except StopIteration as end:
            answer: Streamed = end.value
            return answer

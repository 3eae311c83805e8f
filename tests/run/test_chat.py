"""A conversation: who answers, what is kept, and that nothing a person types ends it but the two ways to end it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.config.adapter_names import BASE
from qlora_trainer.data.rows import Message
from qlora_trainer.errors import ConfigError
from qlora_trainer.hardware.memory import OutOfMemoryError
from qlora_trainer.run.answer import answer_all
from qlora_trainer.run.chat import (
    AnswerSettings,
    Chat,
    ChatEvent,
    Ended,
    Note,
    Piece,
    Ready,
    Speaking,
    converse,
    open_chat,
)
from qlora_trainer.run.chat_commands import HELP, Command, Said, Unknown, read_line
from qlora_trainer.run.streamed_answer import stream_answer
from tests.run.tiny_adapters import write_adapter
from tests.run.tiny_run import CHATML, write_base

STREAM_ANSWER = "qlora_trainer.run.chat.stream_answer"
SETTINGS = AnswerSettings(max_new_tokens=8, temperature=0.0, seed=0)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Chat:
    folder = tmp_path_factory.mktemp("adapters")
    shouted = CHATML.replace("assistant", "ASSISTANT")
    return open_chat(
        {
            "a": write_adapter(folder / "a", base, seed=1),
            "b": write_adapter(folder / "b", base, seed=2, target_modules=["q_proj"], chat_template=shouted, size=1.0),
        },
        base=None,
    )


def held(chat: Chat, *lines: str, speaker: str = "a", settings: AnswerSettings = SETTINGS) -> list[ChatEvent]:
    return list(converse(chat, iter(lines), speaker=speaker, settings=settings))


def notes(events: list[ChatEvent]) -> list[str]:
    return [event.text for event in events if isinstance(event, Note)]


def answers(events: list[ChatEvent]) -> list[str]:
    return [event.answer.text for event in events if isinstance(event, Ended)]


def expected(chat: Chat, speaker: str, *contents: str) -> str:
    """What `answer_all`, and so `generate`, says after these turns, of user and assistant in turn."""
    chat.adapters.activate(None if speaker == BASE else speaker)
    turns = [Message("assistant" if number % 2 else "user", content) for number, content in enumerate(contents)]
    return answer_all(chat.adapters.model, chat.named.tokenizers[speaker], chat.named.base, [turns], max_new_tokens=8)[
        0
    ]


def test_an_answer_follows_from_all_that_was_said(chat: Chat) -> None:
    events = held(chat, "What is 1 + 1?\n", "", "And 2 + 2?")
    first, second = answers(events)
    assert first == expected(chat, "a", "What is 1 + 1?")
    assert second == expected(chat, "a", "What is 1 + 1?", first, "And 2 + 2?")
    assert second != expected(chat, "a", "And 2 + 2?")
    pieces = "".join(event.text for event in events if isinstance(event, Piece))
    assert pieces == first + second
    assert [event.speaker for event in events if isinstance(event, Ready)] == ["a"] * 4
    assert notes(events) == ["cut after 8 tokens (--max-new-tokens)"] * 2


def test_another_adapter_goes_on_with_the_conversation(chat: Chat) -> None:
    events = held(chat, "What is 1 + 1?", "/use b", "And 2 + 2?", "/use base", "/reset", "Hi")
    first, second, third = answers(events)
    assert second == expected(chat, "b", "What is 1 + 1?", first, "And 2 + 2?")
    assert third == expected(chat, BASE, "Hi")
    assert [event.speaker for event in events if isinstance(event, Ready)] == ["a", "a", "b", "b", BASE, BASE, BASE]
    assert "b goes on with this conversation" in notes(events)


def test_comparing_asks_all_the_same_and_changes_nothing(chat: Chat) -> None:
    events = held(chat, "What is 1 + 1?", "/compare", "/compare What is 5 + 5?", "And 2 + 2?")
    first, *compared, last = answers(events)
    assert compared[:3] == [expected(chat, name, "What is 1 + 1?") for name in (BASE, "a", "b")]
    assert compared[3:] == [
        expected(chat, name, "What is 1 + 1?", first, "What is 5 + 5?") for name in (BASE, "a", "b")
    ]
    assert len(set(compared[:3])) == 3
    assert [event.speaker for event in events if isinstance(event, Speaking)] == [BASE, "a", "b"] * 2
    assert last == expected(chat, "a", "What is 1 + 1?", first, "And 2 + 2?")


def test_draws_are_of_the_seed_and_the_number_of_the_question(chat: Chat) -> None:
    drawn = AnswerSettings(max_new_tokens=8, temperature=5.0, seed=3)
    asked = ("Hi", "/reset", "Hi")
    one, other = (answers(held(chat, *asked, settings=drawn)) for _ in range(2))
    assert one == other
    assert one[0] != one[1]


@pytest.mark.parametrize(
    "lines,said",
    [
        (["/us b"], "no command /us. Did you mean /use?"),
        (["/Reset"], "no command /Reset. Did you mean /reset?"),
        (["/frobnicate"], "no command /frobnicate. See /help."),
        (["/use c"], "no adapter c. There are: base, a (now), b."),
        (["/use bas"], "no adapter bas. Did you mean base?"),
        (["/use ../x"], "no adapter ../x. There are: base, a (now), b."),
        (["/use"], "base, a (now), b"),
        (["/use a"], "now a"),
        (["/compare"], "nothing was said yet: /compare TEXT"),
        (["/reset"], "a new conversation"),
    ],
)
def test_what_is_not_for_the_model_is_answered_by_us(chat: Chat, lines: list[str], said: str) -> None:
    events = held(chat, *lines)
    assert notes(events) == [said]
    assert answers(events) == []


def test_help_tells_every_command_and_quit_ends(chat: Chat) -> None:
    events = held(chat, "/help", "/quit", "never asked")
    assert notes(events) == list(HELP.values())
    assert answers(events) == []


def test_lines_are_read_as_they_are_meant() -> None:
    assert read_line("  \n") is None
    assert read_line("/use  b \n") == Command("/use", "b")
    assert read_line("//etc is what?") == Said("/etc is what?")
    assert read_line(" 2 / 2? ") == Said("2 / 2?")
    assert read_line("/") == Unknown("/", "")


def test_a_conversation_longer_than_the_positions_is_told_and_goes_on(chat: Chat) -> None:
    long = "What is 1 + 1? " * 100
    events = held(chat, long, "Hi")
    (answer,) = answers(events)
    assert answer == expected(chat, "a", "Hi")  # the long message was not kept
    assert "has 256 positions; /reset begins a new one" in notes(events)[0]


def test_an_answer_ends_at_the_last_position(chat: Chat) -> None:
    settings = AnswerSettings(max_new_tokens=1000, temperature=0.0, seed=0)
    events = held(chat, "Hi", settings=settings)
    (ended,) = (event for event in events if isinstance(event, Ended))
    assert ended.answer.ending == "length"
    assert notes(events) == [f"cut: {chat.named.base.name} has no more positions; /reset begins a new conversation"]


def stopped_after(events: Iterator[ChatEvent], *, pieces: int) -> list[ChatEvent]:
    """All events; Ctrl+C is pressed when so many pieces were seen."""
    found: list[ChatEvent] = []
    for event in events:
        found.append(event)
        if sum(isinstance(one, Piece) for one in found) == pieces and isinstance(event, Piece):
            os.kill(os.getpid(), signal.SIGINT)
    return found


def test_ctrl_c_stops_the_answer_and_what_was_said_is_kept(chat: Chat) -> None:
    handler = signal.getsignal(signal.SIGINT)
    settings = AnswerSettings(max_new_tokens=150, temperature=0.0, seed=0)
    lines = iter(["What is 1 + 1?", "Hi"])
    events = stopped_after(converse(chat, lines, speaker="a", settings=settings), pieces=1)
    first, second = (event.answer for event in events if isinstance(event, Ended))
    assert first.ending == "interrupted"
    assert 0 < first.num_tokens < 150
    tokenizer = chat.named.tokenizers["a"]
    turns = [Message("user", "What is 1 + 1?"), Message("assistant", first.text), Message("user", "Hi")]
    chat.adapters.activate("a")
    assert (
        second.text
        == answer_all(chat.adapters.model, tokenizer, chat.named.base, [turns], max_new_tokens=second.num_tokens)[0]
    )
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_stops_a_comparison_as_a_whole(chat: Chat) -> None:
    settings = AnswerSettings(max_new_tokens=150, temperature=0.0, seed=0)
    events = stopped_after(converse(chat, iter(["/compare Hi", "/use"]), speaker="a", settings=settings), pieces=1)
    assert [event.speaker for event in events if isinstance(event, Speaking)] == [BASE]
    assert notes(events)[-1] == "base, a (now), b"  # it is a's conversation still


def test_a_second_ctrl_c_is_the_end(chat: Chat) -> None:
    settings = AnswerSettings(max_new_tokens=200, temperature=0.0, seed=0)
    events = converse(chat, iter(["Hi"]), speaker="a", settings=settings)
    assert any(isinstance(event, Piece) for event in events)  # as far as the first of them
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    events.close()  # type: ignore[attr-defined]
    assert answers(held(chat, "Hi")) == [expected(chat, "a", "Hi")]


def test_what_cannot_be_answered_is_told_and_not_kept(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:

    def out_of_memory(*_: Any, **__: Any) -> Iterator[str]:
        monkeypatch.setattr(STREAM_ANSWER, stream_answer)
        raise OutOfMemoryError
        yield

    monkeypatch.setattr(STREAM_ANSWER, out_of_memory)
    events = held(chat, "What is 1 + 1?", "Hi")
    assert notes(events)[0].startswith("memory ran out at ")
    assert answers(events) == [expected(chat, "a", "Hi")]
    picky = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}" + CHATML
    monkeypatch.setattr(chat.named.tokenizers["b"], "chat_template", picky)
    events = held(chat, "Hi", "Hello", speaker="b")
    assert notes(events)[-1] == (
        "the chat template of b refuses this conversation (one turn only); /reset begins a new one"
    )


def test_a_base_alone_can_be_talked_with(base: Path) -> None:
    chat = open_chat({}, base=str(base))
    assert chat.speakers == (BASE,)
    assert answers(held(chat, "Hi", speaker=BASE)) == [expected(chat, BASE, "Hi")]


def test_without_a_chat_template_there_is_no_conversation(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a tokenizer without a chat template"):
        open_chat({}, base=str(write_base(tmp_path / "base", chat_template=None)))

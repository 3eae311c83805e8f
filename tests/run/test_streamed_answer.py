"""A streamed answer is the one that comes whole, and leaves the model free however it ends."""

from __future__ import annotations

import threading
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from qlora_trainer.config.adapter_names import BASE
from qlora_trainer.data.chat import prompt_ids
from qlora_trainer.data.rows import Message
from qlora_trainer.hardware.memory import OutOfMemoryError
from qlora_trainer.model.attention import IMPLEMENTATION
from qlora_trainer.run import streamed_answer
from qlora_trainer.run.answer import answer_all, generation_settings
from qlora_trainer.run.chat import Chat, open_chat
from qlora_trainer.run.streamed_answer import Streamed, stream_answer
from tests.run.tiny_adapters import write_adapter

ASKED = (Message("user", "What is 3 + 3?"),)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Chat:
    return open_chat({"a": write_adapter(tmp_path_factory.mktemp("a") / "a", base, seed=1)}, base=None)


def stream(chat: Chat, stop: Event, **changes: Any) -> Any:
    tokenizer = chat.named.tokenizers[BASE]
    settings = {"max_new_tokens": 24, "temperature": 0.0, "seed": 0} | changes
    ids = prompt_ids(ASKED, tokenizer)
    return stream_answer(chat.adapters.model, tokenizer, chat.named.base, ids, stop=stop, **settings)


def all_of(pieces: Any) -> tuple[list[str], Streamed]:
    found = []
    while True:
        try:
            found.append(next(pieces))
        except StopIteration as end:
            return found, end.value


def require_free(chat: Chat) -> None:
    assert not [thread for thread in threading.enumerate() if "generate" in thread.name]
    assert chat.adapters.model.module.config._attn_implementation == IMPLEMENTATION
    assert not chat.adapters.model.module.training


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("speaker", [None, "a"])
def test_the_pieces_are_the_whole_answer(chat: Chat, speaker: str | None, temperature: float) -> None:
    chat.adapters.activate(speaker)
    before = torch.random.get_rng_state()
    pieces, answer = all_of(stream(chat, Event(), temperature=temperature, seed=7))
    tokenizer = chat.named.tokenizers[BASE]
    (whole,) = answer_all(
        chat.adapters.model,
        tokenizer,
        chat.named.base,
        [ASKED],
        max_new_tokens=24,
        temperature=temperature,
        seed=7,
    )
    assert answer.text == "".join(pieces) == whole != ""
    assert (answer.num_tokens, answer.ending) == (24, "length")
    assert torch.equal(before, torch.random.get_rng_state())
    require_free(chat)


def test_a_stop_token_ends_it(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    chat.adapters.activate("a")
    _, long = all_of(stream(chat, Event()))
    fifth = chat.named.tokenizers[BASE](long.text).input_ids[4]

    def with_another_stop(*arguments: Any, **named: Any) -> Any:
        settings = generation_settings(*arguments, **named)
        settings.eos_token_id = [fifth]
        return settings

    monkeypatch.setattr("qlora_trainer.run.streamed_answer.generation_settings", with_another_stop)
    _, answer = all_of(stream(chat, Event()))
    assert answer.ending == "stop"
    assert answer.num_tokens < long.num_tokens == 24


def test_a_flag_cuts_it_at_the_next_token(chat: Chat) -> None:
    chat.adapters.activate("a")
    stop = Event()
    pieces = stream(chat, stop, max_new_tokens=200)
    next(pieces)
    stop.set()
    _, answer = all_of(pieces)
    assert answer.ending == "interrupted"
    assert 0 < answer.num_tokens < 200
    require_free(chat)


def test_a_reader_that_goes_away_frees_the_model(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    chat.adapters.activate("a")
    made: list[int] = []
    real: Any = chat.adapters.model.module.generate

    def counted(**named: Any) -> Any:
        out_BT = real(**named)
        made.append(out_BT.shape[1] - named["input_ids"].shape[1])
        return out_BT

    monkeypatch.setattr(chat.adapters.model.module, "generate", counted)
    stop = Event()
    pieces = stream(chat, stop, max_new_tokens=200)
    next(pieces)
    pieces.close()
    require_free(chat)
    assert 0 < made[0] < 200
    assert not stop.is_set()  # that flag is the caller's


@pytest.mark.parametrize(
    "raised,seen", [(MemoryError(), OutOfMemoryError), (ZeroDivisionError(), ZeroDivisionError)], ids=str
)
def test_what_fails_in_the_thread_fails_here(
    chat: Chat, raised: Exception, seen: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(chat.adapters.model.module, "generate", fail)
    with pytest.raises(seen):
        all_of(stream(chat, Event()))
    require_free(chat)


def test_white_space_at_the_ends_is_left_out() -> None:
    assert (
        "".join(streamed_answer._without_ends(iter(["", " \n", " a", " ", "b \n", "\n", " c", " ", ""])))
        == "a b \n\n c"
    )
    assert list(streamed_answer._without_ends(iter([" ", "\n"]))) == []

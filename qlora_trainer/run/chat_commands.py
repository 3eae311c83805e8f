"""What a line of a conversation asks for: something is said, or a command is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from qlora_trainer.config.did_you_mean import closest

Name = Literal["/use", "/compare", "/reset", "/help", "/quit"]
HELP: Mapping[Name, str] = MappingProxyType(
    {
        "/use": "/use NAME       go on with another adapter, or with base; without a name: which there are",
        "/compare": "/compare TEXT   what base and every adapter would say next; without a text: to your last message",
        "/reset": "/reset          begin a new conversation",
        "/help": "/help           these lines; a message that begins with / is written with two of them",
        "/quit": "/quit           the end, as Ctrl+D; Ctrl+C stops an answer",
    }
)


@dataclass(frozen=True, slots=True)
class Said:
    """A message for the model."""

    text: str


@dataclass(frozen=True, slots=True)
class Command:
    """A command, and what follows it; may be empty."""

    name: Name
    argument: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """A line that begins like a command and is none.

    Attributes:
        word: its first word.
        hint: which may have been meant; may be empty.
    """

    word: str
    hint: str


def read_line(line: str) -> Said | Command | Unknown | None:
    """What a line asks for; None where it is blank."""
    text = line.strip()
    if not text:
        return None
    if text.startswith("//"):
        return Said(text[1:])
    if not text.startswith("/"):
        return Said(text)
    word, _, argument = text.partition(" ")
    for name in HELP:
        if word == name:
            return Command(name, argument.strip())
    return Unknown(word, closest(word.lower(), HELP))

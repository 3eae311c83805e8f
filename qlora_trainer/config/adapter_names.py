"""What adapters may be called where several lie beside each other: `chat --adapter NAME=FOLDER`, `/use NAME`."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from qlora_trainer.errors import ConfigError

BASE = "base"  # what is at work while no adapter is
MAX_CHARACTERS = 64
_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,{MAX_CHARACTERS - 1}}}", re.ASCII)


def check_adapter_name(name: str, *, taken: Collection[str] = ()) -> str:
    """The name itself, if it can be one: it may be shown, typed after a command, and be a file's name.

    Args:
        name: as it came from outside.
        taken: names that others have.

    Raises:
        ConfigError: no such name, or one that is taken.
    """
    if name == BASE:
        found = f"{BASE!r}, which is the model without any adapter"
    elif name in taken:
        found = f"{name!r} twice"
    elif _NAME.fullmatch(name) and ".." not in name:
        return name
    else:
        found = f"{name[:MAX_CHARACTERS]!r}{f' and more, {len(name)} characters' * (len(name) > MAX_CHARACTERS)}"
    raise ConfigError(
        where="the name of an adapter",
        found=found,
        expected=f"1 to {MAX_CHARACTERS} of the characters A-Z a-z 0-9 _ - . for each, none twice",
        fix="Name it after what it learned, such as --adapter sums=runs/sums.",
    )


def parse_named_folders(options: Sequence[str]) -> dict[str, Path]:
    """`NAME=FOLDER` texts as names and folders, in order.

    Raises:
        ConfigError: a text without "=", without a folder, or with a name that cannot be one.
    """
    folders: dict[str, Path] = {}
    for option in options:
        name, equals, folder = option.partition("=")
        if not equals or not folder:
            raise ConfigError(
                where="--adapter",
                found=repr(option[:200]),
                expected="NAME=FOLDER",
                fix="For example --adapter sums=runs/sums.",
            )
        folders[check_adapter_name(name, taken=folders)] = Path(folder)
    return folders


def name_of_folder(folder: Path, *, taken: Collection[str] = ()) -> str:
    """What an adapter is called that nobody named: as its run is.

    Args:
        folder: a run folder or an adapter folder.
        taken: names that others have; a number behind the name keeps them apart.
    """
    path = folder.absolute()
    word = path.parent.name if path.name == "adapter" else path.name
    word = re.sub(r"[^A-Za-z0-9_-]+", "-", word, flags=re.ASCII).strip("-")[: MAX_CHARACTERS - 8] or "adapter"
    word = f"{word}-adapter" if word == BASE else word
    names = (word, *(f"{word}-{number}" for number in range(2, len(taken) + 2)))
    return next(name for name in names if name not in taken)

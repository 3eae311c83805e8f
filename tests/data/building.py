"""Processes that build one cache of tokens at once, two of which are killed in the middle.

    python -m tests.data.building DATA TOKENIZER MEETING

They are forked out of one process that has imported everything, before it starts a thread, and each makes the tokens
itself, as the process does that a run begins for it; they wait for each other
(`MEETING`) when each has checked a part of the rows, so that all are at it at the same time.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

import datasets  # noqa: F401 # what tokenising imports
from transformers import PreTrainedTokenizerFast

from qlora_trainer.config.schema import DataSection
from qlora_trainer.data import token_cache
from qlora_trainer.data.known_tokenizer import KnownTokenizer
from qlora_trainer.data.token_cache import tokenize_named
from qlora_trainer.data.token_maker import make_tokens

BUILDERS = ("killed", "killed later", "first", "second")
KILLED_AT = {"killed": ("checking", 1000), "killed later": ("tokenising", 1000)}
PATIENCE_SECONDS = 60.0


def build(name: str, data: str, tokenizer: str, meeting: Path) -> None:
    """Makes the tokens of `data`, or is killed while it does; leaves a hash of what it then reads in `meeting`."""
    fast = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    reading = tokenize_named(DataSection(train=data), "train", KnownTokenizer(fast, "hash of its files", "the base"))
    num_seen = 0
    while True:
        try:
            seen = next(reading)
        except StopIteration as end:
            store = end.value.store
            break
        num_seen += 1
        if num_seen == 1:
            _meet(name, meeting)
        if KILLED_AT.get(name) == (seen.doing, seen.num_rows):
            os.kill(os.getpid(), signal.SIGKILL)
    read = hashlib.sha256()
    for row in range(store.num_rows):
        read.update(store.where(row).encode())
    (meeting / f"{name}.read").write_text(f"{num_seen} {store.num_rows} {store.content_hash} {read.hexdigest()}")


def _meet(name: str, meeting: Path) -> None:
    (meeting / f"{name}.half").touch()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(list(meeting.glob("*.half"))) < len(BUILDERS):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{name} is alone")
        time.sleep(0.01)


def main() -> None:
    """Exits with how the builders ended, by name, on stdout."""
    data, tokenizer, meeting = sys.argv[1:]
    vars(token_cache)["make_tokens_apart"] = make_tokens
    processes = {}
    for name in BUILDERS:
        process = os.fork()
        if not process:
            code = 1
            try:
                build(name, data, tokenizer, Path(meeting))
                code = 0
            finally:
                os._exit(code)
        processes[name] = process
    for name, process in processes.items():
        _, status = os.waitpid(process, 0)
        print(name, os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()

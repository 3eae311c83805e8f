"""The rows that a merged model is measured on: those that its run held out, or a file that the user names."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_trainer.config.data_files import require_data
from qlora_trainer.data.rows import Reading
from qlora_trainer.errors import ConfigError
from qlora_trainer.export.source import Source
from qlora_trainer.model.base import read_tokenizer
from qlora_trainer.run.eval_config import JudgedOn, eval_config, holds_out
from qlora_trainer.run.evaluation import read_held_out
from qlora_trainer.run.inputs import known_tokenizer, spread
from qlora_trainer.run.session import packs
from qlora_trainer.step.document import Document


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Documents to measure on.

    Attributes:
        documents: from all over the held-out part.
        num_held_out: how many there are in it.
        packing: whether they may share rows.
        where: the files, for a reader.
    """

    documents: Sequence[Document]
    num_held_out: int
    packing: bool
    where: str


def measured_on(target: Path, source: Source, data: str | None) -> JudgedOn:
    """Which rows those are; nothing of them is read yet.

    Args:
        target: the adapter as the user named it.
        source: the same, and its run if there is one.
        data: a file or pattern to measure on, or None for the rows that the run held out.

    Raises:
        ConfigError: there is neither.
        DataError: the files are missing or broken.
    """
    if data is None and (source.config is None or not holds_out(source.config)):
        what = "an adapter without its run" if source.config is None else "a run that held out no rows"
        raise ConfigError(
            where=str(source.folder),
            found=what,
            expected="rows to measure the merged model on",
            fix="Give some with --data FILE, or merge unmeasured with --force.",
        )
    judged_on = eval_config({str(target): target}, [] if data is None else [data])
    section = judged_on.config.data
    require_data(section if section.eval is None else section.model_copy(update={"train": section.eval, "eval": None}))
    return judged_on


def read_documents(judged_on: JudgedOn, source: Source, *, max_tokens: int) -> Generator[Reading, None, HeldOut]:
    """Tokenise the held-out rows and choose some, while yielding how far it is.

    Args:
        judged_on: see `measured_on`.
        source: the base whose tokenizer counts.
        max_tokens: of all chosen documents together; one document is chosen in any case.

    Raises:
        DataError: no row is left, or the run's data has changed.
        QloraTrainerError: see the rooms that are called.
    """
    config = judged_on.config
    tokenizer = known_tokenizer(config, source.base, read_tokenizer(source.base.folder))
    data, _ = yield from read_held_out(judged_on, source.base, tokenizer)
    documents = data.documents
    everyone = range(len(documents))
    count, num_tokens = len(documents), data.num_tokens
    while count > 1 and num_tokens > max_tokens:
        count = max(1, min(count - 1, count * max_tokens // num_tokens))
        num_tokens = sum(documents.num_tokens(position) for position in spread(everyone, count))
    chosen = [documents[position] for position in spread(everyone, count)]
    return HeldOut(chosen, len(documents), packs(config, source.base), data.path)

"""The rows that a merged model is measured on: those that its run held out, or a file that the user names."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np

from qlora_trainer.config.bases import CHAT_TEMPLATE_FILE
from qlora_trainer.config.data_files import require_data
from qlora_trainer.config.load import load_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.rows import Reading
from qlora_trainer.data.token_cache import tokenize_named
from qlora_trainer.data.tokenized import fit_documents, select
from qlora_trainer.errors import ConfigError, DataError
from qlora_trainer.export.source import Source
from qlora_trainer.model.base import read_tokenizer
from qlora_trainer.run.inputs import decide_seq_len, known_tokenizer, spread, train_and_held_out
from qlora_trainer.run.session import packs
from qlora_trainer.step.document import Document


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Documents to measure on.

    Attributes:
        documents: whole ones, from all over the held-out part.
        num_held_out: how many there are in it.
        packing: whether they may share rows.
        where: the files, for a reader.
    """

    documents: Sequence[Document]
    num_held_out: int
    packing: bool
    where: str


def measuring_config(source: Source, data: str | None) -> RunConfig:
    """How the held-out rows are found and read.

    Args:
        source: the adapter, and its run if there is one.
        data: a file or pattern to measure on, or None for the rows that the run held out.

    Raises:
        ConfigError: there is neither.
        DataError: the files are missing or broken.
    """
    if data is None and (source.config is None or not _holds_out(source.config)):
        what = "an adapter without its run" if source.config is None else "a run that held out no rows"
        raise ConfigError(
            where=str(source.folder),
            found=what,
            expected="rows to measure the merged model on",
            fix="Give some with --data FILE, or merge unmeasured with --force.",
        )
    named = []
    if data is not None:  # in place of all that the run read
        named = [f"data.eval={json.dumps(data)}", f"data.train={json.dumps(data)}", "data.revision=null"]
    if source.chat_template is not None:
        named.append(f"data.chat_template={json.dumps(str(source.folder / CHAT_TEMPLATE_FILE))}")
    if source.run is None:
        config = load_config(None, [*named, f"model.base={json.dumps(source.base_name)}"])
    else:
        config = load_config(source.run.config_path, named)
    section = config.data
    read = section if section.eval is None else section.model_copy(update={"train": section.eval, "eval": None})
    require_data(read)
    return config


def read_held_out(config: RunConfig, source: Source, *, max_tokens: int) -> Generator[Reading, None, HeldOut]:
    """Tokenise the held-out rows and choose some, while yielding how far it is.

    Args:
        config: see `measuring_config`.
        source: the base whose tokenizer counts.
        max_tokens: of all chosen documents together; one document is chosen in any case.

    Raises:
        DataError: no row is left.
        QloraTrainerError: see the rooms that are called.
    """
    tokenizer = known_tokenizer(config, source.base, read_tokenizer(source.base.folder))
    if config.data.eval is None:
        files = yield from tokenize_named(config.data, "train", tokenizer)
        _, rows_N = train_and_held_out(config, files.store, None)
    else:
        files = yield from tokenize_named(config.data, "eval", tokenizer)
        rows_N = np.arange(files.store.num_rows, dtype=np.int32)
    whole = select(files.store, rows_N, bos_token_id=tokenizer.tokenizer.bos_token_id)
    if not len(whole.documents):
        raise DataError(
            where=whole.path or "the held-out rows",
            found=f"no document with a token to learn, of {rows_N.size} rows",
            expected="rows to measure the merged model on",
            fix="Give others with --data FILE.",
        )
    seq_len = decide_seq_len(config, source.base, whole)
    data = fit_documents(whole, seq_len, overlong=config.data.overlong, max_dropped_share=1.0)
    documents = data.documents
    num_chosen = len(documents)
    while num_chosen > 1:
        chosen_N = np.asarray(spread(np.arange(len(documents), dtype=np.int32), num_chosen))
        num_tokens = int(documents.lengths_N[chosen_N].sum(dtype=np.int64))
        if num_tokens <= max_tokens:
            break
        num_chosen = max(1, min(num_chosen - 1, num_chosen * max_tokens // num_tokens))
    chosen = spread(np.arange(len(documents), dtype=np.int32), num_chosen)
    return HeldOut([documents[index] for index in chosen], len(documents), packs(config, source.base), data.path)


def _holds_out(config: RunConfig) -> bool:
    return config.data.eval is not None or (config.data.eval_fraction > 0 and not config.data.streaming)

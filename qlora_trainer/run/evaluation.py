"""Adapters judged on held-out rows: one base in memory, each adapter in turn, the base without any first."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_trainer.config.adapter_names import BASE
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.known_tokenizer import KnownTokenizer
from qlora_trainer.data.micro_batches import cut_documents
from qlora_trainer.data.named import num_bad_rows
from qlora_trainer.data.rows import Reading
from qlora_trainer.data.split import all_rows
from qlora_trainer.data.token_cache import tokenize_named
from qlora_trainer.data.tokenized import TokenizedData, choose_seq_len, fit_documents, select
from qlora_trainer.errors import DataError, DivergedError, DoesNotFitError
from qlora_trainer.hardware.device import num_cpu_threads
from qlora_trainer.hardware.memory import OutOfMemoryError, memory_errors_as_ours
from qlora_trainer.model.adapter_set import AdapterSet
from qlora_trainer.model.base import Base
from qlora_trainer.model.positions import max_positions, require_positions
from qlora_trainer.run.adapted_base import NamedAdapters, load_adapters
from qlora_trainer.run.checkpoint.manifest import read_manifest
from qlora_trainer.run.eval_config import JudgedOn
from qlora_trainer.run.folder import RunFolder
from qlora_trainer.run.inputs import known_tokenizer, train_and_held_out
from qlora_trainer.run.invocations import counted
from qlora_trainer.run.planned import lack_of_memory_told
from qlora_trainer.run.records import Preparing
from qlora_trainer.run.session import packs
from qlora_trainer.step.batch import MicroBatch, make_micro_batch
from qlora_trainer.step.document import Document
from qlora_trainer.step.scores import Scores, score

MICRO_BATCH_TOKENS = 2048  # at once, where no run says how many fit: nothing is kept for a backward
LOSS_CHUNK_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One line of the table.

    Attributes:
        name: of the adapter, or `BASE`.
        path: as it was named; None for the base.
        loss: mean over the supervised tokens, in nats.
        perplexity: exp(loss).
        accuracy: share of the supervised tokens that are found likeliest.
        seconds: that it took.
        note: of an adapter that works at some of these tokens only; None for any other.
    """

    name: str
    path: str | None
    loss: float
    perplexity: float
    accuracy: float
    seconds: float
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """All of them, on the same tokens.

    Attributes:
        base: its name.
        data: the files, as errors name them.
        seq_len: tokens of the longest document that is kept.
        num_documents, num_supervised_tokens: judged on.
        num_dropped, num_bad: rows that were left out: too long or without a token to learn; broken.
        compute_dtype: of activations and products.
        judged: the base first.
    """

    base: str
    data: str
    seq_len: int
    num_documents: int
    num_supervised_tokens: int
    num_dropped: int
    num_bad: int
    compute_dtype: str
    judged: tuple[Judged, ...]

    def as_json(self) -> dict[str, Any]:
        """For programs; null for a number that is not finite, which JSON has not."""
        values = asdict(self)
        for line in values["judged"]:
            line |= {key: None for key, value in line.items() if isinstance(value, float) and not math.isfinite(value)}
        return values


def evaluate_adapters(
    judged_on: JudgedOn, named: NamedAdapters, targets: Mapping[str, Path]
) -> Generator[Reading | Preparing, None, Evaluation]:
    """Judge the base and every adapter on the same rows; these are looked at before weights are.

    Args:
        judged_on: of `eval_config`.
        named: the adapters and their base.
        targets: what was named, for the table.

    Raises:
        QloraTrainerError: see the rooms that are called.
    """
    torch.set_num_threads(num_cpu_threads())
    config = judged_on.config
    tokenizer = known_tokenizer(config, named.base, named.tokenizers[BASE])
    data, seq_len = yield from read_held_out(judged_on, named.base, tokenizer)
    yield Preparing(what=f"loading the base {named.base.name}")
    asked_dtype = config.quantization.compute_dtype
    with lack_of_memory_told("loading the base"):
        adapters = load_adapters(named, compute_dtype=None if asked_dtype == "auto" else asked_dtype)
    judged = []
    for number, name in enumerate((BASE, *adapters.names)):
        yield Preparing(what=f"judging {name}, {number + 1} of {len(adapters.names) + 1}")
        adapters.activate(None if name == BASE else name)
        invocation = adapters.model.of_tokens.invocation
        start = time.perf_counter()
        scores = yield from _score_or_halve(config, named.base, adapters, data.documents)
        judged.append(
            Judged(
                name=name,
                path=None if name == BASE else str(targets[name]),
                loss=scores.loss,
                perplexity=scores.perplexity,
                accuracy=scores.accuracy,
                seconds=time.perf_counter() - start,
                note=counted(data.documents, invocation).told("judged on") if invocation else None,
            )
        )
    return Evaluation(
        base=named.base.name,
        data=data.path,
        seq_len=seq_len,
        num_documents=len(data.documents),
        num_supervised_tokens=data.num_supervised_tokens,
        num_dropped=data.num_dropped,
        num_bad=data.num_bad,
        compute_dtype=str(adapters.model.compute_dtype).removeprefix("torch."),
        judged=tuple(judged),
    )


def require_finite(evaluation: Evaluation) -> None:
    """Raises:
    DivergedError: a loss is not finite; names all such.
    """
    broken = [line.path or line.name for line in evaluation.judged if not math.isfinite(line.loss)]
    if broken:
        raise DivergedError(
            where="eval",
            found=f"a loss that is not finite, of {', '.join(broken)}",
            expected="finite numbers",
            fix="Look at how it was trained; in float16, try --set quantization.compute_dtype=float32.",
        )


def read_held_out(
    judged_on: JudgedOn, base: Base, tokenizer: KnownTokenizer
) -> Generator[Reading, None, tuple[TokenizedData, int]]:
    """Tokenise what is judged on, while yielding how far it is.

    Args:
        judged_on: of `eval_config`.
        base: whose positions limit a document.
        tokenizer: of the base.

    Returns:
        The documents, and the tokens that the longest of them may have.

    Raises:
        DataError: no row is left, or the rows are not those of the run.
    """
    config = judged_on.config
    section, bos_token_id = config.data, tokenizer.tokenizer.bos_token_id
    if section.eval is not None:
        files = yield from tokenize_named(section, "eval", tokenizer)
        rows = all_rows(files.store.num_rows)
        whole = select(files.store, rows, bos_token_id=bos_token_id, num_bad=num_bad_rows(files.store.files))
        max_dropped_share = section.max_dropped_share
        _require_unchanged(judged_on.run, "evaluation data", files.content_hash)
    else:
        files = yield from tokenize_named(section, "train", tokenizer)
        _require_unchanged(judged_on.run, "training data", files.content_hash)
        _, rows = train_and_held_out(config, files.store, None)
        whole = select(files.store, rows, bos_token_id=bos_token_id)
        max_dropped_share = 1.0  # as in the run: of a dozen rows one is more than the share
    if section.seq_len != "auto":
        require_positions(section.seq_len, base.config, base.name)
        seq_len = section.seq_len
    elif len(whole.documents):  # no document is left out for what would save memory in training
        lengths = whole.documents.lengths
        most = max_positions(base.config) or lengths.longest
        seq_len = choose_seq_len(lengths, most, overlong=section.overlong, max_dropped_share=0.0)
    else:
        seq_len = 1
    data = fit_documents(whole, seq_len, overlong=section.overlong, max_dropped_share=max_dropped_share)
    if not len(data.documents):
        raise DataError(
            where=data.path or "eval",
            found=f"no document to judge on ({data.num_rows} rows, {data.num_dropped} dropped)",
            expected="held-out rows with a token that is learned",
            fix="Name another file with --data.",
        )
    return data, seq_len


def _require_unchanged(run: RunFolder | None, what: str, content_hash: str) -> None:
    """Refuse rows that are not those which the run held out, as far as it left a checkpoint that tells.

    Raises:
        DataError: gives the start of both hashes.
    """
    if run is None:
        return
    try:
        before = read_manifest(run.checkpoints_path / "last").fingerprints.get(what, content_hash)
    except (OSError, ValueError):
        return
    if before != content_hash:
        raise DataError(
            where=str(run.path),
            found=f"another {what} than when it began (sha256: {before[:12]} -> {content_hash[:12]})",
            expected="the same content: other rows may be among those that it was trained on",
            fix="Restore it, or name the rows to judge on with --data.",
        )


def _score_or_halve(
    config: RunConfig, base: Base, adapters: AdapterSet, documents: Sequence[Document]
) -> Generator[Preparing, None, Scores]:
    """The scores, in smaller micro-batches where memory runs out.

    Raises:
        DoesNotFitError: memory runs out with one document, too.
    """
    longest = max(document.num_tokens for document in documents)
    asked, chunk = config.memory.micro_batch_tokens, config.memory.loss_chunk_tokens
    tokens = max(longest, asked if isinstance(asked, int) else MICRO_BATCH_TOKENS)
    chunk_tokens = chunk if isinstance(chunk, int) else LOSS_CHUNK_TOKENS
    packing = packs(config, base)
    while True:
        with suppress(OutOfMemoryError), memory_errors_as_ours():
            return score(
                adapters.model, micro_batches(documents, tokens, packing=packing), loss_chunk_tokens=chunk_tokens
            )
        if tokens == longest:
            raise DoesNotFitError(
                where="eval",
                found=f"no memory left, with one document of {longest:,} tokens at once",
                expected="room for its activations in one layer",
                fix="End what else uses the memory, or leave long documents out with --set data.seq_len=…",
            )
        tokens = max(longest, tokens // 2)
        yield Preparing(what=f"memory ran out: again in micro-batches of {tokens:,} tokens")


def micro_batches(documents: Sequence[Document], tokens: int, *, packing: bool) -> Iterator[MicroBatch]:
    """All documents, in rows of at most `tokens` tokens, which the longest of them has room in."""
    for positions in cut_documents(documents, tokens, packing=packing):
        yield make_micro_batch([documents[position] for position in positions], seed=0, step=0, packing=packing)

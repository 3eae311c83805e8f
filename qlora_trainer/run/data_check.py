"""`data check`: what a run would make of its data, counted to the last row; nothing is loaded and nothing kept."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.array_file import ArrayFile
from qlora_trainer.data.check import Checked, Problem, check_named
from qlora_trainer.data.known_tokenizer import KnownTokenizer
from qlora_trainer.data.length_counts import LengthCounts
from qlora_trainer.data.named import num_bad_rows
from qlora_trainer.data.rows import FileRead, Reading
from qlora_trainer.data.samples import Sample, make_sample
from qlora_trainer.data.split import all_rows
from qlora_trainer.data.tokenized import TokenizedData, fit_documents, length_percentiles, require_most_rows, select
from qlora_trainer.errors import DataError
from qlora_trainer.run.inputs import decide_seq_len, find_base, known_tokenizer, spread, train_and_held_out

NUM_BINS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class SetReport:
    """The files of `data.train`, or of `data.eval`.

    Attributes:
        files: what was found in each.
        num_rows: good and bad ones.
        num_bad, bad: rows that are no conversation or text, or cannot be tokenised, and why.
        warnings: rows that train, but perhaps not what was meant.
        num_overlong: rows longer than the sequence length; what becomes of them `overlong` says.
        num_dropped_overlong, num_dropped_untrainable: good rows that are left out.
        num_documents, num_tokens, num_supervised_tokens: that are left.
        num_repeated: good rows with the very tokens of an earlier one.
        num_with_stop: documents of which a stop token is learned; one that is cut may lose it.
        num_double_bos: rows that begin with two BOS tokens; they are bad.
        num_empty_answers: rows with an answer without text; they are bad.
        num_empty_questions: rows with a question without text; they train.
        num_rewritten_turns: answers that are read but not learned, since the chat template rewrites them.
        num_lost_names: messages whose `name` the chat template does not render.
        percentiles: tokens of good rows: 50, 90, 99, and 100, the longest.
        histogram: (at most so many tokens, rows), ascending.
        is_beginning: these are the first rows of a stream, and there may be more.
        errors: what would stop a run.
    """

    files: tuple[FileRead, ...]
    num_rows: int
    num_bad: int
    bad: tuple[Problem, ...]
    warnings: tuple[Problem, ...]
    num_overlong: int
    num_dropped_overlong: int
    num_dropped_untrainable: int
    num_documents: int
    num_tokens: int
    num_supervised_tokens: int
    num_repeated: int
    num_with_stop: int
    num_double_bos: int
    num_empty_answers: int
    num_empty_questions: int
    num_rewritten_turns: int
    num_lost_names: int
    percentiles: tuple[int, ...]
    histogram: tuple[tuple[int, int], ...]
    is_beginning: bool
    errors: tuple[str, ...]

    @property
    def num_good(self) -> int:
        return self.num_rows - self.num_bad


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What there is to know of a config's data.

    Attributes:
        base: whose tokenizer counts.
        seq_len: tokens of the longest document that a run would keep.
        overlong: what becomes of longer ones.
        train, evaluation: the latter None where a part of train is held out.
        num_held_out: rows of train that are.
        samples: documents of train, in pieces.
    """

    base: str
    seq_len: int
    overlong: str
    train: SetReport
    evaluation: SetReport | None
    num_held_out: int
    samples: tuple[Sample, ...]

    @property
    def errors(self) -> tuple[str, ...]:
        return (*self.train.errors, *(self.evaluation.errors if self.evaluation else ()))

    def as_json(self) -> dict[str, Any]:
        """For programs; shares are left to them."""
        return {"ok": not self.errors, **asdict(self)}


def check_data(config: RunConfig, *, num_samples: int) -> Generator[Reading, None, DataReport]:
    """Read and tokenise everything that `config` names.

    Raises:
        QloraTrainerError: the base or its tokenizer cannot be used, or there is no good row at all.
    """
    base, found_tokenizer = find_base(config)
    tokenizer = known_tokenizer(config, base, found_tokenizer)
    checked = yield from check_named(config.data, "train", tokenizer)
    held_out = None if config.data.eval is None else (yield from check_named(config.data, "eval", tokenizer))
    train_rows, eval_rows = train_and_held_out(config, checked.store, held_out.store if held_out else None)
    bos_token_id = tokenizer.tokenizer.bos_token_id
    trained_on = select(checked.store, train_rows, bos_token_id=bos_token_id)
    seq_len = decide_seq_len(config, base, trained_on) if len(trained_on.documents) else 0
    batch = config.training.global_batch_size
    train = _report(config, checked, tokenizer, seq_len=seq_len, judged_rows=train_rows, least_documents=batch)
    evaluation = None
    if held_out is not None:
        evaluation = _report(config, held_out, tokenizer, seq_len=seq_len, judged_rows=eval_rows)
    return DataReport(
        base=base.name,
        seq_len=seq_len,
        overlong=config.data.overlong,
        train=train,
        evaluation=evaluation,
        num_held_out=0 if held_out else len(eval_rows),
        samples=_samples(trained_on, tokenizer, num_samples),
    )


def require_good(report: DataReport) -> None:
    """Raises:
    DataError: a run would stop at this data; names all that would stop it.
    """
    if report.errors:
        raise DataError(
            where="data check",
            found="; ".join(report.errors),
            expected="data that a run can be trained on",
            fix="Correct the rows named above, or see data.on_bad_row, data.max_dropped_share and data.overlong.",
        )


def _report(
    config: RunConfig,
    checked: Checked,
    tokenizer: KnownTokenizer,
    *,
    seq_len: int,
    judged_rows: ArrayFile,
    least_documents: int = 0,
) -> SetReport:
    """One key's files; of `judged_rows` (all but those held out for another part) not too many may be left out."""
    store = checked.store
    bos_token_id = tokenizer.tokenizer.bos_token_id
    num_skipped = num_bad_rows(store.files) if config.data.on_bad_row == "skip" else 0  # else any stops the run
    whole, judged = (
        select(store, rows, bos_token_id=bos_token_id, num_bad=num_skipped)
        for rows in (all_rows(store.num_rows), judged_rows)
    )
    lengths = whole.documents.lengths
    fitted, judged = (
        fit_documents(data, seq_len, overlong=_lenient(config), max_dropped_share=1.0) if seq_len else data
        for data in (whole, judged)
    )
    errors = _errors(config, checked, fitted, judged, seq_len)
    if len(judged.documents) < least_documents:
        errors.append(f"{len(judged.documents)} documents for a global batch of {least_documents}")
    counts = {problem.kind: problem.num_rows for problem in (*checked.bad, *checked.refused, *checked.warnings)}
    return SetReport(
        files=store.files,
        num_rows=store.num_rows + checked.num_bad,
        num_bad=checked.num_bad,
        bad=(*checked.bad, *checked.refused),
        warnings=checked.warnings,
        num_overlong=lengths.num_longer_than(seq_len) if seq_len else 0,
        num_dropped_overlong=fitted.num_dropped_overlong,
        num_dropped_untrainable=fitted.num_dropped_untrainable,
        num_documents=len(fitted.documents),
        num_tokens=fitted.num_tokens,
        num_supervised_tokens=fitted.num_supervised_tokens,
        num_repeated=store.num_repeated,
        num_with_stop=_num_with_stop(fitted, checked.stop_ids),
        num_double_bos=counts.get("double BOS", 0),
        num_empty_answers=counts.get("empty answer", 0),
        num_empty_questions=counts.get("question without text", 0),
        num_rewritten_turns=fitted.num_rewritten_turns,
        num_lost_names=fitted.num_lost_names,
        percentiles=length_percentiles(lengths),
        histogram=_histogram(lengths),
        is_beginning=checked.is_beginning,
        errors=tuple(errors),
    )


def _num_with_stop(data: TokenizedData, stop_ids: frozenset[int]) -> int:
    return sum(not stop_ids.isdisjoint(document.labels_T.tolist()) for document in data.documents)


def _lenient(config: RunConfig) -> Literal["drop", "truncate", "split"]:
    """What to count with: an overlong row that is an error is told as one, and left out."""
    return "drop" if config.data.overlong == "error" else config.data.overlong


def _errors(
    config: RunConfig, checked: Checked, fitted: TokenizedData, judged: TokenizedData, seq_len: int
) -> list[str]:
    stopping = (*checked.bad, *checked.refused) if config.data.on_bad_row == "stop" else checked.refused
    errors = [f"{problem.num_rows} x {problem.kind} ({problem.examples[0]})" for problem in stopping]
    if config.data.overlong == "error" and fitted.num_dropped_overlong:
        errors.append(f"{fitted.num_dropped_overlong} rows longer than data.seq_len = {seq_len}, with overlong: error")
    try:
        require_most_rows(judged, config.data.max_dropped_share, seq_len)
    except DataError as error:
        errors.append(f"{error.short}; expected {error.expected}")
    return errors


def _histogram(lengths: LengthCounts) -> tuple[tuple[int, int], ...]:
    """In at most `NUM_BINS` bins of one width, a number with few binary digits."""
    longest = max(lengths.longest, 1)
    unit = 2 ** max(longest.bit_length() - 5, 0)
    width = -(-longest // (NUM_BINS * unit)) * unit
    num_bins = -(-longest // width)
    counts = np.zeros(num_bins, dtype=np.int64)
    np.add.at(counts, (lengths.lengths_L - 1) // width, lengths.counts_L)
    return tuple((width * (number + 1), int(count)) for number, count in enumerate(counts))


def _samples(data: TokenizedData, tokenizer: KnownTokenizer, count: int) -> tuple[Sample, ...]:
    documents = data.documents
    positions = spread(range(len(documents)), count)
    return tuple(
        make_sample(document, tokenizer.tokenizer, where=documents.store.where(document.index))
        for document in (documents[position] for position in positions)
    )

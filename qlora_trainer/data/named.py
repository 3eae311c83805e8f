"""The rows that a config names: its files, read the way its `data` section asks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Literal

from qlora_trainer.config.data_files import DataSource, data_files
from qlora_trainer.config.schema import DataSection
from qlora_trainer.data.rows import START, BadRow, FileRead, Place, Reading, Row, iter_files


def sources_named(section: DataSection, key: Literal["train", "eval"]) -> tuple[DataSource, ...]:
    """The files and data sets under `key`, in order; none where none are named.

    Raises:
        DataError: see `config.data_files`.
    """
    names = section.train if key == "train" else section.eval
    return data_files(names or (), key=f"data.{key}", revision=section.revision)


def iter_named(
    section: DataSection, key: Literal["train", "eval"], *, files_only: bool = False
) -> Iterator[Row | BadRow | Reading | FileRead]:
    """Yields what `data.rows.iter_files` does for the sources under `key`; nothing where none are named.

    Args:
        section: names the sources and says how they are read.
        key: which of the two.
        files_only: leave out what `datasets` reads, whose import takes seconds, or downloads.

    Raises:
        DataError: see `config.data_files` and `data.rows.iter_files`.
    """
    sources = sources_named(section, key)
    if files_only:
        sources = tuple(source for source in sources if isinstance(source, Path))
    yield from iter_sources(sources, section)


def iter_sources(
    sources: Sequence[DataSource], section: DataSection, start: Place = START, *, most_rows: int | None = None
) -> Iterator[Row | BadRow | Reading | FileRead]:
    """Yields what `data.rows.iter_files` does from `start` on, up to `most_rows`, read the way that `section` asks.

    Raises:
        DataError: see `data.rows.iter_files`.
    """
    stop = section.on_bad_row == "stop"
    columns = section.columns or ()
    row_format = section.format
    yield from iter_files(sources, row_format=row_format, columns=columns, stop=stop, start=start, most_rows=most_rows)


def rows_of(sources: Sequence[DataSource], section: DataSection, numbers: Collection[int]) -> list[Row]:
    """The rows of these numbers, in order; the sources are read up to the last of them.

    Raises:
        DataError: see `iter_sources`.
    """
    wanted = set(numbers)
    rows: list[Row] = []
    for item in iter_sources(sources, section) if wanted else ():
        if isinstance(item, Row) and item.index in wanted:
            rows.append(item)
            if len(rows) == len(wanted):
                break
    return rows


def forms_told(files: Sequence[FileRead]) -> list[str]:
    """Which form was found where, a line a form."""
    lines = []
    for name in dict.fromkeys(file.format_name for file in files):
        of_form = [file for file in files if file.format_name == name]
        where = of_form[0].path if len(of_form) == 1 else f"{of_form[0].path} and {len(of_form) - 1} more"
        lines.append(f"{sum(file.num_rows for file in of_form):,} rows of the form {name} in {where}")
    return lines


def num_bad_rows(files: Sequence[FileRead]) -> int:
    """Rows of all these files that were passed over."""
    return sum(file.num_bad for file in files)

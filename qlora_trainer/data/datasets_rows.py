"""The rows of what `datasets` wrote or downloads: memory-mapped Arrow files, read through the library.

The library is imported when the first such source is read: that takes two seconds.

No code of a data set runs and no pickle is read. What `load_from_disk` reads (5.2.0) is two JSON files and the Arrow
files they name: features become the library's own dataclasses by name, a format names one of its own formatters, and
Arrow's extension types are made from JSON. `load_dataset` has no `trust_remote_code` since version 4 and refuses a data
set with a script; its reader of pickled frames is turned off. Only the format `arrow` is asked for here, which decodes
no image, sound or document.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from qlora_trainer.config.data_files import HubDataset
from qlora_trainer.config.dataset_folder import DatasetFolder
from qlora_trainer.data.arrow_rows import iter_rows
from qlora_trainer.data.hub_dataset import iter_hub_stream, load_hub_dataset
from qlora_trainer.data.records import ARROW_BATCH_ROWS, Record
from qlora_trainer.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset


def iter_dataset(source: DatasetFolder | HubDataset, *, after: int = 0) -> Iterator[Record]:
    """Reads the rows in the order that the library gives them, a batch at a time.

    Args:
        source: a folder, or a data set of the hub, which is downloaded whole first unless it is streamed.
        after: so many rows are passed over; of a streamed data set they are read from the network again.

    Raises:
        DataError: the folder cannot be read, or the hub gives nothing of that name.
    """
    if isinstance(source, HubDataset) and source.is_streamed:
        yield from _rows(iter_hub_stream(source, after=after), str(source), after)
        return
    dataset = _load_folder(source) if isinstance(source, DatasetFolder) else load_hub_dataset(source)[0]
    if after >= len(dataset):  # of which the library can skip no more
        return
    tables = dataset.with_format("arrow").skip(after).iter(batch_size=ARROW_BATCH_ROWS)
    for record in _rows(tables, str(source), after):
        yield replace(record, share=record.number / len(dataset))


def _rows(tables: Iterator[pa.Table], name: str, after: int) -> Iterator[Record]:
    number = after
    try:
        for table in tables:
            for fields in iter_rows(table, name=name, first=number + 1):
                number += 1
                yield Record(number, fields)
    except _library_errors() as error:
        raise _broken(f"{name}:row {number + 1}", error) from error


def _load_folder(source: DatasetFolder) -> Dataset:
    from datasets import Dataset

    try:
        # An absolute path: the library takes text with a scheme for an address. Mapped, whatever the environment says.
        return Dataset.load_from_disk(str(source.path.resolve()), keep_in_memory=False)
    except _library_errors() as error:
        raise _broken(str(source), error) from error


def _library_errors() -> tuple[type[Exception], ...]:
    """What the library and Arrow raise for files that contradict themselves or each other."""
    from pyarrow import ArrowException

    return OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError, ArrowException


def _broken(where: str, error: Exception) -> DataError:
    first_line = (str(error) or repr(error)).splitlines()[0]
    return DataError(
        where=where,
        found=f"a data set that cannot be read ({first_line})",
        expected="whole Arrow files that agree with state.json and dataset_info.json",
        fix="Write or download it again.",
    )

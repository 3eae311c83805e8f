"""The rows of an Arrow table as Python values, as they were before Arrow laid them out in columns.

Every row of a struct has all keys that any of them has, so a null in one stands for a key that is not there: without
that, a tool call would be learned with the arguments of all other calls. Values of the type `json` are kept as text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from qlora_trainer.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

Restore = Callable[[Any], Any]


def iter_rows(table: pa.Table | pa.RecordBatch, *, name: str, first: int) -> Iterator[dict[str, object] | DataError]:
    """Yields each row by column, or what is wrong with it.

    Images and sounds are not decoded: they stay the bytes and paths that they are in Arrow.

    Args:
        table: some rows.
        name: of the file or data set, for errors.
        first: number of the first row.

    Raises:
        pyarrow.ArrowException: the table contradicts itself (nothing checks that when a file is mapped).
    """
    table.validate(full=True)
    restores = {field.name: restore for field in table.schema if (restore := _restore_of(field.type)) is not None}
    for number, row in enumerate(table.to_pylist(), start=first):
        try:
            yield row | {column: restore(row[column]) for column, restore in restores.items()}
        except (ValueError, RecursionError) as error:
            yield DataError(
                where=f"{name}:row {number}",
                found=f"a value of the type json that is none ({error})",
                expected="JSON text",
                fix="Correct the row, or remove it.",
            )


def _restore_of(kind: pa.DataType) -> Restore | None:
    """What must be done to values of this type; None where nothing must."""
    import pyarrow as pa

    if isinstance(kind, pa.JsonType):
        return _no_null(json.loads)
    if pa.types.is_struct(kind):
        fields = [kind.field(index) for index in range(kind.num_fields)]
        return _no_null(_restore_struct({field.name: _restore_of(field.type) or _as_it_is for field in fields}))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        restore = _restore_of(kind.value_type)
        return None if restore is None else _no_null(lambda values: [restore(value) for value in values])
    return None


def _restore_struct(restores: dict[str, Restore]) -> Restore:
    return lambda struct: {name: restores[name](value) for name, value in struct.items() if value is not None}


def _no_null(restore: Restore) -> Restore:
    return lambda value: None if value is None else restore(value)


def _as_it_is(value: object) -> object:
    return value

"""Functions that the assistant may ask for, and its calls of them, as OpenAI's files write both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from qlora_trainer.data.fields import from_json, optional_text, read_text, refuse_unknown, shown
from qlora_trainer.errors import DataError

CALL_KEYS = ("id", "type", "index", "function")  # the index is of calls that are put together out of streamed pieces
FUNCTION_KEYS = ("name", "arguments")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the assistant asks for.

    Attributes:
        name: of the function.
        arguments: a JSON object, as text.
        call_id: by which the tool's message names it; may be empty.
    """

    name: str
    arguments: str
    call_id: str = ""


def read_tools(value: object, where: str, name: str) -> str:
    """The functions that the assistant may ask for, as JSON text; empty where there are none.

    Args:
        value: a list of schemas, or such a list as JSON text.
        where: the row, for errors.
        name: the key that held it; the schemas under `functions`, OpenAI's older name, lack their wrapper.

    Raises:
        DataError: not such a list.
    """
    if value is None or value in ("", []):
        return ""
    tools = from_json(value) if isinstance(value, str) else value
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(
            where=where,
            found=f"{name} = {shown(value)}",
            expected="a list of function schemas",
            fix=f'Write "{name}" as in OpenAI\'s fine-tuning files.',
        )
    if name == "functions":
        tools = [{"type": "function", "function": tool} for tool in tools]
    return read_text(_as_json(tools, where, name), where, name)


def read_tool_calls(value: Mapping[str, object], where: str, name: str) -> tuple[ToolCall, ...]:
    """The calls of a message, under OpenAI's newer name for them or its older one.

    Raises:
        DataError: they are none, or hold what is not read.
    """
    function, calls = value.get("function_call"), value.get("tool_calls")
    if function is not None and calls:
        raise DataError(
            where=where,
            found=f"function_call and tool_calls in {name}",
            expected="one of them: the first is OpenAI's older name",
            fix="Put all calls under tool_calls.",
        )
    if function is not None:
        return (_tool_call({"function": function}, where, f"{name}.function_call"),)
    if calls is None:
        return ()
    if not isinstance(calls, list):
        raise _no_tool_call(calls, where, f"{name}.tool_calls")
    return tuple(_tool_call(call, where, f"{name}.tool_calls[{index}]") for index, call in enumerate(calls))


def _tool_call(value: object, where: str, name: str) -> ToolCall:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(function, dict) or value.get("type") not in (None, "", "function"):
        raise _no_tool_call(value, where, name)
    refuse_unknown(value, CALL_KEYS, where, name)
    refuse_unknown(function, FUNCTION_KEYS, where, f"the function of {name}")
    arguments, function_name = function.get("arguments"), function.get("name")
    parsed = from_json(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(function_name, str) or not function_name.strip() or not isinstance(parsed, dict):
        raise _no_tool_call(function, where, name)
    text = arguments if isinstance(arguments, str) else _as_json(arguments, where, name)
    return ToolCall(
        name=read_text(function_name, where, f"{name}.name"),
        arguments=read_text(text, where, f"{name}.arguments"),
        call_id=optional_text(value, "id", where, name),
    )


def _as_json(value: object, where: str, name: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:  # of Parquet: a date, bytes, an infinity
        raise DataError(
            where=where,
            found=f"{name} that JSON cannot hold ({error})",
            expected="objects, lists, texts, finite numbers, booleans and null",
            fix="Write it as text.",
        ) from error


def _no_tool_call(value: object, where: str, name: str) -> DataError:
    return DataError(
        where=where,
        found=f"{name} = {shown(value)}",
        expected='{"id": ..., "function": {"name": ..., "arguments": "a JSON object as text"}}',
        fix="Write the call as in OpenAI's fine-tuning files.",
    )

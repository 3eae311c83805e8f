"""Every call of ours into torch.cuda, torch's operators and private parts, bitsandbytes and libc, held against those.

    python -m tests.hardware.library_calls

exits with 1 and names the calls that the installed torch and bitsandbytes do not take. The calls are found by parsing
our source, so a new one is found as well; nothing is run, so no GPU is needed for what only a GPU would run. `.ci/run`
does it with the lowest supported versions too, and needs nothing but those two packages for it.
"""

from __future__ import annotations

import ast
import ctypes
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).parents[2] / "qlora_trainer"
LIBRARY = "qlora_trainer.hardware.quant_library"  # where bitsandbytes is imported, and handed on
WATCHED = ("torch.cuda.", "torch.ops.", "bitsandbytes.", "libc.")
# What the result of a call is an instance of, where we call its methods.
RETURNS = {
    "ctypes.CDLL": "libc",
    "torch.cuda.current_stream": "torch.cuda.Stream",
    f"{LIBRARY}.make_adamw": "bitsandbytes.optim.AdamW",
    "self._make_adamw": "bitsandbytes.optim.AdamW",
}
_SCHEMA_TYPES: dict[type, tuple[str, ...]] = {
    bool: ("bool", "Scalar"),
    int: ("int", "float", "Scalar", "SymInt", "number"),
    float: ("float", "Scalar", "number"),
    str: ("str",),
}


@dataclass(frozen=True, slots=True)
class LibraryCall:
    """A call as it is written.

    Attributes:
        where: file and line.
        name: of what is called, such as "torch.cuda.mem_get_info" or "bitsandbytes.optim.AdamW.step".
        num_positional: arguments by position.
        keywords: names of the others.
        literals: arguments that are plain values, by position or name.
        is_whole: no argument is unpacked (`*args`), so that a missing one would be seen.
    """

    where: str
    name: str
    num_positional: int
    keywords: tuple[str, ...]
    literals: tuple[tuple[int | str, Any], ...]
    is_whole: bool


def calls_of_source(folder: Path = SOURCE) -> list[LibraryCall]:
    """All of them, in the order of the files' names."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        found += calls_of(ast.parse(path.read_text()), str(path.relative_to(folder.parent)))
    return found


def calls_of(tree: ast.Module, path: str) -> list[LibraryCall]:
    """Those of one file."""
    names = _Names(tree)
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = names.of(node.func)
        if name is not None and _is_watched(name):
            found.append(_call(node, name, f"{path}:{node.lineno}"))
    return found


def _is_watched(name: str) -> bool:
    """Of torch what is private is watched too: nobody has promised it."""
    is_private = name.startswith("torch.") and any(part.startswith("_") for part in name.split("."))
    return is_private or name.startswith(WATCHED)


def _call(node: ast.Call, name: str, where: str) -> LibraryCall:
    positional = [argument for argument in node.args if not isinstance(argument, ast.Starred)]
    keywords = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg is not None}
    values: list[tuple[int | str, ast.expr]] = [*enumerate(positional), *keywords.items()]
    literals = tuple((key, value.value) for key, value in values if isinstance(value, ast.Constant))
    is_whole = len(positional) == len(node.args) and len(keywords) == len(node.keywords)
    return LibraryCall(where, name, len(positional), tuple(keywords), literals, is_whole)


class _Names:
    """What the names of a file stand for."""

    def __init__(self, tree: ast.Module) -> None:
        self._known: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    local = alias.asname or alias.name.partition(".")[0]
                    self._known[local] = alias.name if alias.asname else local
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                for alias in node.names:
                    self._known[alias.asname or alias.name] = _source_of(node.module, alias.name)
        for node in ast.walk(tree):  # `functional = bitsandbytes.functional`, `stream = torch.cuda.Stream(...)`
            match node:
                case (
                    ast.Assign(targets=[target], value=value) | ast.AnnAssign(target=target, value=ast.expr() as value)
                ):
                    self._note(target, value)

    def of(self, expression: ast.expr) -> str | None:
        """The whole name of what an expression is, where that can be told."""
        text = ast.unparse(expression)
        if text in self._known:
            return self._known[text]
        match expression:
            case ast.Name(id=name):
                return self._known.get(name)
            case ast.Attribute(value=value, attr=attribute):
                owner = self.of(value)
                return None if owner is None else f"{owner}.{attribute}"
            case ast.Call():
                return self._result_of(expression)
        return None

    def _note(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(value, ast.Call):
            found = self._result_of(value)
        else:
            found = self.of(value) if isinstance(value, ast.Attribute) else None
        if found is not None and _is_watched(f"{found}."):
            self._known[ast.unparse(target)] = found

    def _result_of(self, call: ast.Call) -> str | None:
        """The class whose instance a call gives: the called class itself, or what is said in `RETURNS`."""
        name = self.of(call.func) or ast.unparse(call.func)
        if name == "ctypes.CDLL" and ast.unparse(call.args[0]) != "None":
            return None  # a library that may not be here, such as the driver's
        if name in RETURNS:
            return RETURNS[name]
        last = name.rpartition(".")[2]
        return name if _is_watched(name) and last[:1].isupper() else None


def _source_of(module: str, name: str) -> str:
    if module == LIBRARY and name in ("bitsandbytes", "functional"):
        return {"bitsandbytes": "bitsandbytes", "functional": "bitsandbytes.functional"}[name]
    return f"{module}.{name}"


def refusals(calls: list[LibraryCall], modules: Mapping[str, Any]) -> Iterator[str]:
    """A line for each call that the installed libraries do not take.

    Args:
        calls: as they were found.
        modules: "torch", "bitsandbytes" and "libc".
    """
    for call in calls:
        try:
            _require_taken(call, _resolved(call.name, modules))
        except (AttributeError, TypeError, ImportError) as error:
            yield f"{call.where}: {call.name}: {error}"


def _resolved(name: str, modules: Mapping[str, Any]) -> Any:
    first, *rest = name.split(".")
    found = modules[first]
    for position, part in enumerate(rest):
        if not hasattr(found, part) and inspect.ismodule(found):
            __import__(".".join([first, *rest[: position + 1]]))
        found = getattr(found, part)
    return found


def _require_taken(call: LibraryCall, function: Any) -> None:
    """Bind the arguments.

    Raises:
        TypeError: it does not take them.
    """
    if isinstance(function, torch._ops.OpOverload):
        require_schema_takes(call, function._schema)
        return
    if isinstance(function, torch._ops.OpOverloadPacket):
        problems = []
        for overload in function.overloads():
            try:
                require_schema_takes(call, getattr(function, overload)._schema)
            except TypeError as error:
                problems.append(str(error))
            else:
                return
        raise TypeError("; ".join(problems))
    try:
        signature = inspect.signature(function)
    except ValueError:  # made in C or C++, which tell no signature: that it is there is all that can be seen
        return
    is_method = inspect.isfunction(function) and "." in function.__qualname__.replace("<locals>.", "")
    given = [None] * (call.num_positional + is_method)
    bind = signature.bind if call.is_whole else signature.bind_partial
    bind(*given, **dict.fromkeys(call.keywords))


def require_schema_takes(call: LibraryCall, schema: Any) -> None:
    """The same of the schema of an operator."""
    names = [argument.name for argument in schema.arguments]
    by_position = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    if call.num_positional > len(by_position):
        raise TypeError(f"{call.num_positional} arguments by position, {schema} takes {len(by_position)}")
    given = {*by_position[: call.num_positional], *call.keywords}
    if not given <= set(names):
        raise TypeError(f"{schema} has no {', '.join(sorted(given - set(names)))}")
    needed = {argument.name for argument in schema.arguments if not argument.has_default_value()}
    if call.is_whole and not needed <= given:
        raise TypeError(f"{schema} needs {', '.join(sorted(needed - given))}")
    types = {argument.name: str(argument.type) for argument in schema.arguments}
    for key, value in call.literals:
        name = by_position[key] if isinstance(key, int) else key
        wanted = types[name].removeprefix("Optional[").removesuffix("]")
        if type(value) in _SCHEMA_TYPES and wanted not in _SCHEMA_TYPES[type(value)]:
            raise TypeError(f"{name} is {value!r}, {schema} wants {wanted}")


def main() -> None:
    """See the module."""
    import bitsandbytes

    calls = calls_of_source()
    found = list(refusals(calls, {"torch": torch, "bitsandbytes": bitsandbytes, "libc": ctypes.CDLL(None)}))
    print(f"{len(calls)} calls, torch {torch.__version__}, bitsandbytes {bitsandbytes.__version__}")
    print("\n".join(found))
    sys.exit(1 if found or not calls else 0)


if __name__ == "__main__":
    main()

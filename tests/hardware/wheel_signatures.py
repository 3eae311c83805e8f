"""Our calls into torch against a torch that is not installed: its Python files and operators, as its wheel has them.

    python -m tests.hardware.wheel_signatures FOLDER      (a wheel of torch, unpacked)

Nothing of it is imported, so a wheel for another system will do: macOS's has no CUDA libraries and is a tenth as large.
Exits with 1 and names the calls that this torch does not take. What is made in C++ has its signature in torch's type
stubs; operators that only C++ registers have none, and must be called by torch's own Python files as we call them.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import torch

from tests.hardware.library_calls import LibraryCall, calls_of_source, require_schema_takes

_OPERATORS = "torchgen/packaged/ATen/native/native_functions.yaml"
_STUBS = "torch/_C/__init__.pyi"
_Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


class Wheel:
    """The files of one.

    Args:
        folder: where it is unpacked.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parsed = lru_cache(maxsize=None)(lambda path: ast.parse(path.read_text()))

    @property
    def version(self) -> str:
        text = (self._folder / "torch/version.py").read_text()
        found: str = re.findall(r"__version__ = '([^']+)'", text)[0]
        return found

    def require_taken(self, call: LibraryCall) -> None:
        """Bind the arguments of a call of something in torch.

        Raises:
            AttributeError: there is no such thing.
            TypeError: it does not take them.
        """
        *owner, name = call.name.split(".")
        is_aten = call.name.startswith("torch.ops.aten.") or owner == ["torch"]
        if is_aten and name in self._schemas:
            require_one_takes(call, self._schemas[name])
        elif call.name.startswith("torch.ops."):
            if call.num_positional or call.keywords or f"{call.name}()" not in self._python_files:
                raise AttributeError("not called so in any of torch's own files")
        elif call.name.startswith("torch._C."):
            self._require_stub_binds(call, call.name.split(".")[2:])
        else:
            self._require_binds(call, self._found(call.name.split(".")))

    @cached_property
    def _schemas(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for text in re.findall(r"^- func: (.+)$", (self._folder / _OPERATORS).read_text(), re.MULTILINE):
            found.setdefault(re.split(r"[.(]", text)[0], []).append(text)
        return found

    @cached_property
    def _stubs(self) -> ast.Module:
        return ast.parse((self._folder / _STUBS).read_text())

    @cached_property
    def _python_files(self) -> str:
        return "\n".join(path.read_text() for path in sorted((self._folder / "torch").rglob("*.py")))

    def _require_stub_binds(self, call: LibraryCall, parts: Sequence[str]) -> None:
        """One of the overloads of a function, or of a class's constructor, must."""
        tree: ast.Module | ast.ClassDef = self._stubs
        for part in parts[:-1]:
            tree = next(own for own in _definitions(tree) if isinstance(own, ast.ClassDef) and own.name == part)
        found = [own for own in _definitions(tree) if _name_of(own) == parts[-1]]
        problems = []
        for own in found:
            try:
                self._require_binds(call, own)
            except TypeError as error:
                problems.append(str(error))
            else:
                return
        raise TypeError("; ".join(problems)) if found else AttributeError(f"no {'.'.join(parts)} in {_STUBS}")

    def _found(self, parts: Sequence[str]) -> _Definition:
        for cut in range(len(parts) - 1, 0, -1):
            module = self._module(parts[:cut])
            if module is not None:
                found = self._look(module, parts[cut])
                if found is not None and len(parts) > cut + 1:
                    assert isinstance(found, ast.ClassDef)
                    found = next((own for own in _definitions(found) if _name_of(own) == parts[cut + 1]), None)
                if found is not None:
                    return found
                break
        raise AttributeError("not there")

    def _module(self, parts: Sequence[str]) -> Path | None:
        path = self._folder.joinpath(*parts)
        files = (path.with_name(f"{path.name}.py"), path / "__init__.py")
        return next((file for file in files if file.exists()), None)

    def _look(self, module: Path, name: str) -> _Definition | None:
        """Where a module defines a name, or whatever module it has it from does."""
        tree = self._parsed(module)
        for own in _definitions(tree):
            if _name_of(own) == name:
                return own
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) in (name, "*"):
                        source = self._module(self._source(module, node))
                        found = None if source in (None, module) else self._look(source, name)
                        if found is not None:
                            return found
        return None

    def _source(self, module: Path, node: ast.ImportFrom) -> list[str]:
        named = node.module.split(".") if node.module else []
        if not node.level:
            return named
        package = module.parent.relative_to(self._folder).parts
        return [*package[: len(package) - node.level + 1], *named]

    def _require_binds(self, call: LibraryCall, found: _Definition) -> None:
        if isinstance(found, ast.ClassDef):
            makers = [own for own in _definitions(found) if _name_of(own) in ("__init__", "__new__")]
            if not makers:
                return  # a base's, or a dataclass's
            found = makers[0]
            is_method = True
        else:
            is_method = call.name.split(".")[-2][:1].isupper()
        if not isinstance(found, ast.FunctionDef):
            return  # a name for something else
        signature = _signature(found)
        bind = signature.bind if call.is_whole else signature.bind_partial
        bind(*[None] * (call.num_positional + is_method), **dict.fromkeys(call.keywords))


def require_one_takes(call: LibraryCall, schemas: Sequence[str]) -> None:
    """One of the overloads of an operator must.

    Raises:
        TypeError: none does.
    """
    problems = []
    for text in schemas:
        try:
            require_schema_takes(call, torch._C.parse_schema(f"aten::{text}"))
        except TypeError as error:
            problems.append(str(error))
        else:
            return
    raise TypeError("; ".join(problems))


def _definitions(tree: ast.Module | ast.ClassDef) -> Iterator[_Definition]:
    """Those of a module or class itself, under conditions as well."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop(0)
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign):
            yield node
        elif isinstance(node, ast.If | ast.Try):
            pending = [*node.body, *node.orelse, *pending]


def _name_of(node: _Definition) -> str:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
    return ast.unparse(target)


def _signature(function: ast.FunctionDef) -> inspect.Signature:
    given = function.args
    kinds = inspect.Parameter
    positional = [*given.posonlyargs, *given.args]
    first_default = len(positional) - len(given.defaults)
    parameters = [
        kinds(
            argument.arg,
            kinds.POSITIONAL_ONLY if index < len(given.posonlyargs) else kinds.POSITIONAL_OR_KEYWORD,
            default=None if index >= first_default else kinds.empty,
        )
        for index, argument in enumerate(positional)
    ]
    if given.vararg is not None:
        parameters.append(kinds(given.vararg.arg, kinds.VAR_POSITIONAL))
    for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        parameters.append(kinds(argument.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else None))
    if given.kwarg is not None:
        parameters.append(kinds(given.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(parameters)


def wheel_refusals(calls: Sequence[LibraryCall], wheel: Wheel) -> Iterator[str]:
    """A line for each call into torch that it does not take."""
    for call in calls:
        if call.name.startswith("torch.") and not call.name.startswith("torch.ops.bitsandbytes."):
            try:
                wheel.require_taken(call)
            except (AttributeError, TypeError) as error:
                yield f"{call.where}: {call.name}: {error}"


def main() -> None:
    """See the module."""
    wheel, calls = Wheel(Path(sys.argv[1])), calls_of_source()
    found = list(wheel_refusals(calls, wheel))
    print(f"{len(calls)} calls, torch {wheel.version}")
    print("\n".join(found))
    sys.exit(1 if found or not calls else 0)


if __name__ == "__main__":
    main()

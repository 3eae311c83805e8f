"""The house keeps its shape: imports flow one way, heavy ones are lazy, pickle stays out, modules stay short."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeGuard

import pytest

PACKAGE = "qlora_trainer"
ROOT = Path(__file__).parents[1] / PACKAGE
# A room imports itself and earlier ones.
ROOMS = ("errors", "config", "hardware", "model", "step", "planning", "data", "run", "export", "report", "cli")
STRANGERS = {("data", "model"), ("model", "data")}  # both come before `run`, neither knows the other
LIGHT_ROOMS = {"errors", "config", "cli"}  # a mistake in the config is told before seconds are spent on imports
HEAVY = {"torch", "transformers", "bitsandbytes", "datasets", "accelerate", "peft", "trl", "triton"}
ONLY_IN = {"bitsandbytes": f"{PACKAGE}.hardware.quant_library"}
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# What unpickles, or runs what a file says; `numpy.load` is not needed either.
UNSAFE = {"torch.load", "torch.serialization.load", "torch.jit.load", "torch.hub.load", "numpy.load"}
UNSAFE |= {"eval", "exec", "builtins.eval", "builtins.exec"}
MAX_LINES = 500
MAX_MEDIAN_LINES = 200


@dataclass(frozen=True, slots=True)
class Import:
    """One imported name.

    Attributes:
        target: the dotted module; for `from a import b` it is `a.b`, which may be a name inside `a`.
        line: where it is written.
        at_module_level: whether importing the module runs it; false inside functions and under TYPE_CHECKING.
    """

    target: str
    line: int
    at_module_level: bool

    @property
    def distribution(self) -> str:
        return self.target.partition(".")[0]


def read_imports(path: Path) -> list[Import]:
    return list(_imports(ast.parse(path.read_text(encoding="utf-8")), at_module_level=True))


def _imports(parent: ast.AST, *, at_module_level: bool) -> Iterator[Import]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_module_level)
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level  # a relative import is a target of its own kind, refused below
            for alias in node.names:
                yield Import(f"{dots}{node.module or ''}.{alias.name}", node.lineno, at_module_level)
        elif _is_type_checking(node):
            for child in node.body:
                yield from _imports(ast.Module([child], []), at_module_level=False)
            for child in node.orelse:
                yield from _imports(ast.Module([child], []), at_module_level=at_module_level)
        else:
            function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _imports(node, at_module_level=at_module_level and not function)


def _is_type_checking(node: ast.AST) -> TypeGuard[ast.If]:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def read_package(root: Path) -> dict[str, list[Import]]:
    """The imports of every module under `root`, by dotted name; a folder's `__init__` has the folder's name."""
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = read_imports(path)
    return modules


def room_of(module: str) -> str | None:
    """The room of a module of ours; None for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def wrong_arrows(modules: Mapping[str, list[Import]]) -> list[str]:
    """Imports that point to a later room, to a stranger or to no room at all."""
    found = []
    for module, imports in modules.items():
        room = room_of(module)
        for entry in imports:
            if entry.target.startswith("."):
                found.append(f"{module}:{entry.line} relative import {entry.target}")
            if entry.distribution != PACKAGE:
                continue
            target = room_of(entry.target)
            if room is None or target == "__version__":
                allowed = target == "__version__"
            elif room not in ROOMS or target not in ROOMS:
                allowed = False
            else:
                allowed = ROOMS.index(target) <= ROOMS.index(room) and (room, target) not in STRANGERS
            if not allowed:
                found.append(f"{module}:{entry.line} {room} -> {target}")
    return found


def misplaced(modules: Mapping[str, list[Import]]) -> list[str]:
    """Pickle anywhere, and packages imported outside their one place."""
    return [
        f"{module}:{entry.line} {entry.distribution}"
        for module, imports in modules.items()
        for entry in imports
        if entry.distribution in PICKLES or ONLY_IN.get(entry.distribution, module) != module
    ]


def unsafe_uses(text: str, name: str) -> list[str]:
    """Where something of `UNSAFE` is imported or used, under whatever name, or the code of others is trusted."""
    tree = ast.parse(text)
    meant = _meant_by_names(tree)
    return [f"{name}:{node.lineno} {ast.unparse(node)}" for node in ast.walk(tree) if _is_unsafe(node, meant)]


def _meant_by_names(tree: ast.AST) -> dict[str, str]:
    """What a module's imports call otherwise: name -> dotted name."""
    meant: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            meant |= {alias.asname: alias.name for alias in node.names if alias.asname is not None}
        elif isinstance(node, ast.ImportFrom):
            meant |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return meant


def _is_unsafe(node: ast.AST, meant: Mapping[str, str]) -> TypeGuard[ast.expr | ast.ImportFrom]:
    match node:
        case ast.ImportFrom():
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        case ast.Name(ctx=ast.Load()) | ast.Attribute(ctx=ast.Load()):
            first, dot, others = ast.unparse(node).partition(".")
            names = [meant.get(first, first) + dot + others]
        case ast.Call():
            trusting = [word for word in node.keywords if word.arg in {"trust_remote_code", "allow_pickle"}]
            return any(ast.unparse(word.value) != "False" for word in trusting)
        case _:
            return False
    return any(name in UNSAFE or name.endswith(".read_pickle") for name in names)


def heavy_at_start(modules: Mapping[str, list[Import]]) -> list[str]:
    """Heavy imports that happen when a light room is imported, directly or through other modules of ours."""
    found = []
    for module in modules:
        if room_of(module) in LIGHT_ROOMS:
            for reached, way in _reached(module, modules).items():
                heavy = {entry.distribution for entry in modules[reached] if entry.at_module_level} & HEAVY
                found += [f"{' -> '.join(way)} -> {name}" for name in sorted(heavy)]
    return found


def _reached(start: str, modules: Mapping[str, list[Import]]) -> dict[str, tuple[str, ...]]:
    """Modules of ours that importing `start` imports, each with the way to it."""
    ways: dict[str, tuple[str, ...]] = {start: (start,)}
    queue = [start]
    while queue:
        module = queue.pop()
        targets = [entry.target for entry in modules[module] if entry.at_module_level]
        for target in [module, *targets]:
            parts = target.split(".")
            for end in range(1, len(parts) + 1):  # importing a.b.c runs a and a.b too
                name = ".".join(parts[:end])
                if name in modules and name not in ways:
                    ways[name] = (*ways[module], name)
                    queue.append(name)
    return ways


def num_lines(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): len(path.read_text().splitlines()) for path in sorted(root.rglob("*.py"))}


@pytest.fixture(scope="module")
def modules() -> dict[str, list[Import]]:
    return read_package(ROOT)


def test_imports_flow_one_way(modules: dict[str, list[Import]]) -> None:
    assert len(modules) > len(ROOMS) / 2  # the package was found
    assert wrong_arrows(modules) == []


def test_pickle_stays_out_and_bitsandbytes_in_its_place(modules: dict[str, list[Import]]) -> None:
    assert misplaced(modules) == []


def test_nothing_is_called_that_reads_pickle_or_runs_code_of_others() -> None:
    used = [found for path in sorted(ROOT.rglob("*.py")) for found in unsafe_uses(path.read_text(), path.name)]
    assert used == []


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(path, weights_only=True)",
        "import torch as t; t.load(path)",
        "import torch.serialization as s; s.load(path)",
        "from torch import load",
        "from torch import jit; jit.load(path)",
        "load = torch.load",
        "map(torch.load, paths)",
        "import numpy as np; np.load(path)",
        "numpy.load(path, allow_pickle=False)",
        "pd.read_pickle(path)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "read(path, allow_pickle=asked)",
        "eval(text)",
        "exec(text)",
        "import builtins; builtins.eval(text)",
    ],
)
def test_an_unsafe_use_is_found(text: str) -> None:
    assert unsafe_uses(text, "a.py") != []


def test_a_safe_use_is_passed() -> None:
    safe = "import torch as t\njson.load(file)\nmodel.eval()\nt.save(x)\nf(name, trust_remote_code=False)\neval = 1\n"
    assert unsafe_uses(safe, "a.py") == []


def test_triton_is_asked_for_on_demand_only(modules: dict[str, list[Import]]) -> None:
    """It is not installed with torch's CPU wheels."""
    kernels = f"{PACKAGE}.hardware.triton_rows"
    assert kernels in modules
    for module, imports in modules.items():
        early = {entry.target for entry in imports if entry.at_module_level}
        assert kernels not in early, module
        assert module == kernels or not {target for target in early if target.split(".")[0] == "triton"}, module


def test_light_rooms_import_nothing_heavy(modules: dict[str, list[Import]]) -> None:
    assert heavy_at_start(modules) == []


def test_modules_stay_short() -> None:
    lines = num_lines(ROOT)
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}
    assert median(count for name, count in lines.items() if not name.endswith("__init__.py")) <= MAX_MEDIAN_LINES


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A package with nothing wrong; each test plants one thing."""
    for name, text in {
        "__init__.py": "",
        "errors.py": "",
        "config/__init__.py": "",
        "config/load.py": "from qlora_trainer.errors import ConfigError\n",
        "hardware/quant_library.py": "import bitsandbytes\n",
        "model/nf4.py": "import torch\nfrom qlora_trainer.hardware import quant_library\n",
        "data/rows.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n",
        "cli/app.py": "from qlora_trainer.data.rows import x\ndef verb():\n    from qlora_trainer.model import nf4\n",
    }.items():
        path = tmp_path / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / PACKAGE


def test_the_checks_pass_what_is_right(planted: Path) -> None:
    modules = read_package(planted)
    assert wrong_arrows(modules) + misplaced(modules) + heavy_at_start(modules) == []


@pytest.mark.parametrize(
    "file,text,found",
    [
        ("model/nf4.py", "from qlora_trainer.step import loss", "qlora_trainer.model.nf4:1 model -> step"),
        ("config/load.py", "import qlora_trainer.cli.app", "qlora_trainer.config.load:1 config -> cli"),
        ("config/load.py", "def f():\n    from qlora_trainer import run", "qlora_trainer.config.load:2 config -> run"),
        ("data/rows.py", "from qlora_trainer.model.nf4 import x", "qlora_trainer.data.rows:1 data -> model"),
        ("model/nf4.py", "import qlora_trainer.data.rows", "qlora_trainer.model.nf4:1 model -> data"),
        ("model/nf4.py", "from . import lora", "qlora_trainer.model.nf4:1 relative import ..lora"),
        ("shared/x.py", "from qlora_trainer import errors", "qlora_trainer.shared.x:1 shared -> errors"),
        ("cli/app.py", "from qlora_trainer.shared import x", "qlora_trainer.cli.app:1 cli -> shared"),
        ("__init__.py", "from qlora_trainer.run import loop", "qlora_trainer:1 None -> run"),
    ],
)
def test_a_wrong_arrow_is_found(planted: Path, file: str, text: str, found: str) -> None:
    (planted / file).parent.mkdir(exist_ok=True)
    (planted / file).write_text(text)
    assert wrong_arrows(read_package(planted)) == [found]


@pytest.mark.parametrize("text", ["import pickle", "def f():\n    from pickle import load", "import bitsandbytes.nn"])
def test_a_misplaced_import_is_found(planted: Path, text: str) -> None:
    (planted / "model" / "nf4.py").write_text(text)
    assert len(misplaced(read_package(planted))) == 1


@pytest.mark.parametrize(
    "file,text",
    [
        ("config/load.py", "import torch.nn"),
        ("config/__init__.py", "from transformers import AutoConfig"),
        ("data/rows.py", "try:\n    import torch\nfinally:\n    pass"),
        ("data/__init__.py", "import datasets"),
        ("cli/app.py", "class X:\n    from qlora_trainer.model import nf4"),
    ],
)
def test_a_heavy_start_is_found(planted: Path, file: str, text: str) -> None:
    (planted / file).write_text(text)
    assert heavy_at_start(read_package(planted)) != []


def test_a_long_module_is_found(planted: Path) -> None:
    (planted / "errors.py").write_text("\n" * (MAX_LINES + 1))
    assert num_lines(planted)["errors.py"] == MAX_LINES + 1

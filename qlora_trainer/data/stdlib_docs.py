"""The quickstart's own data: questions about Python's standard library, answered by its docstrings.

"What does `shutil.copytree` do?" -> the first paragraph of its docstring. The docstrings are read from the sources with
`ast`, nothing is imported, so the rows depend on nothing but the Python version. No module is in both files, so the
eval loss cannot fall by remembering a module's phrases.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_trainer.errors import DataError, StorageError

# Modules that are Python sources in every version from 3.11 to 3.14, whatever the operating system.
MODULE_NAMES = """
    abc argparse ast asyncio.base_events asyncio.events asyncio.exceptions asyncio.futures asyncio.locks
    asyncio.protocols asyncio.queues asyncio.runners asyncio.streams asyncio.subprocess asyncio.taskgroups
    asyncio.tasks asyncio.threads asyncio.timeouts asyncio.transports base64 bdb bisect bz2 calendar cmd code codecs
    codeop collections collections.abc compileall concurrent.futures configparser contextlib copy copyreg csv
    dataclasses dbm dbm.dumb decimal difflib dis doctest email.charset email.encoders email.errors email.feedparser
    email.generator email.header email.headerregistry email.iterators email.message email.mime.application
    email.mime.audio email.mime.base email.mime.image email.mime.message email.mime.multipart email.mime.nonmultipart
    email.mime.text email.parser email.utils enum filecmp fileinput fnmatch fractions ftplib functools genericpath
    getopt getpass gettext glob graphlib gzip hashlib heapq hmac html html.parser http http.client http.cookiejar
    http.cookies http.server imaplib importlib importlib.abc importlib.machinery importlib.metadata
    importlib.resources.abc importlib.resources.readers importlib.util inspect io ipaddress json json.decoder
    json.encoder linecache locale logging logging.config logging.handlers lzma mailbox mimetypes modulefinder
    multiprocessing.connection multiprocessing.context multiprocessing.managers multiprocessing.pool
    multiprocessing.process multiprocessing.shared_memory multiprocessing.sharedctypes netrc ntpath numbers operator
    optparse os pathlib pdb pickle pickletools pkgutil platform plistlib poplib posixpath pprint profile pstats pty
    py_compile pyclbr queue quopri random re reprlib rlcompleter runpy sched secrets selectors shelve shlex shutil
    site smtplib socket socketserver ssl stat statistics string subprocess symtable sysconfig tabnanny tarfile
    tempfile textwrap threading timeit tokenize trace traceback tracemalloc tty types typing unittest.async_case
    unittest.case unittest.loader unittest.main unittest.mock unittest.result unittest.runner unittest.suite
    urllib.error urllib.parse urllib.request urllib.response urllib.robotparser uuid warnings weakref webbrowser
    wsgiref.handlers wsgiref.headers wsgiref.simple_server wsgiref.types wsgiref.util wsgiref.validate xml.dom
    xml.dom.minidom xml.dom.pulldom xml.etree.ElementTree xml.sax xml.sax.handler xml.sax.saxutils xml.sax.xmlreader
    xmlrpc.client xmlrpc.server zipapp zipfile zipimport
"""
MODULES = tuple(MODULE_NAMES.split())
# Public modules whose Python source has a private name.
SOURCES = {
    "collections.abc": "_collections_abc",
    "concurrent.futures": "concurrent.futures._base",
    "decimal": "_pydecimal",
    "io": "_pyio",
}
MIN_ANSWER_CHARS = 36  # shorter paragraphs say little ("Return self.")
MAX_ANSWER_CHARS = 160  # one or two sentences: longer paragraphs are mostly facts that no question gives away
EVAL_SHARE = 0.03
MAX_MODULE_SHARE = 0.15  # of the eval file: one large module would make it a file about that module
TRAIN_FILE = "train.jsonl"
EVAL_FILE = "eval.jsonl"

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True, slots=True)
class QuickstartData:
    """Where the quickstart's data lies, and how much it is."""

    train_path: Path
    eval_path: Path
    num_train_rows: int
    num_eval_rows: int


@dataclass(frozen=True, slots=True)
class Explained:
    """A public name of the standard library and the first paragraph of its docstring."""

    name: str
    answer: str

    @property
    def top_level(self) -> str:
        return self.name.split(".", 1)[0]

    @property
    def question(self) -> str:
        return f"What does `{self.name}` do?"


def write_quickstart_data(folder: Path | str, *, shuffle_answers: bool = False, seed: int = 0) -> QuickstartData:
    """Writes `train.jsonl` and `eval.jsonl`, one `messages` row a line; existing ones are replaced.

    Args:
        folder: made if it does not exist.
        shuffle_answers: give every train question another question's answer, as a control experiment; the eval file
            stays as it is.
        seed: of the shuffle.

    Returns:
        The paths and the number of rows in each file.

    Raises:
        DataError: this Python comes without the sources of its standard library.
        StorageError: the folder cannot be written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)  # first: reading the library takes seconds
        return _write(folder, list(_explain_all()), shuffle_answers=shuffle_answers, seed=seed)
    except OSError as error:
        raise StorageError(
            where=str(folder),
            found=f"a folder that cannot be written to ({error.strerror or error})",
            expected="a folder for the quickstart's data",
            fix="Choose another folder.",
        ) from error


def _write(folder: Path, explained: Sequence[Explained], *, shuffle_answers: bool, seed: int) -> QuickstartData:
    eval_modules = _choose_held_out(explained)
    train = [entry for entry in explained if entry.top_level not in eval_modules]
    held_out = [entry for entry in explained if entry.top_level in eval_modules]
    train_answers = [entry.answer for entry in train]
    if shuffle_answers:
        train_answers = _derange(train_answers, seed)
    written = QuickstartData(folder / TRAIN_FILE, folder / EVAL_FILE, len(train), len(held_out))
    _write_rows(written.train_path, [entry.question for entry in train], train_answers)
    _write_rows(written.eval_path, [entry.question for entry in held_out], [entry.answer for entry in held_out])
    return written


def _explain_all() -> Iterator[Explained]:
    """Every documented public name, each answer once: a repeated one could be in both files."""
    answers: set[str] = set()
    for module in MODULES:
        for name, docstring in _docstrings(_parse(module).body, module):
            answer = _first_paragraph(docstring)
            if _is_sentence(answer) and answer not in answers:
                answers.add(answer)
                yield Explained(name=name, answer=answer)


def _parse(module: str) -> ast.Module:
    relative = SOURCES.get(module, module).replace(".", "/")
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in (stdlib / f"{relative}.py", stdlib / relative / "__init__.py"):
        if path.is_file():
            return ast.parse(path.read_bytes())
    raise DataError(
        where=str(stdlib / f"{relative}.py"),
        found="no such file",
        expected="the Python source of the standard library",
        fix="Use a Python (3.11 to 3.14) that comes with its sources, or data of your own in data.train.",
    )


def _docstrings(body: Sequence[ast.stmt], prefix: str) -> Iterator[tuple[str, str]]:
    """Dotted names and docstrings of the public functions and classes, and of their public methods."""
    for node in body:
        if not isinstance(node, Definition) or node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        if docstring := ast.get_docstring(node):
            yield name, docstring
        if isinstance(node, ast.ClassDef):
            yield from _docstrings(node.body, name)


def _first_paragraph(docstring: str) -> str:
    return " ".join(re.split(r"\n\s*\n", docstring, maxsplit=1)[0].split())


def _is_sentence(paragraph: str) -> bool:
    """Whether it stands alone: neither an example, nor cut short before a list, nor a bare signature."""
    if not MIN_ANSWER_CHARS <= len(paragraph) <= MAX_ANSWER_CHARS:
        return False
    return ">>>" not in paragraph and not paragraph.endswith(":") and paragraph[0].isalpha()


def _choose_held_out(explained: Sequence[Explained]) -> frozenset[str]:
    """Top-level modules for the eval file: in the order of their hashes, as long as `EVAL_SHARE` is not exceeded.

    Large ones (`MAX_MODULE_SHARE`) stay in the train file, so that several modules are asked about.
    """
    num_rows = Counter(entry.top_level for entry in explained)
    room = round(EVAL_SHARE * len(explained))
    largest = round(MAX_MODULE_SHARE * room)
    chosen: set[str] = set()
    for module in sorted(num_rows, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if num_rows[module] <= min(room, largest):
            room -= num_rows[module]
            chosen.add(module)
    return frozenset(chosen)


def _derange(answers: Sequence[str], seed: int) -> list[str]:
    """A random permutation in one cycle (Sattolo), so that no answer stays where it was."""
    shuffled = list(answers)
    draws = random.Random(seed)
    for last in range(len(shuffled) - 1, 0, -1):
        other = draws.randrange(last)
        shuffled[last], shuffled[other] = shuffled[other], shuffled[last]
    return shuffled


def _write_rows(path: Path, questions: Sequence[str], answers: Sequence[str]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for question, answer in zip(questions, answers, strict=True):
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")

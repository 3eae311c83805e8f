"""Makes tokens in a process of its own, which ends when they are made: what it imported and took goes with it.

`datasets` leaves 85 MiB in a process that has imported it. In the one that trains they would be there after a cold
start and not after a warm one, so a plan could be right for one of them only. The process imports no torch: it takes a
second to begin.

The job goes in as JSON, and lines of JSON come out: how far it is, and last the error that ended it, if one did. Each
side leaves when the other has: a line that nobody reads ends the process, and it is ended when nobody waits for its
next line. It is begun anew, not forked out of a process that has threads.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, NoReturn

from qlora_trainer.config.data_files import DataSource, HubDataset
from qlora_trainer.config.dataset_folder import DatasetFolder
from qlora_trainer.config.schema import DataSection
from qlora_trainer.data.known_tokenizer import KnownTokenizer, tokenizer_content, tokenizer_of
from qlora_trainer.data.rows import Reading
from qlora_trainer.data.token_maker import TokenJob, make_tokens
from qlora_trainer.errors import ConfigError, DataError, DoesNotFitError, QloraTrainerError, StorageError

# With the modules that this process would find, and no others: a file of the working folder may be named as one.
_BEGIN = (
    "import sys; sys.path[:] = sys.argv[2:]; from qlora_trainer.data.token_process import main; main(int(sys.argv[1]))"
)
_STDERR = 2
# glibc's, kept where they begin: raised on the way, as by default, they leave 20 MiB more of freed batches resident.
_HEAP = {"MALLOC_MMAP_THRESHOLD_": str(2**17), "MALLOC_TRIM_THRESHOLD_": str(2**17)}
_PATIENCE_SECONDS = 10.0  # within which a process that is asked to end has removed its unfinished folder
_ERRORS = {error.__name__: error for error in (ConfigError, DataError, StorageError)}


def make_tokens_apart(job: TokenJob) -> Generator[Reading]:
    """Does what `make_tokens` does, in a process of its own.

    Raises:
        QloraTrainerError: as `make_tokens` does.
        DoesNotFitError: the process was killed, as it is where memory is short.
        RuntimeError: it ended otherwise without having said why; what it had to say is on stderr.
    """
    process, lines = _begin()
    assert process.stdin is not None
    try:
        with suppress(BrokenPipeError):  # it has ended, which is told below
            process.stdin.write(json.dumps(_job_as_json(job)).encode())
            process.stdin.close()
        for line in lines:
            told = json.loads(line)
            if "error" in told:
                raise _error_of(told["error"])
            yield Reading(**told["reading"])
        process.wait()
    finally:
        lines.close()
        _end(process)
    if process.returncode == -signal.SIGKILL:
        raise DoesNotFitError(
            where=f"data.{job.key}",
            found="a process that was killed while it tokenised the data",
            expected="memory for it: some 300 MiB beside this process",
            fix="Free memory, or tokenise on another machine and bring its cache folder along; see the kernel's log.",
        )
    if process.returncode:
        raise RuntimeError(f"the process that tokenises data.{job.key} ended with {process.returncode}")


def main(descriptor: int) -> None:
    """The process: takes a job on stdin, and writes lines of JSON to an open file."""
    signal.signal(signal.SIGTERM, _leave)
    with os.fdopen(descriptor, "wb") as lines:
        job = _job_of(json.load(sys.stdin.buffer))
        with suppress(BrokenPipeError), closing(make_tokens(job)) as making:
            try:
                for reading in making:
                    _tell(lines, reading=asdict(reading))
            except QloraTrainerError as error:
                _tell(lines, error=_error_as_json(error))


def _begin() -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    """The process, and its lines, which what a library prints is none of.

    In a session of its own: Ctrl+C is for this process, which then ends that one.
    """
    reading, writing = os.pipe()
    lines = os.fdopen(reading, "rb")
    command = [sys.executable, "-c", _BEGIN, str(writing), *sys.path]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=_STDERR,
            pass_fds=[writing],
            start_new_session=True,
            env=_HEAP | os.environ,
        )
    except OSError as error:
        lines.close()
        raise StorageError(
            where=sys.executable,
            found=f"a Python that cannot be started again, to tokenise the data ({error.strerror})",
            expected="room for one more process",
            fix="End other processes, or raise the limits of this user.",
        ) from error
    finally:
        os.close(writing)
    return process, lines


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process if it is still there; it has no time to lose, but a folder to remove."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # what it has not read
        process.stdin.close()
    process.terminate()
    try:
        process.wait(_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _leave(*_: object) -> NoReturn:
    """As the end of a signal's handler: contexts are left, which remove what is unfinished."""
    sys.exit(128 + signal.SIGTERM)


def _tell(lines: IO[bytes], **what: object) -> None:
    lines.write(json.dumps(what).encode() + b"\n")
    lines.flush()


def _job_as_json(job: TokenJob) -> dict[str, Any]:
    return {
        "folder": str(job.folder),
        "sources": [_source_as_json(source) for source in job.sources],
        "hashes": dict(job.hashes),
        "section": job.section.model_dump(mode="json"),
        "key": job.key,
        "tokenizer": tokenizer_content(job.tokenizer.tokenizer),
        "content_hash": job.tokenizer.content_hash,
        "where": job.tokenizer.where,
    }


def _job_of(entry: dict[str, Any]) -> TokenJob:
    return TokenJob(
        folder=Path(entry["folder"]),
        sources=tuple(_source_of(source) for source in entry["sources"]),
        hashes=entry["hashes"],
        section=DataSection.model_validate(entry["section"]),
        key=entry["key"],
        tokenizer=KnownTokenizer(tokenizer_of(entry["tokenizer"]), entry["content_hash"], entry["where"]),
    )


def _source_as_json(source: DataSource) -> dict[str, Any]:
    if isinstance(source, Path):
        return {"file": str(source)}
    if isinstance(source, HubDataset):
        return {"hub": asdict(source)}
    files = [str(path) for path in source.arrow_files]
    return {"folder": {"name": source.name, "path": str(source.path), "arrow_files": files}}


def _source_of(entry: dict[str, Any]) -> DataSource:
    if "file" in entry:
        return Path(entry["file"])
    if "hub" in entry:
        return HubDataset(**entry["hub"])
    folder = entry["folder"]
    return DatasetFolder(folder["name"], Path(folder["path"]), tuple(map(Path, folder["arrow_files"])))


def _error_as_json(error: QloraTrainerError) -> dict[str, str]:
    words = {name: getattr(error, name) for name in ("where", "found", "expected", "fix")}
    kind = {"kind": error.kind} if isinstance(error, DataError) else {}
    return {"class": type(error).__name__, **words, **kind}


def _error_of(entry: dict[str, str]) -> QloraTrainerError:
    return _ERRORS[entry.pop("class")](**entry)

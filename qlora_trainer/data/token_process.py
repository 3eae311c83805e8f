"""Makes tokens in a process of its own, which ends when they are made: what it imported and took goes with it.

`datasets` leaves 85 MiB in a process that has imported it. In the one that trains they would be there after a cold
start and not after a warm one, so a plan could be right for one of them only. The process imports no torch: it takes a
second to begin.

The job goes in as JSON, and lines of JSON come out: how far it is, and last the error that ended it, if one did. When
nobody can read them any more, since the other process has ended, however, or waits no longer, it leaves at once and
leaves nothing behind. It is begun anew, not forked out of a process that has threads.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import IO, NoReturn

from qlora_trainer.data.rows import Reading
from qlora_trainer.data.token_job import TokenJob, job_as_json, job_of
from qlora_trainer.data.token_maker import make_tokens
from qlora_trainer.errors import ConfigError, DataError, DoesNotFitError, QloraTrainerError, StorageError

# With the modules that this process would find, and no others: a file of the working folder may be named as one.
_BEGIN = (
    "import sys; sys.path[:] = sys.argv[2:]; from qlora_trainer.data.token_process import main; main(int(sys.argv[1]))"
)
_PACKAGE_PARENT = str(Path(__file__).parents[2])
# glibc's, kept where they begin: raised on the way, as by default, they leave 20 MiB more of freed batches resident.
_HEAP = {"MALLOC_MMAP_THRESHOLD_": str(2**17), "MALLOC_TRIM_THRESHOLD_": str(2**17)}
_STDERR = 2
_PATIENCE_SECONDS = 10.0  # within which a process that is asked to end has removed its unfinished folder
_ERRORS = {error.__name__: error for error in (ConfigError, DataError, DoesNotFitError, StorageError)}
_EXIT_TERMINATED = 128 + signal.SIGTERM
# By the kernel or a daemon, where memory is short; SIGABRT is how libraries end that get none.
_ENDED_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGABRT, _EXIT_TERMINATED)


def make_tokens_apart(job: TokenJob) -> Generator[Reading]:
    """Does what `make_tokens` does, in a process of its own.

    Raises:
        QloraTrainerError: as `make_tokens` does.
        DoesNotFitError: there was too little memory, or the process was ended from outside, as it is then.
        RuntimeError: it ended otherwise without having said why; what it had to say is on stderr.
    """
    process, lines = _begin()
    assert process.stdin is not None
    try:
        with suppress(BrokenPipeError):  # it has ended, which is told below
            process.stdin.write(json.dumps(job_as_json(job)).encode())
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
    if process.returncode in _ENDED_FROM_OUTSIDE:
        raise _too_little_memory(f"a process that was ended from outside ({process.returncode})")
    if process.returncode:
        raise RuntimeError(f"the process that tokenises data.{job.key} ended with {process.returncode}")


def main(descriptor: int) -> None:
    """The process: takes a job on stdin, and writes lines of JSON to an open file."""
    signal.signal(signal.SIGTERM, _leave)
    Thread(target=_end_unread, args=(descriptor,), daemon=True).start()
    with os.fdopen(descriptor, "wb", buffering=0) as lines, suppress(BrokenPipeError):
        try:
            with closing(make_tokens(job_of(json.load(sys.stdin.buffer)))) as making:
                for reading in making:
                    _tell(lines, reading=asdict(reading))
        except QloraTrainerError as error:
            _tell(lines, error=_error_as_json(error))
        except MemoryError:
            _tell(lines, error=_error_as_json(_too_little_memory("too little of it")))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # all is done; it would disturb Python's own end


def _end_unread(descriptor: int) -> None:
    """Ends this process when nobody can read its lines any more; waits for that."""
    lines = select.poll()
    lines.register(descriptor, 0)  # of errors alone, which are always told
    lines.poll()
    os.kill(os.getpid(), signal.SIGTERM)


def _leave(*_: object) -> NoReturn:
    """As the end of a signal's handler: contexts are left, which remove what is unfinished."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(_EXIT_TERMINATED)


def _begin() -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    """The process, and its lines, which what a library prints is none of.

    In a session of its own: Ctrl+C is for this process, which then ends that one.
    """
    reading, writing = _pipe()
    lines = os.fdopen(reading, "rb")
    # What is imported here may have been found from another working folder.
    path = sys.path if _PACKAGE_PARENT in sys.path else [_PACKAGE_PARENT, *sys.path]
    prints = _STDERR if _is_open(_STDERR) else subprocess.DEVNULL
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", _BEGIN, str(writing), *path],
            stdin=subprocess.PIPE,
            stdout=prints,
            stderr=prints,
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


def _pipe() -> tuple[int, int]:
    """Both ends, beyond the standard descriptors: those may be closed, and are another file's in the process."""
    low = os.pipe()
    try:
        reading, writing = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, _STDERR + 1) for end in low)
    finally:
        for end in low:
            os.close(end)
    return reading, writing


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


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


def _too_little_memory(found: str) -> DoesNotFitError:
    return DoesNotFitError(
        where="tokenising the data",
        found=found,
        expected="memory for a process beside this one: 200 to 350 MiB",
        fix="Free memory, or tokenise where there is more (train --dry-run) and bring the cache folder along.",
    )


def _tell(lines: IO[bytes], **what: object) -> None:
    lines.write(json.dumps(what).encode() + b"\n")
    lines.flush()


def _error_as_json(error: QloraTrainerError) -> dict[str, str]:
    words = {name: getattr(error, name) for name in ("where", "found", "expected", "fix")}
    kind = {"kind": error.kind} if isinstance(error, DataError) else {}
    return {"class": type(error).__name__, **words, **kind}


def _error_of(entry: dict[str, str]) -> QloraTrainerError:
    return _ERRORS[entry.pop("class")](**entry)

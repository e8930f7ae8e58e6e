"""SIGINT, SIGTERM and SIGHUP for the command line: the first stops the run, a second ends it at once, none in a rename.

The first signal raises ``Interrupted``; if a library swallows it, ``check`` raises it again at the next step
of progress. Within a call of a C library or the import of torch neither signal is seen; SIGQUIT (Ctrl-\\) and SIGKILL
end even that, as safely: files are always complete. A program that calls ``sparsellm.prune`` keeps its handlers.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME = 0.5  # seconds; two signals within this time count as one, since `timeout` and closing terminals send two
EXIT_CODE = 128  # plus the signal, as shells show it: 130 for SIGINT, 143 for SIGTERM
RESUMES = "; the same command resumes it:  "


@dataclass
class _Command:
    """The command that this process runs."""

    process: int = 0  # that installed the handlers; a fork of it is another
    received: int | None = None  # the signal that asked it to stop
    since: float = 0.0  # when that was, by time.monotonic()
    kept: str = ""  # a sentence about the files that it leaves
    resumes: bool = True  # whether the same command goes on from these files
    whole_said: bool = False  # whether the sentence is about the whole command


_command = _Command()


class Interrupted(BaseException):
    """Raised when a signal stops the process; no Exception, so that error handlers do not swallow it."""


def received() -> int | None:
    """The signal that asked this process to stop, or None."""
    return _command.received


def check() -> None:
    """Raises Interrupted again if a signal was received and a library swallowed the exception."""
    if _command.received is not None:
        raise Interrupted


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Installs the handlers; a signal that is ignored (``nohup``, a background job) stays ignored. Does nothing outside
    the main thread, where Python cannot install handlers."""
    global _command
    _command = _Command(os.getpid())
    with handled_by(_stop):
        yield
        check()


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Postpones signals to the end of the context, for steps that belong together. Then their handlers are called."""
    arrived: list[int] = []
    try:
        with handled_by(lambda signum, _: arrived.append(signum)):
            yield
    finally:
        for signum in dict.fromkeys(arrived):
            signal.raise_signal(signum)


@contextlib.contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Until the context ends, calls a function for the signals that are not ignored. SIGINT's handler may raise, so it
    is the first to be replaced and the last to be restored."""
    signals = SIGNALS if threading.current_thread() is threading.main_thread() else ()
    handlers = ((signum, signal.getsignal(signum)) for signum in signals)
    before = {
        signum: theirs
        for signum, theirs in handlers
        if theirs not in (signal.SIG_IGN, None)
    }
    try:
        for signum in before:
            signal.signal(signum, handler)
        yield
    finally:
        for signum, theirs in reversed(before.items()):
            signal.signal(signum, theirs)


def _stop(signum: int, _: FrameType | None) -> None:
    # a forked child, which ends as it would without these handlers
    if os.getpid() != _command.process:
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)
    if _command.received is None:
        _command.since = time.monotonic()  # first, since a second signal reads it
        _command.received = signum
        raise Interrupted
    if time.monotonic() - _command.since > SAME:
        show_cursor = b"\x1b[?25h" if os.isatty(2) else b""  # a progress bar hides it
        with contextlib.suppress(OSError):
            os.write(2, show_cursor + b"\nstopped at once\n")
        os._exit(EXIT_CODE + signum)


def keeps(what: str, *, resumes: bool = True, part: bool = False) -> None:
    """Sets the sentence about the files that a stopped command leaves, and whether the same command resumes it. A step
    that is only a ``part`` of a command does not replace the sentence of the command itself."""
    if not (part and _command.whole_said):
        _command.kept = what
        _command.resumes = resumes
        _command.whole_said = not part


def last_words(signum: int) -> str:
    """The message about the files that are kept, and the command that resumes the run."""
    stopped = f"interrupted ({signal.Signals(signum).name}); "
    if not _command.kept:
        return f"{stopped}this command keeps nothing: start it again with  {command_line()}"
    if not _command.resumes:
        return stopped + _command.kept
    return f"{stopped}{_command.kept}{RESUMES}{command_line(without='--restart')}"


def command_line(*, without: str = "") -> str:
    """The current command line (under torchrun, that of torchrun), quoted for a shell, without an option."""
    program = Path(sys.argv[0])
    words = [program.name]
    if program.stem == "sparsellm":  # other programs may be given secrets
        words += sys.argv[1:]
    if program.parts[-2:] == ("sparsellm", "__main__.py"):
        words = [sys.orig_argv[0], "-m", "sparsellm", *sys.argv[1:]]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        import psutil

        with contextlib.suppress(psutil.Error):
            parents: list[str] = psutil.Process(os.getppid()).cmdline()
            # python .../torchrun, or python -m torch.distributed.run
            if "sparsellm" in parents:
                if Path(parents[1]).name == "torchrun":
                    words = ["torchrun", *parents[2:]]
                else:
                    words = parents
    return shlex.join(word for word in words if word != without)

"""SIGINT, SIGTERM and SIGHUP for the command line: a first stops at a safe point, a second at once, none in a rename.

Only the command line installs these handlers. A Python program that calls :func:`sparsellm.prune` keeps its own, and
gets its own KeyboardInterrupt; :func:`held` works for it as well.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
SAME = 0.5  # seconds; two signals within this time count as one, since `timeout` and closing terminals send two
PATIENCE = 2.0  # seconds from a signal to the message that the current step has to end first

_received: int | None = None
_holders = 0  # the number of open held() contexts


class Interrupted(BaseException):
    """Raised when a signal stops the process.

    It is not an Exception, so that error handlers do not swallow it, and not a KeyboardInterrupt, which typer turns
    into its own exit code.

    Attributes:
        signum: the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def received() -> int | None:
    """The signal that asked this process to stop, or None."""
    return _received


def exit_code(signum: int) -> int:
    """The exit code that shells show for a process ended by a signal: 130 for SIGINT, 143 SIGTERM, 129 SIGHUP."""
    return 128 + signum


def check() -> None:
    """Raises Interrupted again if a signal was received and a library swallowed the exception.

    Raises:
        Interrupted: a signal was received, and no :func:`held` postpones it.
    """
    if _received is not None and not _holders:
        raise Interrupted(_received)


@contextlib.contextmanager
def installed(on_slow: Callable[[int], None]) -> Iterator[None]:
    """Installs handlers: a first signal raises :class:`Interrupted` in the main thread, a second ends the process.

    A signal that is ignored (``nohup``, a background job) stays ignored. Does nothing outside the main thread, where
    Python cannot install handlers.

    Args:
        on_slow: called with the signal, in another thread, if the main thread has not returned to Python code within
            :data:`PATIENCE` seconds.
    """
    global _received
    _received = None
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    theirs = {signum: signal.getsignal(signum) for signum in SIGNALS}
    ours = [signum for signum, handler in theirs.items() if handler not in (signal.SIG_IGN, None)]
    with _watched(on_slow, set(ours)):
        for signum in ours:
            signal.signal(signum, _stop)
        try:
            yield
            check()
        finally:
            for signum in ours:
                signal.signal(signum, theirs[signum])


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Postpones signals to the end of the context, for steps that belong together, such as renaming two directories.

    Works with any handlers, including the default ones: each is called after the context. A second signal waits as
    well. Does nothing outside the main thread, the only one that handles signals.
    """
    global _holders
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = _received
    _holders += 1
    try:
        with _postponed():
            yield
    finally:
        _holders -= 1
        if _received != earlier:  # a signal came inside the context, with our own handlers
            check()


@contextlib.contextmanager
def _postponed() -> Iterator[None]:
    """As :func:`held`, for handlers other than :func:`_stop`, which postpones by itself."""
    over = False
    arrived: list[int] = []
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    before = {signum: was for signum, was in before.items() if was not in (signal.SIG_IGN, None, _stop)}

    def note(signum: int, _: FrameType | None) -> None:
        if over:  # the signal came while the handlers are restored
            signal.signal(signum, before[signum])
            signal.raise_signal(signum)
        arrived.append(signum)

    try:
        for signum in before:
            signal.signal(signum, note)
        yield
    finally:
        over = True
        for signum, handler in before.items():
            signal.signal(signum, handler)
        for signum in dict.fromkeys(arrived):
            signal.raise_signal(signum)


def _stop(signum: int, _: FrameType | None) -> None:
    """The handler. The watching thread handles later signals, without waiting for the main thread."""
    global _received
    if _received is None:
        _received = signum
        if not _holders:
            raise Interrupted(signum)


@contextlib.contextmanager
def _watched(on_slow: Callable[[int], None], ours: set[int]) -> Iterator[None]:
    """Runs a thread that reads the numbers of signals as they arrive, even while the main thread is in a library."""
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(reading, on_slow, ours), daemon=True)
    thread.start()
    _to_forget.update(ours)
    try:
        yield
    finally:
        _to_forget.clear()
        signal.set_wakeup_fd(before)
        writing.close()  # ends the thread
        thread.join()
        reading.close()


def _watch(reading: socket.socket, on_slow: Callable[[int], None], ours: set[int]) -> None:
    first = told = 0
    since = 0.0
    while True:
        reading.settimeout(PATIENCE if first and not told else None)
        try:
            data = reading.recv(64)
        except TimeoutError:
            if _received is not None:
                told = first
            elif not _holders:
                told = first
                on_slow(first)
            continue
        if not data:
            return
        for signum in ours.intersection(data):
            if not first:
                first, since = signum, time.monotonic()
            elif time.monotonic() - since > SAME and not _holders:
                _end_at_once(signum)


def _end_at_once(signum: int) -> None:
    show_cursor = b"\x1b[?25h" if os.isatty(2) else b""  # a progress bar hides it
    with contextlib.suppress(OSError):
        os.write(2, show_cursor + b"\nstopped at once\n")
    os._exit(exit_code(signum))


def _forget() -> None:
    """Restores default handling of signals in a forked child."""
    if _to_forget:
        signal.set_wakeup_fd(-1)
    for signum in _to_forget:
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)


_to_forget: set[int] = set()  # signals that installed() handles now
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# ---------------------------------------------------------------------- what to say

RESUMES = "; the same command resumes it:  "


def command_line(*, without: tuple[str, ...] = ()) -> str:
    """The current command line, quoted for a shell; under torchrun, the command line of torchrun.

    Args:
        without: options to leave out, such as ``--restart``, which would prevent resuming.
    """
    words = _launcher_words() or _own_words()
    return shlex.join(word for word in words if word not in without)


def _own_words() -> list[str]:
    if Path(sys.argv[0]).name != "__main__.py":
        return [Path(sys.argv[0]).name, *sys.argv[1:]]
    return [sys.orig_argv[0], "-m", "sparsellm", *sys.argv[1:]]


def _launcher_words() -> list[str]:
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    import psutil

    with contextlib.suppress(psutil.Error):
        words: list[str] = psutil.Process(os.getppid()).cmdline()
        if "sparsellm" in words:  # python .../torchrun, or python -m torch.distributed.run
            return ["torchrun", *words[2:]] if len(words) > 1 and Path(words[1]).name == "torchrun" else words
    return []


def last_words(signum: int, kept: Callable[[], tuple[str, bool]] | None) -> str:
    """The message about the files that are kept, and the command that resumes the run.

    Args:
        signum: the signal that ended the command.
        kept: returns a sentence on the files that are left, and whether the run can be resumed; None for a command
            that keeps nothing.
    """
    name = signal.Signals(signum).name
    if kept is None:
        return f"interrupted ({name}); this command keeps nothing: start it again with  {command_line()}"
    sentence, goes_on = kept()
    if not goes_on:
        return f"interrupted ({name}); {sentence}"
    return f"interrupted ({name}); {sentence}{RESUMES}{command_line(without=('--restart',))}"

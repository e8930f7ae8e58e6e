"""Commands in processes of their own, which are killed at a chosen operation on a file or by a signal.

A server process imports all of a pruning run once, which takes seconds, and each command is forked from it. What is run
lives in this module, not in a test."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock
from unittest.mock import Mock

import pytest
import torch

import sparsellm
from sparsellm import interrupts
from sparsellm.app import cli
from sparsellm.errors import NumericalError, SparseLLMError
from sparsellm.files import files, scratch, writer
from sparsellm.files.reader import CheckpointReader
from sparsellm.files.scratch import Room, Scratch
from sparsellm.method.sweep.sweep_task import TrainingSet
from sparsellm.model import Chain, LinearView
from sparsellm.progress import Progress
from sparsellm.run import warnings

LIMIT = 120.0  # seconds, far beyond what any command here takes
KILLED = -signal.SIGKILL

# the number of a step, or its kind and its number among those
At = int | tuple[str, int] | None
_CALLS = {
    "replace": "rename",
    "unlink": "remove",
    "rmdir": "remove",
    "mkdir": "make",
    "fsync": "sync",
}
_WRITERS = (files, writer, scratch)
_IMPORTED = (  # also what is imported late
    *(
        "sparsellm.api",
        "sparsellm.app.console",
        "sparsellm.method.blocks",
        "sparsellm.convert",
        "sparsellm.app.tables",
    ),
    *(
        "tests.models",
        "transformers.models.llama.modeling_llama",
        "transformers.models.gpt2.modeling_gpt2",
    ),
)


def context() -> ForkServerContext:
    """The context of ``multiprocessing`` for all processes of tests; there is only one server."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([*_IMPORTED])
    return forks


class Died(BaseException):
    """In place of a signal: no handler of errors catches it, and no file changes after it."""


@contextlib.contextmanager
def dying(at: At = None, *, signalled: bool = False) -> Iterator[Counter[str]]:
    """Counts operations on files by kind, a step before and after each; dies at ``at``, if ``signalled`` by SIGKILL."""
    steps: Counter[str] = Counter()

    def step(kind: str) -> None:
        steps[kind] += 1
        reached = (
            steps.total()
            if isinstance(at, int)
            else steps[at[0]]
            if at is not None
            else 0
        )
        if at is not None and reached >= (at if isinstance(at, int) else at[1]):
            if signalled:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Died

    def around(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            step(kind)
            result = function(*args, **kwargs)
            step(kind)
            return result

        return wrapped

    write_all = files.write_all

    def torn(file: Any, data: Any) -> None:
        rest = memoryview(data).cast("B")
        for part in (rest[: len(rest) // 2], rest[len(rest) // 2 :]):
            step("write")
            write_all(file, part)
        step("write")

    with contextlib.ExitStack() as patched:
        for name, kind in _CALLS.items():
            patched.enter_context(
                mock.patch.object(os, name, around(kind, getattr(os, name)))
            )
        for module in _WRITERS:
            patched.enter_context(mock.patch.object(module, "write_all", torn))
        for owner, name, kind in (
            (CheckpointReader, "get", "read"),
            (LinearView, "assign", "solve"),
        ):
            patched.enter_context(
                mock.patch.object(owner, name, around(kind, getattr(owner, name)))
            )
        yield steps


@contextlib.contextmanager
def full_disk(after: int | None) -> Iterator[None]:
    """From the given call on, nothing more can be written, until the context ends; None for a disk with room."""
    left, write_all = [after or 0], files.write_all

    def filling(file: Any, data: Any) -> None:
        left[0] -= 1
        if left[0] <= 0:
            write_all(file, memoryview(data).cast("B")[:1])
            raise OSError(errno.ENOSPC, "No space left on device")
        write_all(file, data)

    with contextlib.ExitStack() as patched:
        for module in _WRITERS if after is not None else ():
            patched.enter_context(mock.patch.object(module, "write_all", filling))
        yield


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (minus the signal), its error, and its steps by kind."""

    code: int | None
    error: str = ""
    steps: Counter[str] = field(default_factory=Counter)


def run(
    command: Callable[..., Any],
    *args: Any,
    at: At = None,
    memory: int | None = None,
    **kwargs: Any,
) -> Ended:
    """Runs ``command(*args, **kwargs)`` in a process of its own, which is killed at step ``at`` of :func:`dying`."""
    reading, writing = context().Pipe(duplex=False)
    with started(_counted, writing, (command, args, kwargs), at, memory) as process:
        writing.close()
        code = ended(process)
    try:
        return Ended(code, *reading.recv())
    except EOFError:
        return Ended(code)


def prune(source: Path, out: Path, recipe: dict[str, Any]) -> None:
    """A command for :func:`run`."""
    sparsellm.prune(source, sparsellm.Recipe(**recipe), out=out)


def line(home: Path, words: list[str], disk: int | None = None) -> None:
    """A command for :func:`run`: a command line in the directory ``home``, where the disk is full after some writes."""
    os.chdir(home)
    os.environ["SPARSELLM_CACHE"] = str(home / "cache")
    sys.stdout = sys.stderr = (home.parent / f"{home.name}.log").open("w")
    sys.argv = ["sparsellm", *words]
    with full_disk(disk):
        cli.main()


def _counted(connection: Any, call: Any, at: Any, memory: int | None) -> None:
    torch.set_num_threads(1)
    command, args, kwargs = call
    # what a kill leaves does not depend on it, and it takes the time
    os.fsync = lambda descriptor: None
    error, make = "", Scratch.__init__
    if memory is not None:  # for hidden states; the others are on disk
        Scratch.__init__ = lambda self, _=None, *args, **kwargs: make(
            self, Room(memory), *args, **kwargs
        )  # type: ignore[method-assign]
    with dying(at, signalled=True) as steps:
        try:
            command(*args, **kwargs)
        except SparseLLMError as refused:
            error = f"{type(refused).__name__}: {refused}"
        except SystemExit as stopped:
            error = f"exit code {stopped.code}" if stopped.code else ""
    connection.send((error, Counter(steps)))


def stop_after_one(phase: str) -> Callable[[Progress], None]:
    """For ``progress``: stops a run when a phase has done its first block."""

    def stop(event: Progress) -> None:
        if event.phase == phase and event.done >= 1:
            raise KeyboardInterrupt

    return stop


def ahead_of(patched: Any, owner: Any, name: str, do: Callable[..., Any]) -> None:
    """Each call of a function calls ``do`` first, with the same arguments."""
    function = getattr(owner, name)

    def both(*args: Any, **kwargs: Any) -> Any:
        do(*args, **kwargs)
        return function(*args, **kwargs)

    patched.setattr(owner, name, both)


def once_in_block(
    index: int, patched: Any, do: Callable[[], Any], after: int = 0
) -> None:
    """Something happens when the model's own block ``index`` is about to be read for the time ``after`` + 1."""
    times = 0

    def loading(_: Chain, at: int, *rest: Any) -> None:
        nonlocal times
        if at == index and all(argument is None for argument in rest):
            times += 1
            if times == after + 1:
                do()

    ahead_of(patched, Chain, "block", loading)


def some(count: int, of: int, seed: int | str) -> list[int]:
    """Different numbers from 1 to ``of``, in order."""
    return sorted(random.Random(seed).sample(range(1, of + 1), min(count, of)))


def command_line(
    arguments: list[str],
    folder: Path,
    *,
    how: str = "wait",
    ignore: tuple[int, ...] = (),
    closed: bool = False,
) -> None:
    """What the process of a command runs; arguments as in :func:`command`."""
    torch.set_num_threads(1)
    interrupts.SAME = 0.0
    warnings.pruned_share = lambda *_: 0.0  # type: ignore[attr-defined]  # a check that reads blocks
    for signum in ignore:
        signal.signal(signum, signal.SIG_IGN)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if closed:
            reading, writing = os.pipe()
            os.dup2(writing, number)
            os.close(reading)
            os.close(writing)
        else:
            os.dup2(
                os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
                number,
            )
    sys.stdout, sys.stderr = (
        os.fdopen(1, "w", closefd=False),
        os.fdopen(2, "w", closefd=False),
    )
    Chain.block = _waiting(Chain.block, folder, how)  # type: ignore[method-assign]
    sys.argv = ["sparsellm", *arguments]
    cli.main()


def _waiting(block: Callable[..., Any], folder: Path, how: str) -> Callable[..., Any]:
    """``Chain.block`` whose first reading of the second block leaves ``reached`` and waits for ``go``. With ``swallow``
    a signal ends the waiting without an error and leaves ``swallowed``; with ``swallow for ever`` it does not."""

    def waiting(chain: Chain, index: int, *rest: Any) -> Any:
        waits = index == 1 and not (folder / "reached").exists()
        while waits:
            try:
                # in here, so that a signal right after it is caught
                (folder / "reached").touch()
                time.sleep(0.01)
                waits = not (folder / "go").exists()
            except BaseException:
                if how == "wait":
                    raise
                (folder / "swallowed").touch()
                waits = how == "swallow for ever"
        return block(chain, index, *rest)

    return waiting


@contextlib.contextmanager
def started(target: Any, *arguments: Any, **options: Any) -> Iterator[BaseProcess]:
    """A process, killed when the context ends if it still runs."""
    process = context().Process(target=target, args=arguments, kwargs=options)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


@contextlib.contextmanager
def command(folder: Path, *arguments: Any, **options: Any) -> Iterator[BaseProcess]:
    """A command line in a process, when it has come to the point where it waits; its ``stdout`` and ``stderr`` are in
    ``folder``. ``how`` it waits; signals to ``ignore``, as under nohup; ``closed`` if nobody reads its output."""
    with started(
        command_line, [str(word) for word in arguments], folder, **options
    ) as process:
        await_file(folder / "reached", process)
        yield process


def await_file(path: Path, process: BaseProcess) -> None:
    deadline = time.monotonic() + LIMIT
    while not path.exists():
        log = path.with_name("stderr")
        assert process.is_alive(), log.read_text() if log.exists() else "it ended"
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.01)


def send(process: BaseProcess, signum: int) -> None:
    assert process.pid is not None
    os.kill(process.pid, signum)


def ended(process: BaseProcess) -> int:
    """The exit code; minus the signal if one killed the process."""
    process.join(LIMIT)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def fail_in_block(index: int, patched: pytest.MonkeyPatch, after: int = 0) -> None:
    """An error in place of a signal, where gradients read the block ``after`` times; the check for zeros does, too."""
    once_in_block(
        index,
        patched,
        Mock(side_effect=NumericalError("the processor caught fire")),
        after + 1,
    )


def fail_after_passes(saved: int, patched: pytest.MonkeyPatch) -> None:
    """An error when the pass after ``saved`` ones is judged."""
    judged = [None] * (saved + 1)
    ahead_of(
        patched,
        TrainingSet,
        "judge",
        Mock(side_effect=[*judged, NumericalError("the processor caught fire")]),
    )

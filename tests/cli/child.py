"""Commands in real processes, for real signals; in a module of its own, so that a server can fork each from there."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

import sparsellm
from sparsellm import cli, interrupts
from sparsellm.chain import Chain
from tests import forking

LIMIT = 120.0  # seconds, far beyond what any command here takes

# A solver that stops in the second block of a tiny Llama (seven linears each) and says that it is there.
WAITING_SOLVER = """
import time
from pathlib import Path
from sparsellm.solvers import SOLVERS

HERE = Path(__file__).parent
calls = 0

def wait():
    while not (HERE / "go").exists():
        time.sleep(0.01)

def swallow():
    try:
        wait()
    except BaseException:
        (HERE / "swallowed").touch()

def swallow_for_ever():
    while not (HERE / "go").exists():
        swallow()

@SOLVERS.register("waiting", paper="none")
def waiting(weight, gram, pattern):
    global calls
    calls += 1
    if calls == 10:
        (HERE / "reached").touch()
        {how}()
    return SOLVERS["magnitude"].function(weight, gram, pattern)
"""


def waiting_solver(folder: Path, how: str = "wait") -> Path:
    """The plugin's file. It leaves ``reached`` beside it, and waits for ``go``."""
    path = folder / "waiting.py"
    path.write_text(WAITING_SOLVER.replace("{how}", how))
    return path


def command_line(
    arguments: list[str], folder: Path, ignore: tuple[int, ...] = (), blocks_wait: bool = False, closed: bool = False
) -> None:
    """What the process of a command runs; arguments as of :func:`command`."""
    torch.set_num_threads(1)
    interrupts.SAME = 0.0
    for signum in ignore:
        signal.signal(signum, signal.SIG_IGN)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if closed:
            reading, writing = os.pipe()
            os.dup2(writing, number)
            os.close(reading)
            os.close(writing)
        else:
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    if blocks_wait:
        _let_blocks_wait(folder)
    sys.argv = ["sparsellm", *arguments]
    cli.main()


def _let_blocks_wait(folder: Path) -> None:
    block = Chain.block

    def waiting(self: Chain, index: int, *rest: Any) -> Any:
        if index == 1:
            (folder / "reached").touch()
            while not (folder / "go").exists():
                time.sleep(0.01)
        return block(self, index, *rest)

    Chain.block = waiting  # type: ignore[method-assign]


def _python(model: Path, out: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    _let_blocks_wait(folder)
    recipe = sparsellm.Recipe(method="magnitude", samples=2, seq_len=16)
    caught = "nothing"
    try:
        sparsellm.prune(model, recipe, out=out)
    except BaseException as error:
        caught = type(error).__name__
    (folder / "caught").write_text(caught)


@contextlib.contextmanager
def started(target: Any, *arguments: Any) -> Iterator[BaseProcess]:
    """A process, forked from one that has imported all that a run imports; killed at the end if it still runs."""
    process = forking.context().Process(target=target, args=arguments)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


@contextlib.contextmanager
def command(
    folder: Path, *arguments: Any, ignore: tuple[int, ...] = (), blocks_wait: bool = False, closed: bool = False
) -> Iterator[BaseProcess]:
    """A command line in a process, when it has come to the point where it waits.

    Args:
        folder: where it leaves ``stdout`` and ``stderr``, and where the solver that waits is.
        arguments: of the command line.
        ignore: signals that it ignores from the start, as under nohup.
        blocks_wait: it waits where the second block is read; else a solver of :data:`WAITING_SOLVER` does.
        closed: nobody reads its stdout and stderr.
    """
    words = [str(word) for word in arguments]
    with started(command_line, words, folder, ignore, blocks_wait, closed) as process:
        await_file(folder / "reached", process)
        yield process


@contextlib.contextmanager
def python(folder: Path, model: Path, out: Path) -> Iterator[BaseProcess]:
    """A program that calls :func:`sparsellm.prune`, when it reads the second block; it leaves ``caught``."""
    with started(_python, model, out, folder) as process:
        await_file(folder / "reached", process)
        yield process


def await_file(path: Path, process: BaseProcess) -> None:
    deadline = time.monotonic() + LIMIT
    while not path.exists():
        log = path.with_name("stderr")
        assert process.is_alive(), log.read_text() if log.exists() else "it ended"
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.01)


def await_text(path: Path, text: str, process: BaseProcess) -> None:
    deadline = time.monotonic() + LIMIT
    while not path.exists() or text not in path.read_text():
        assert process.is_alive()
        assert time.monotonic() < deadline, f"{text!r} never came"
        time.sleep(0.01)


def send(process: BaseProcess, signum: int) -> None:
    assert process.pid is not None
    os.kill(process.pid, signum)


def ended(process: BaseProcess) -> int:
    """The exit code; minus the signal if one killed the process."""
    process.join(LIMIT)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode

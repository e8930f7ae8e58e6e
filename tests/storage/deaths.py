"""Dying at a chosen system call, by a signal or by an error after which nothing is done any more."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sparsellm.storage import publish
from tests import forking
from tests.storage.small import write

CALLS = ("replace", "unlink", "rmdir", "mkdir", "fsync")


class Died(BaseException):
    """What a killed process would not have lived to see: nobody handles it, and no file changes after it."""


@contextmanager
def dying(at: int | None, exchanges: bool = True, signalled: bool = False) -> Iterator[list[int]]:
    """Before and after each call that changes a directory there is a step; at the chosen one, the process dies.

    Args:
        at: the step, from 1; None to live.
        exchanges: whether the system can exchange two directories.
        signalled: die by SIGKILL.

    Yields:
        A list of one number, the steps so far.
    """
    steps = [0]

    def step() -> None:
        steps[0] += 1
        if at is not None and steps[0] >= at:
            if signalled:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Died

    def around(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            step()
            result = function(*args, **kwargs)
            step()
            return result

        return wrapped

    before = {name: getattr(os, name) for name in CALLS}
    exchange = publish.exchange
    try:
        for name, function in before.items():
            setattr(os, name, around(function))
        publish.exchange = around(exchange) if exchanges else lambda first, second: False
        yield steps
    finally:
        for name, function in before.items():
            setattr(os, name, function)
        publish.exchange = exchange


def write_and_die(at: int, exchanges: bool, out: Path, value: float, model: Path, options: dict[str, Any]) -> None:
    """:func:`tests.storage.small.write`, by a process of its own that is killed at step ``at``, if it comes so far."""
    process = forking.context().Process(target=_write, args=(at, exchanges, out, value, model, options))
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode


def _write(at: int, exchanges: bool, out: Path, value: float, model: Path, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None
    with dying(at, exchanges, signalled=True):
        write(out, value, model, **options)

"""A pruning run that kills its own process, by SIGKILL, at a chosen step; what is left behind is what a crash leaves.

It lives in a module of its own, so that a server process can import it once and fork every victim from there.
"""

from __future__ import annotations

import os
import random
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sparsellm import Recipe, api
from sparsellm.chain import LinearView
from sparsellm.run import plan as planning
from sparsellm.storage import files, resume, scratch, shard
from sparsellm.storage.reader import CheckpointReader
from tests import forking

STEPS = ("read", "solve", "write", "sync", "rename", "remove")


class Counter:
    """Counts steps of each kind, and dies at the chosen one of them."""

    def __init__(self, die_at: tuple[str, int] | None) -> None:
        self.counts = dict.fromkeys(STEPS, 0)
        self.die_at = die_at

    def step(self, kind: str) -> None:
        self.counts[kind] += 1
        if self.die_at in ((kind, self.counts[kind]), ("any", sum(self.counts.values()))):
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A step before the function does its work, and one after."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.step(kind)
            result = function(*args, **kwargs)
            self.step(kind)
            return result

        return wrapped

    def torn(self, write: Callable[..., Any]) -> Callable[..., Any]:
        """Writing in two halves, with steps before, between and after."""

        def wrapped(file: Any, data: Any) -> None:
            rest = memoryview(data).cast("B")
            self.step("write")
            write(file, rest[: len(rest) // 2])
            self.step("write")
            write(file, rest[len(rest) // 2 :])
            self.step("write")

        return wrapped


@contextmanager
def watched(counter: Counter) -> Iterator[None]:
    """Every step of a run passes the counter. For a process of its own: nothing is put back."""
    CheckpointReader.get = counter.around("read", CheckpointReader.get)  # type: ignore[method-assign]
    LinearView.assign = counter.around("solve", LinearView.assign)  # type: ignore[method-assign]
    torn = counter.torn(files.write_all)
    for module in (resume, scratch, shard):
        module.write_all = torn  # type: ignore[attr-defined]
    os.fsync = counter.around("sync", os.fsync)
    os.replace = counter.around("rename", os.replace)
    os.unlink = counter.around("remove", os.unlink)
    yield


def prune(
    source: Path,
    out: Path,
    recipe: dict[str, Any],
    die_at: tuple[str, int] | None = None,
    counts: Any = None,
    file_limit: int | None = None,
    hidden_in_memory: int | None = None,
) -> None:
    """Prunes ``source`` into ``out`` with some of its hidden states on disk; what the victim's process runs.

    Args:
        source, out, recipe: as of ``sparsellm.prune``.
        die_at: kind and number of the step at which the process dies.
        counts: a queue that is given how many steps of each kind there were.
        file_limit: the most bytes that a file may have; more is what a full disk is.
        hidden_in_memory: bytes; the rest is on disk.
    """
    torch.set_num_threads(1)
    counter = Counter(die_at)
    if file_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if hidden_in_memory is not None:
        plan = planning.plan_memory
        planning.plan_memory = lambda *a, **k: plan(*a, **k).model_copy(  # type: ignore[assignment]
            update={"hidden_in_memory_bytes": hidden_in_memory}
        )
    with watched(counter):
        try:
            api.prune(source, Recipe(**recipe), out=out)
        finally:
            if counts is not None:
                counts.put(counter.counts)


def run(*args: Any, **kwargs: Any) -> int | None:
    """:func:`prune` in a process of its own: its exit code, minus the signal if it was killed."""
    process = forking.context().Process(target=prune, args=args, kwargs=kwargs)
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the victim hangs"
    return process.exitcode


def count_steps(*args: Any, **kwargs: Any) -> dict[str, int]:
    """How many steps of each kind an uninterrupted run takes."""
    queue = forking.context().Queue()
    process = forking.context().Process(target=prune, args=args, kwargs={**kwargs, "counts": queue})
    process.start()
    counts: dict[str, int] = queue.get(timeout=120)
    process.join(120)
    assert process.exitcode == 0
    return counts


def some(count: int, of: int, seed: int) -> list[int]:
    """So many different numbers from 1 to ``of``, in order."""
    return sorted(random.Random(seed).sample(range(1, of + 1), min(count, of)))

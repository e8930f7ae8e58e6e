"""Reads the weights of the next block in a thread while the current block is pruned.

This saves time if reading and pruning use different parts of the machine: a slow disk, and a GPU that computes. The
thread reads the weights in their stored dtype, into page-locked memory if there is a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

Read = Callable[[str], Tensor]


class Prefetcher:
    """Holds the weights of one block at most.

    Args:
        pin: keep them in page-locked memory.
    """

    def __init__(self, pin: bool) -> None:
        self._pin = pin
        self._thread: ThreadPoolExecutor | None = None
        self._index: int | None = None
        self._coming: Future[dict[str, Tensor]] | None = None

    def start(self, index: int, names: Iterable[str], read: Read) -> None:
        """Starts to read the weights of block ``index``; drops weights that were read before and not taken."""
        self.forget()
        self._thread = self._thread or ThreadPoolExecutor(1, "prefetch")
        names = list(names)

        def all_of_them() -> dict[str, Tensor]:
            return {name: read(name).pin_memory() if self._pin else read(name) for name in names}

        self._index, self._coming = index, self._thread.submit(all_of_them)

    def take(self, index: int) -> dict[str, Tensor]:
        """The weights of block ``index`` in their stored dtype; empty if another block, or none, was read ahead.

        Raises the exception that the thread met, such as StorageError.
        """
        if self._index != index or self._coming is None:
            return {}
        coming, self._coming, self._index = self._coming, None, None
        return coming.result()

    def forget(self) -> None:
        """Waits for the thread and drops the weights that it has read."""
        if self._coming is not None:
            if not self._coming.cancel():
                self._coming.exception()  # ignored here: the next read of these weights raises it again
            self._coming, self._index = None, None

"""Reading the weights of the next block in a thread, while this one is solved.

It pays where reading and solving use different parts of the machine: a GPU that computes, a disk that is slow. What a
thread reads are the numbers as they are stored, in memory that a GPU can copy from by itself where there is one.
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
        """Begins to read the weights of block ``index``; what was read before and not taken is forgotten."""
        self.forget()
        self._thread = self._thread or ThreadPoolExecutor(1, "prefetch")
        names = list(names)

        def all_of_them() -> dict[str, Tensor]:
            return {name: read(name).pin_memory() if self._pin else read(name) for name in names}

        self._index, self._coming = index, self._thread.submit(all_of_them)

    def take(self, index: int) -> dict[str, Tensor]:
        """The weights of block ``index``, as stored; none where something else was read ahead.

        Raises what the reading raised, such as StorageError.
        """
        if self._index != index or self._coming is None:
            return {}
        coming, self._coming, self._index = self._coming, None, None
        return coming.result()

    def forget(self) -> None:
        """Waits for the thread, and drops what it has read."""
        if self._coming is not None:
            if not self._coming.cancel():
                self._coming.exception()  # whoever needs the weights reads them again, and meets the error
            self._coming, self._index = None, None

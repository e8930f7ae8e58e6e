"""The number of CPU threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sparsellm.arguments import COUNT_OF_THREADS, checked_arguments


@checked_arguments(threads=COUNT_OF_THREADS)
def use_threads(threads: int | None = None) -> None:
    """Sets the threads of torch, and so those of the kernels on packed weights; None leaves torch's choice.

    Raises:
        RecipeError: the number is not from 1 to 1,024.
    """
    if threads is not None:
        torch.set_num_threads(threads)


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    """Uses ``count`` threads inside the context, then restores the previous number."""
    before = torch.get_num_threads()
    use_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

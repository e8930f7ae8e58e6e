"""The number of CPU threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sparsellm.errors import RecipeError


def use_threads(count: int | None) -> None:
    """Sets the threads of torch, and so those of the kernels on packed weights; None leaves torch's choice.

    Raises:
        RecipeError: not 1 or more.
    """
    if count is None:
        return
    if count < 1:
        raise RecipeError(f"threads is {count}; it must be 1 or more")
    torch.set_num_threads(count)


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    """Uses ``count`` threads inside the context, and the former number after it."""
    before = torch.get_num_threads()
    use_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

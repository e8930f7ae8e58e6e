"""How many threads of the CPU are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sparsellm.errors import RecipeError


def use_threads(count: int | None) -> None:
    """Sets torch's threads, which the kernels on packed weights follow; None leaves torch's choice.

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
    """So many threads while this lasts."""
    before = torch.get_num_threads()
    use_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

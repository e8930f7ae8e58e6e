"""Being here, beside ``__init__.py``, it puts the repository root on ``sys.path``: ``from tests.models import ...``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread_for_tiny_models(request: pytest.FixtureRequest) -> Iterator[None]:
    """Handing out work costs a tiny model more than the work; on a busy machine, ten times more."""
    threads = torch.get_num_threads()
    if "slow" not in request.keywords:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

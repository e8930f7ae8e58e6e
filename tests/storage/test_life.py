"""Whatever happens to a directory: the older or the newer model is complete in it, and no foreign file has changed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from tests.models import save_tiny, tiny_llama
from tests.storage.lives import Life

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")


@pytest.mark.parametrize("first", [0, *(pytest.param(each, marks=pytest.mark.slow) for each in range(100, 600, 100))])
def test_lives(first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty in the fast suite, five hundred in the slow one."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # what a kill leaves does not depend on it
    model = tiny_llama(vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    dense = save_tiny(model.to(torch.bfloat16), None, tmp_path / "dense")
    results: dict[tuple[str, float, str | None], str | None] = {}
    ended: list[str] = []
    for seed in range(first, first + 100 if first else 20):
        (tmp_path / str(seed)).mkdir()
        life = Life(tmp_path / str(seed), dense, seed, 0.3 if first else 0.15, results)
        life.live(5)
        ended += [each.rpartition(": ")[2] if "Error" not in each else "refused" for each in life.done]
    assert {"done", "died", "refused"} <= set(ended)

"""Whatever happens to a directory: the older or the newer model is whole in it, and nobody else's file has changed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from tests.models import save_tiny, tiny_llama
from tests.storage.lives import Life

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_llama(vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    return save_tiny(model.to(torch.bfloat16), None, tmp_path_factory.mktemp("dense") / "dense")


def live(dense: Path, home: Path, seeds: range, signals: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # what a kill leaves does not depend on it
    results: dict[tuple[str, float, str | None], str | None] = {}
    ended: list[str] = []
    for seed in seeds:
        (home / str(seed)).mkdir()
        life = Life(home / str(seed), dense, seed, signals, results)
        life.live(5)
        ended += [each.rpartition(": ")[2] if "Error" not in each else "refused" for each in life.done]
    assert {"done", "died", "refused"} <= set(ended)


def test_twenty_lives(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live(dense, tmp_path, range(20), 0.15, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(20, 520, 100))
def test_five_hundred_lives(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    live(dense, tmp_path, range(first, first + 100), 0.3, monkeypatch)

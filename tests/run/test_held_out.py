"""A run ends with its divergence and perplexity on text that it was not calibrated on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import sparsellm
from sparsellm.run.held_out import MOST_WINDOWS
from tests.models import save_tiny, tiny_llama, tiny_tokenizer

WINDOW = 24
SETTINGS: dict[str, Any] = {"samples": 4, "seq_len": WINDOW, "effort": 0}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model and a text."""
    place = tmp_path_factory.mktemp("home")
    save_tiny(tiny_llama(), tiny_tokenizer(), place / "dense")
    lines = (f"Line {n} of {n * 7919 % 1009} about {n * 31 % 97}." for n in range(300))
    (place / "text.txt").write_text("\n".join(lines))
    return place


def prune(home: Path, out: Path, **more: Any) -> sparsellm.PruneResult:
    settings = {**SETTINGS, **more, "calibration": str(home / "text.txt")}
    return sparsellm.prune(home / "dense", settings, out=out)


@pytest.mark.parametrize("effort", [0, 1])
@pytest.mark.parametrize("memory", [None, "1GiB"])
def test_it_is_what_eval_measures_of_the_checkpoint(
    home: Path, tmp_path: Path, effort: int, memory: str | None
) -> None:
    result = prune(home, tmp_path / "out", effort=effort, memory=memory)
    measured = result.held_out
    assert measured is not None
    evaluation = sparsellm.evaluate(
        tmp_path / "out",
        measured.text,
        seq_len=WINDOW,
        max_tokens=MOST_WINDOWS * WINDOW,
        against=home / "dense",
    )
    assert evaluation.against is not None
    assert measured.kl == pytest.approx(evaluation.against.kl, rel=1e-5)
    assert measured.agreement == evaluation.against.agreement
    assert measured.perplexity == pytest.approx(evaluation.value, rel=1e-6)
    dense = evaluation.against.perplexity.value
    assert measured.dense_perplexity == pytest.approx(dense, rel=1e-6)
    assert measured.kl > 0
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert record["held_out"]["kl"] == measured.kl


def test_a_model_in_memory_is_measured_as_its_checkpoint(
    home: Path, tmp_path: Path
) -> None:
    """Its dense weights are overwritten by the run."""
    settings = {**SETTINGS, "calibration": str(home / "text.txt")}
    model = tiny_llama()
    result = sparsellm.prune(model, settings, tokenizer=tiny_tokenizer())
    stored = prune(home, tmp_path / "out")
    assert result.held_out is not None
    assert stored.held_out is not None
    assert result.held_out.kl == pytest.approx(stored.held_out.kl, rel=1e-4)


def test_a_model_without_a_tokenizer_reads_no_text() -> None:
    ids = tiny_tokenizer()("a b c d e f g h " * 8, return_tensors="pt")["input_ids"]
    recipe = sparsellm.Recipe(method="magnitude")
    result = sparsellm.prune(tiny_llama(), recipe, calibration=ids)
    assert result.held_out is None

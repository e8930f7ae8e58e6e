"""Evaluation of checkpoints against a plain computation with transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import DataError
from tests.models import save_tiny, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokenizer adds BOS by itself."""
    return save_tiny(tiny_llama(), tiny_tokenizer(add_bos=True), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text(" ".join(f"{number} {number * 7919}" for number in range(60)))
    return path


def losses_by_hand(windows: torch.Tensor, model: Any) -> torch.Tensor:
    """The losses of the tokens after the first of each window, ``(windows, T - 1)``, in fp64."""
    with torch.no_grad():
        log_p = model(input_ids=windows).logits.double().log_softmax(-1)
    return -log_p[:, :-1].gather(-1, windows[:, 1:, None]).squeeze(-1)


def by_hand(text: Path, bos: bool, window: int = 16) -> torch.Tensor:
    """The windows of a text, ``(windows, window)``."""
    ids = tiny_tokenizer()(text.read_text())["input_ids"]
    if not bos:
        ids = [0, *ids]  # as the tokenizer's defaults have it, at the start of the text
        return torch.tensor(ids[: len(ids) // window * window]).view(-1, window)
    rows = torch.tensor(ids[: len(ids) // (window - 1) * (window - 1)]).view(-1, window - 1)
    return torch.cat([torch.zeros(len(rows), 1, dtype=torch.int64), rows], dim=1)


@pytest.mark.parametrize(("bos", "led"), [("auto", True), ("yes", True), ("no", False)])
def test_bos_begins_every_window_and_is_not_scored(llama: Path, text: Path, bos: Any, led: bool) -> None:
    windows = by_hand(text, led)
    found = sparsellm.evaluate(llama, text, seq_len=16, bos=bos)
    assert found.tokens == windows.shape[0] * 15
    assert found.value == pytest.approx(math.exp(losses_by_hand(windows, tiny_llama()).mean()), rel=1e-5)


def test_a_tokenizer_without_bos_is_refused_before_the_work(tmp_path: Path, text: Path, run: Any) -> None:
    tokenizer = type(tiny_tokenizer())(tokenizer_object=tiny_tokenizer().backend_tokenizer, pad_token="</s>")
    model = save_tiny(tiny_llama(), tokenizer, tmp_path / "model")
    out = tmp_path / "out"
    for arguments in (("eval", model, "--text", text), ("prune", model, "--calibration", text, "--out", out)):
        code, _, stderr = run(*arguments, "--seq-len", 16, "--bos", "yes")
        assert code == 2
        assert len(stderr.splitlines()) == 1
        assert "no beginning-of-text token; give bos 'auto' or 'no'" in stderr
    assert not out.exists()


@pytest.mark.parametrize(("bos", "said"), [("auto", "yes"), ("no", "no")])
def test_pruning_says_how_its_windows_begin(llama: Path, text: Path, tmp_path: Path, bos: Any, said: str) -> None:
    recipe = Recipe(method="magnitude", calibration=str(text), samples=3, seq_len=16, bos=bos)
    sparsellm.prune(llama, recipe, out=tmp_path / "out")
    report = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert report["calibration_bos"] == said
    assert report["recipe"]["bos"] == bos


def test_token_ids_are_calibrated_on_as_they_are(llama: Path, text: Path, tmp_path: Path) -> None:
    ids = by_hand(text, bos=True)
    with pytest.raises(DataError, match="token ids are used as they are"):
        sparsellm.prune(llama, Recipe(bos="no"), calibration=ids, out=tmp_path / "out")
    assert sparsellm.prune(tiny_llama(), Recipe(method="magnitude"), calibration=ids).calibration_bos == "given"

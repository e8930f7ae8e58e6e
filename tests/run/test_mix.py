"""Runs whose calibration text is mixed with Python's: by default, by share, not at all, and resumed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import DataError, StorageError
from sparsellm.text import python_text
from sparsellm.text.python_text import DOCUMENTATION, SOURCE_CODE
from tests.files.small import tensors_of
from tests.killing import stop_after_one
from tests.models import save_tiny, tiny_llama, tiny_tokenizer
from tests.text.tokenizers import words_tokenizer

SETTINGS: dict[str, Any] = {
    "method": "wanda",
    "samples": 16,
    "seq_len": 24,
    "seed": 3,
}
CHAT = [
    {"role": "user", "content": "what is it"},
    {"role": "assistant", "content": "a name"},
]


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "numbers.txt"
    file.write_text(" ".join(f"{number} {number * 7919}" for number in range(3000)))
    return str(file)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tiny_llama(), tiny_tokenizer(), tmp_path / "model")


def record_of(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / "pruning.json").read_text())
    return record


def test_a_file_is_mixed_by_default_and_the_record_says_so(
    model: Path, text: str, tmp_path: Path
) -> None:
    for name, mix in (
        ("default", {}),
        ("same", {"mix": 0.125}),
        ("alone", {"mix": 0}),
    ):
        recipe = Recipe(**SETTINGS, calibration=text, **mix)
        sparsellm.prune(model, recipe, out=tmp_path / name)
    default = record_of(tmp_path / "default")
    assert default["recipe"]["mix"] == 0.125
    assert default["identity"]["python_text"] == python_text.python_digest()
    assert default["identity"] == record_of(tmp_path / "same")["identity"]
    alone = record_of(tmp_path / "alone")
    assert alone["recipe"]["mix"] == 0
    assert alone["identity"]["python_text"] == ""
    tokens = [record["identity"]["calibration_tokens"] for record in (default, alone)]
    assert tokens[0] != tokens[1]
    weights = [tensors_of(tmp_path / name) for name in ("default", "same", "alone")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not all(torch.equal(weights[0][key], weights[2][key]) for key in weights[0])
    card = (tmp_path / "default" / "README.md").read_text()
    assert "12.5 % of the windows from Python's documentation and source code" in card


def test_a_sweep_reports_the_divergence_of_each_part(
    model: Path, text: str, tmp_path: Path
) -> None:
    settings = {**SETTINGS, "method": "sparsellm", "samples": 32, "effort": 1}
    recipe = Recipe(**settings, calibration=text, mix=0.5)
    result = sparsellm.prune(model, recipe, out=tmp_path / "out")
    for swept in result.sweeps:
        assert swept.sources.keys() == {"numbers.txt", DOCUMENTATION, SOURCE_CODE}
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"held out of {SOURCE_CODE}" in page


def test_another_python_text_does_not_resume_a_run(
    model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(**SETTINGS, calibration=text)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        sparsellm.prune(model, recipe, out=out, progress=stop_after_one("prune"))
    kept = python_text._code_pieces()
    monkeypatch.setattr(python_text, "_code_pieces", lambda: ["pass\n", *kept])
    with pytest.raises(StorageError, match="python_text is"):
        sparsellm.prune(model, recipe, out=out)
    monkeypatch.undo()
    assert sparsellm.prune(model, recipe, out=out).resumed == 1


def test_a_tokenizer_that_cannot_read_it_is_told_or_refused(
    text: str, tmp_path: Path
) -> None:
    digits = words_tokenizer(*(str(number) for number in range(299)))
    model = save_tiny(tiny_llama(), digits, tmp_path / "digits")
    recipe = Recipe(**SETTINGS, calibration=text)
    result = sparsellm.prune(model, recipe, out=tmp_path / "out")
    assert result.recipe.mix == 0
    said = "calibrated on the text alone (mix 0), because the tokenizer does not know"
    assert any(warning.startswith(said) for warning in result.warnings)
    with pytest.raises(DataError, match=r"mix 0\.3: the tokenizer does not know"):
        sparsellm.prune(model, recipe, mix=0.3, out=tmp_path / "other")


def test_conversations_are_mixed_and_token_ids_are_not(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    model = save_tiny(tiny_llama(), tokenizer, tmp_path / "model")
    chats = [{"messages": CHAT}] * 300
    recipe = Recipe(**SETTINGS)
    mixed = sparsellm.prune(model, recipe, calibration=chats, out=tmp_path / "chat")
    assert mixed.recipe.mix == 0.125
    ids = torch.arange(96).view(4, 24)
    plain = sparsellm.prune(model, recipe, calibration=ids, out=tmp_path / "ids")
    assert plain.recipe.mix == 0
    with pytest.raises(
        DataError, match=r"mix 0\.5 adds text, and calibration is token ids"
    ):
        sparsellm.prune(model, recipe, mix=0.5, calibration=ids, out=tmp_path / "no")


def test_eval_says_that_pydoc_is_of_a_kind_that_calibrated(
    model: Path, text: str, tmp_path: Path, run: Any
) -> None:
    said = "calibrated on other text of this kind, which flatters"
    for mix, told in ((0.5, True), (0, False)):
        out = tmp_path / f"out-{mix}"
        sparsellm.prune(model, Recipe(**SETTINGS, calibration=text, mix=mix), out=out)
        line = ("eval", out, "--text", "pydoc", "--seq-len", 24, "--max-tokens", 96)
        assert (said in run(*line, exits=0)[2]) is told
        card = (out / "README.md").read_text()
        assert ("other text of this kind was in the calibration" in card) is told


@pytest.mark.parametrize("source", ["pydoc", "self"])
def test_a_built_in_text_is_mixed_if_asked(
    source: str, model: Path, tmp_path: Path
) -> None:
    digests = {}
    for mix in (None, 0.5):
        recipe = Recipe(**SETTINGS, calibration=source, mix=mix)
        out = tmp_path / f"out-{mix}"
        assert sparsellm.prune(model, recipe, out=out).recipe.mix == (mix or 0)
        identity = record_of(out)["identity"]
        digests[mix] = identity["calibration_tokens"]
        assert bool(identity["python_text"]) is (mix is not None)
    assert digests[None] != digests[0.5]

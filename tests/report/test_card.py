"""The model card: what it says, what it never overwrites, and that no text in it is markup."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import StorageError
from sparsellm.records import Pruning
from sparsellm.report.card import base_of, card, card_text, is_unedited
from tests.method.allocation.helpers import IDS
from tests.models import save_tiny, tiny_llama, tiny_tokenizer
from tests.report.pages import EVALUATION, write_results


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    """Pruned from a snapshot of the hub, whose card states a license."""
    source = save_tiny(
        tiny_llama(),
        tiny_tokenizer(),
        tmp_path / "models--some--model" / "snapshots" / "0123",
    )
    (source / "README.md").write_text(
        "---\nlicense: llama3.2\nlicense_link: [x]\nlanguage: en\n---\n# A dense model\n"
    )
    recipe = Recipe(method="magnitude", pattern="2:4", exclude=["*.k_proj"])
    return sparsellm.prune(source, recipe, out=tmp_path / "half", calibration=IDS).path


def test_prune_writes_a_card_that_the_reader_of_the_hub_reads(pruned: Path) -> None:
    card = ModelCard.load(pruned / "README.md")
    assert card.data.base_model == "some/model"
    assert card.data.library_name == "transformers"
    assert card.data.license == "llama3.2"
    assert {"sparsellm", "pruning", "sparsity", "sparsity-2:4"} <= set(card.data.tags)
    assert "https://huggingface.co/some/model" in card.text
    assert "Not evaluated yet" in card.text
    assert "# `some/model`: 47.62% zeros, 2:4\n" in card.text
    report = json.loads((pruned / "pruning.json").read_text())
    assert f"{report['sparsity_reached']:.2%} of the weights" in " ".join(
        card.text.split()
    )
    assert {"model": "some/model", "license": "llama3.2"}.items() <= report[
        "base"
    ].items()
    assert yaml.safe_load(card.text.partition("```yaml\n")[2].partition("```")[0])[
        "exclude"
    ] == ["*.k_proj"]
    assert is_unedited(pruned / "README.md")


def test_the_python_of_a_card_loads_the_checkpoint(
    pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pruned.parent)
    sparsellm.pack("half", out="small", values="int8")
    first = (pruned.parent / "small" / "README.md").read_text()
    write_results(pruned.parent / "small", EVALUATION)
    card(pruned.parent / "small")
    for name in ("half", "small"):
        text = (pruned.parent / name / "README.md").read_text()
        code = text.partition("```python\n")[2].partition("```")[0]
        assert ("import sparsepack" in code) == (name == "small")
        assert "pip install sparsellm" not in text
        made: dict[str, Any] = {}
        exec(code.replace("path/to/this/checkpoint", name), made)
        assert (
            made["model"](made["tokenizer"]("Hello", return_tensors="pt")["input_ids"])
            .logits.isfinite()
            .all()
        )
    assert all(
        part in text and part in first
        for part in ("weights are packed", "| packed values | int8 |")
    )


def test_a_card_has_the_results_with_their_protocol(pruned: Path) -> None:
    write_results(
        pruned,
        {**EVALUATION, "tasks": None},
        {**EVALUATION, "tasks": {"arc_easy": {"acc,none": {"value": 0.5}}}},
        EVALUATION,
        {**EVALUATION, "protocol": {**EVALUATION["protocol"], "window": 64}},
    )
    assert card(pruned) == pruned / "README.md"
    text = (pruned / "README.md").read_text()
    assert (
        "On `wikitext2`: windows of 512 tokens, each begins with BOS; 4,088 tokens scored."
        in text
    )
    assert "| | dense (`dense`) | pruned |" in text
    assert "| perplexity | 12.5 (12.1–12.9) | 14.37 (13.9–14.9) |" in text
    assert "| KL(dense ‖ pruned), nats a token | 0 | 0.123 (0.1–0.15) |" in text
    assert (
        "| same likeliest token | 100% | 81.0% |\n| recovery | 100% | 90.0% |\n" in text
    )
    assert "| `arc_easy`, `acc,none` |  | 0.61 ± 0.01 |" in text
    assert "windows of 64 tokens" in text
    # a later measurement of the same replaces the first
    assert text.count("windows of 512 tokens") == 1
    assert not any(part in text for part in ("/home/me", "Not evaluated"))
    card(pruned)  # its own card is replaced again and again
    narrow = EVALUATION | {"protocol": EVALUATION["protocol"] | {"window": 96}}
    sparsellm.keep_results(pruned, [sparsellm.Evaluation(**narrow)])
    assert "windows of 96 tokens" in (pruned / "README.md").read_text()


def test_what_was_never_pruned_or_evaluated_has_no_new_card(
    pruned: Path,
) -> None:
    before = (pruned / "README.md").read_bytes()
    said = {
        pruned.parent: "has no pruning.json; give a directory that",
        pruned: "was never evaluated; run `sparsellm",
    }
    for directory, part in said.items():
        with pytest.raises(StorageError) as refused:
            card(directory)
        assert part in str(refused.value)
    with pytest.raises(StorageError, match=r"has no pruning\.json"):
        sparsellm.keep_results(pruned.parent, [sparsellm.Evaluation(**EVALUATION)])
    assert not (pruned.parent / "results.json").exists()
    assert (pruned / "README.md").read_bytes() == before


def test_an_edited_card_is_kept(pruned: Path, llama: Path, run: Any) -> None:
    write_results(pruned, EVALUATION)
    readme = pruned / "README.md"
    edited = readme.read_text().replace("Not evaluated yet", "Excellent")
    readme.write_text(edited)
    with pytest.raises(StorageError, match="or was edited since; move it away"):
        card(pruned)
    line = ("eval", pruned, "--text", "pydoc", "--seq-len", 32, "--max-tokens", 64)
    stderr = run(*line, exits=0)[2]
    assert "note: the card is not written again: " in stderr
    assert readme.read_text() == edited
    readme.unlink()
    run(*line, exits=0)
    assert "14.37" in readme.read_text()


def test_what_is_not_a_file_is_kept(pruned: Path) -> None:
    write_results(pruned, EVALUATION)
    readme = pruned / "README.md"
    for make in (
        lambda: os.mkfifo(readme),
        lambda: readme.symlink_to(pruned / "none"),
        readme.mkdir,
    ):
        readme.unlink()
        make()
        with pytest.raises(StorageError, match="README"):
            card(pruned)
        assert not readme.is_file()


def test_texts_of_others_are_no_markup(pruned: Path) -> None:
    evil = "<img src=x onerror=alert(1)> | `x` ``` [a](javascript:b)\n# heading"
    task = {evil: {"acc": {"value": 1.0, "stderr": None}}}
    write_results(
        pruned,
        {
            **EVALUATION,
            "protocol": {**EVALUATION["protocol"], "text": evil},
            "tasks": task,
        },
    )
    report = json.loads((pruned / "pruning.json").read_text())
    report["recipe"]["method"] = report["recipe"]["calibration"] = evil
    report["base"] = {"model": "a/b](javascript:c)", "license": evil}
    (pruned / "pruning.json").write_text(json.dumps(report))
    lines = card(pruned).read_text().splitlines()
    assert not any(line.startswith("# heading") for line in lines)
    assert not any("javascript:c" in line for line in lines)
    tables = [line for line in lines if line.startswith("|") and "onerror" in line]
    assert len(tables) == 3
    for line in tables:
        assert line.count("|") == (4 if "`acc`" in line else 3)
        assert "```` <img" in line
        assert " ````" in line.partition("<img")[2]
    # quoted, in the front matter
    assert ModelCard.load(pruned / "README.md").data.license.startswith("<img")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("owner/name", "owner/name"),
        ("name", None),
        ("./owner/name", None),
        ("/a/b", None),
        ("x" * 5000, None),
    ],
)
def test_the_base_model_is_a_name_of_the_hub_or_unknown(
    name: str, known: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert base_of(name, tmp_path).get("model") == known
    model = tiny_llama()
    model.name_or_path = name
    assert base_of(model, None).get("model") == known
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert base_of("demo", tmp_path) == {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": "apache-2.0",
    }
    assert base_of("owner/name", tmp_path) == {}  # a directory of that name


@pytest.mark.parametrize(
    "card", [b"\xff\xfe", b"---\nlicense: [\n---\n", b"---\n- a\n---\n"]
)
def test_an_unreadable_card_of_the_dense_model_states_no_license(
    card: bytes, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_bytes(card)
    assert base_of("x", tmp_path) == {}


def test_a_card_has_the_divergence_that_the_sweep_measured() -> None:
    linear = {"name": "a.0.b", "shape": [2, 8], "zeros": 4}
    sweeps = [{"passes": 0, "held_out": 0.5}, {"passes": 1, "held_out": 0.25}]
    run = Pruning.model_validate(
        {
            "sparsity_asked": 0.25,
            "linears": [linear],
            "sweeps": sweeps,
            "values": "int8",
            "bits_per_weight": 4.87,
        }
    )
    text = card_text(run)
    assert "# `a model from memory`: 25% zeros, int8, 4.9 bits a weight\n" in text
    assert "held-out calibration windows | 0.25 nats a token |\n| calibrated" in text

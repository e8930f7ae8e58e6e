"""The scripts behind the tables, on tiny models: that they say what is so. Their times are nobody's business here."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsepack.bench import resident_bytes
from tests.models import save_tiny, tiny_llama, tiny_tokenizer
from tests.models.pruned import prune_tiny

SCRIPTS = Path(__file__).parent.parent / "benchmarks"
SVG = "{http://www.w3.org/2000/svg}"
pytest.importorskip("gensim")


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    model = prune_tiny(tiny_llama())
    model.get_input_embeddings().weight.data[5:9] = 0  # type: ignore[operator]  # no zeros that pruning made
    return save_tiny(model, tiny_tokenizer(), tmp_path / "pruned")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(
        "\n".join(
            f"Line {line} of a text that is neither long nor about anything."
            for line in range(80)
        )
    )
    return path


@pytest.fixture
def printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """What a script prints when it runs with some words."""

    def run(script: str, *words: object) -> str:
        monkeypatch.syspath_prepend(str(SCRIPTS))
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        threads = torch.get_num_threads()
        try:
            runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        finally:
            torch.set_num_threads(threads)
        return capsys.readouterr().out

    return run


def rows_of(output: str, key: int = 0) -> dict[str, list[str]]:
    """The rows under the heading of a printed table: the name in one column -> the cells after it."""
    lines = [line for line in output.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    return {row[key]: row[key + 1 :] for row in rows}


def test_the_forms_of_a_model_are_counted_and_scored(
    pruned: Path, text: Path, tmp_path: Path, printed: Any
) -> None:
    common = (
        "--window",
        "16",
        "--windows",
        "4",
        "--new-tokens",
        "2",
        "--prompt-tokens",
        "3",
        "--repeats",
        "1",
    )
    output = printed(
        "instead.py", "--text", text, "--model", pruned, "--pruned", f"0.6={pruned}", *common,
        "--values", "keep", "int8", "--skip", "torchao", "--out", tmp_path / "out",
    )  # fmt: skip
    rows = rows_of(output)
    dense = {"dense fp32", "dense bf16", "dense bf16 by transformers"}
    assert rows.keys() == dense | {"packed 60%, keep", "packed 60%, int8"}
    megabytes = (
        resident_bytes(AutoModelForCausalLM.from_pretrained(pruned), linears_only=True)
        / 1e6
    )
    assert float(rows["dense fp32"][0]) == pytest.approx(megabytes, abs=0.05)
    assert [float(rows[name][1]) for name in ("dense fp32", "dense bf16")] == [32, 16]
    assert float(rows["packed 60%, int8"][1]) < float(rows["packed 60%, keep"][1]) < 16
    assert float(rows["packed 60%, keep"][4]) == pytest.approx(
        float(rows["dense fp32"][4]), rel=1e-3
    )


def test_calibrations_are_scored_on_every_text(
    llama: Path, text: Path, tmp_path: Path, printed: Any
) -> None:
    line = (
        "mixing.py", "--model", llama, "--text", f"one={text}", "two=pydoc", "--samples", 8, "--window", 16,
        "--calibration", f"alone={text}", f"quarter={text}:3,pycode:1",
        "--max-tokens", 64, "--targets", "0.5", "--efforts", 0, "--cells", tmp_path / "cells.json",
    )  # fmt: skip
    output = printed(*line)
    kept = json.loads((tmp_path / "cells.json").read_text())
    assert all(str(tmp_path) not in key for key in kept if "/dense" not in key[-6:])
    scores = {key.count("pycode"): cell for key, cell in kept.items() if "/0.5/" in key}
    assert scores[0]["two"] != scores[1]["two"]
    for number, name in enumerate(("alone", "quarter")):
        values = f"{scores[number]['one']:.1f} | {scores[number]['two']:.1f}"
        assert f"| 0.5, 0 | {name} | {values} |" in output
    assert len(kept) == 3
    assert printed(*line) == output  # from the cells


def test_the_frontier_counts_scores_and_draws_every_form(
    llama: Path, text: Path, tmp_path: Path, printed: Any
) -> None:
    output = printed(
        "frontier.py", "--text", text, "--model", llama, "--calibration", text, "--samples", 8, "--window", 16,
        "--max-tokens", 64, "--effort", 0, "--cells", tmp_path / "cells.json", "--picture", tmp_path / "frontier.svg",
        "--forms", "sparsellm 50% int8", "sparsellm 50% int4", "sparsellm 0% int8",
    )  # fmt: skip
    rows = rows_of(output)
    assert rows.keys() == {
        "sparsellm 0% int8",
        "sparsellm 50% int8",
        "sparsellm 50% int4",
    }
    bits, divergences = (
        {name: float(row[column]) for name, row in rows.items()} for column in (1, 2)
    )
    assert bits["sparsellm 50% int4"] < bits["sparsellm 50% int8"]
    assert 0 < divergences["sparsellm 0% int8"] < divergences["sparsellm 50% int8"]
    # the best, and the smallest
    assert rows["sparsellm 0% int8"][4] == rows["sparsellm 50% int4"][4] == "yes"
    drawn = ElementTree.parse(tmp_path / "frontier.svg").getroot()
    assert {"50% int4", "50% int8", "0% int8"} <= {
        node.text for node in drawn.iter(f"{SVG}text")
    }

"""The script that repeats the paper's tables, on tiny models and local texts."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sparsellm
from tests.models import save_tiny, tiny_llama, tiny_opt, tiny_tokenizer

SCRIPTS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("family", [tiny_opt, tiny_llama], ids=lambda one: one.__name__)
def test_the_papers_tables_go_on_after_a_stop(
    family: Callable[[], Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = tmp_path / "text.txt"
    lines = (f"Line {line} of a text that is about nothing." for line in range(80))
    text.write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def printed(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        runpy.run_path(str(SCRIPTS / "paper.py"), run_name="__main__")
        return capsys.readouterr().out

    source = save_tiny(family(), tiny_tokenizer(), tmp_path / "model")
    words = (
        "paper.py", source, "--published-as", "facebook/opt-125m", "--out", tmp_path / "out", "--calibration", text,
        "--texts", f"wikitext2={text}", f"c4={text}", "--samples", 4, "--window", 16, "--max-tokens", 64,
        "--targets", "70%", "3:4", "--methods", "wanda", "effort 0",
    )  # fmt: skip
    runs: list[str] = []
    prune = sparsellm.prune

    def stopped(model: str, recipe: Any, *, out: Path) -> Any:
        runs.append(out.name)
        if len(runs) == 3:
            raise KeyboardInterrupt
        return prune(model, recipe, out=out)

    monkeypatch.setattr(sparsellm, "prune", stopped)
    with pytest.raises(KeyboardInterrupt):
        printed(*words)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in printed(*words).splitlines()
        if line.startswith("| ")
    ][1:]
    cells = [
        f"{layers}-{target}-{method}"
        for layers in ("all", "half")
        for target in ("70", "3of4")
        for method in ("wanda", "effort-0")
    ]
    assert runs == [*cells[:3], *cells[2:]]  # the third was stopped
    perplexities = {tuple(row[:3]): float(row[3]) for row in rows}
    assert len(perplexities) == len(cells)
    by_hand = prune(
        source,
        sparsellm.Recipe(
            method="wanda",
            pattern="1:4",
            only=["*layers.0.*"],
            calibration=str(text),
            samples=4,
            seq_len=16,
            bos="no",
        ),
        out=tmp_path / "by-hand",
    )
    assert by_hand.path is not None
    judged = sparsellm.evaluate(
        by_hand.path, str(text), seq_len=16, max_tokens=64, bos="no"
    )
    assert perplexities["half", "3:4", "wanda"] == pytest.approx(
        judged.perplexity.value, abs=0.005
    )
    # 70 % of all layers of OPT 125M, by table 10 of 2601.09176
    published = {tuple(row[:3]): row[5] for row in rows}
    assert published["all", "70%", "wanda"] == "–, –"
    assert "172.85" not in published["all", "70%", "effort 0"]
    plans = printed(*words, "--plan", "h100")
    assert plans.count("\n| all |") + plans.count("\n| half |") == len(cells)

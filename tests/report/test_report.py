"""The report of one run: what it says, that it loads nothing, and what it refuses."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from html import escape
from pathlib import Path
from typing import Any

import pytest

from sparsellm import Recipe, prune
from sparsellm.errors import MissingExtraError, StorageError
from sparsellm.report import document
from sparsellm.report.checkpoint import read_checkpoint
from sparsellm.report.document import write_report
from sparsellm.run.result import PruneResult
from tests.models import tiny_llama, windows
from tests.report.pages import LOADS, Page, page_of, results, rewrite

SMALL: dict[str, Any] = {
    "samples": 4,
    "seq_len": 32,
    "method": "wanda",
    "sparsity": 0.5,
}


@pytest.fixture(scope="module")
def opt(runs: Path) -> Page:
    """The report that prune wrote by itself."""
    return page_of(runs / "opt" / "report.html")


@pytest.fixture(scope="module")
def half(runs: Path) -> Page:
    return page_of(write_report(runs / "half"))


def test_nothing_is_loaded_from_anywhere(opt: Page, half: Page) -> None:
    for page in (opt, half):
        for element in page.elements:
            for name in LOADS:
                assert element.attributes.get(name, "#").startswith(("#", "data:")), (
                    element
                )
        assert not re.search(r"@import|url\(", page.one("style").text)
        policy = page.one(
            "meta", **{"http-equiv": "Content-Security-Policy"}
        ).attributes["content"]
        assert policy.startswith("default-src 'none'; script-src 'sha256-")
        script = page.all("script")[-1]
        allowed = base64.b64encode(
            hashlib.sha256("".join(script.parts).encode()).digest()
        ).decode()
        assert (script.attributes, f"'sha256-{allowed}'" in policy) == ({}, True)
        assert "unsafe-inline" not in policy.split("style-src")[0]


def test_every_chart_has_a_text_and_a_table(opt: Page) -> None:
    charts = opt.all("div", role="img")
    ids = {element.attributes.get("id"): element for element in opt.elements}
    assert {chart.attributes["data-figure"] for chart in charts} == opt.figures().keys()
    for chart in charts:
        assert ids[chart.attributes["aria-labelledby"]].text
        assert len(ids[chart.attributes["aria-describedby"]].text) > 20
    assert len(opt.all("details")) == len(charts)
    assert {
        link.attributes["href"].removeprefix("#") for link in opt.all("a")
    } <= ids.keys()


def test_it_shows_the_numbers_of_the_run(opt: Page, runs: Path) -> None:
    before = (runs / "opt" / "report.html").read_bytes()
    assert write_report(runs / "opt").read_bytes() == before  # rebuilt in its place
    pruning = json.loads((runs / "opt" / "pruning.json").read_text())
    linears = {linear["name"]: linear for linear in pruning["linears"]}
    header, *rows = opt.rows("Sparsity of each linear")
    assert header == ["block", "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    of_fc2 = [
        f"{linears[f'model.decoder.layers.{block}.fc2']['sparsity']:.1%}"
        for block in (0, 1)
    ]
    assert [row[6] for row in rows] == of_fc2
    header, *rows = opt.rows("Error of each linear")
    assert [row[6] for row in rows] == [
        f"{linears[f'model.decoder.layers.{b}.fc2']['error']:.3g}" for b in (0, 1)
    ]
    assert [row[1] for row in opt.rows("The sweep")[1:]] == [
        f"{sweep['held_out']:.4g}" for sweep in pruning["sweeps"]
    ]


def test_measurements_and_the_commands_for_those_that_are_missing(
    opt: Page, half: Page, runs: Path
) -> None:
    shown = half.one("table", **{"class": "headline"}).text
    for part in (
        "20 (19–21) 31.4 (28.26–34.54) × 1.57",
        "0.31 (0.3–0.32)",
        "71.0%",
        "63.7%",
        "0.51 ± 0.012",
    ):
        assert part in shown, part
    dense = "half-packed, batch 1, 2 threads, dense in float32"
    assert f"decoding, dense by the same decoder{dense} 20 33 × 1.65" in shown
    assert "decoding, dense by transformers 10 33 × 3.30" in shown
    assert "Weight files of halfzeros are stored" in shown
    assert re.search(r"Weight files of half-packedpacked [\d.]+ MB 1\.5 MB × ", shown)
    assert "not measured" not in shown
    assert (shown.count("wikitext2, window 64"), shown.count(dense)) == (1, 1)
    assert "auxiliary variables" not in half.source  # the method has none
    assert opt.one("table", **{"class": "headline"}).text.count("not measured") == 2
    commands = opt.one(
        "pre", **{"aria-label": "Commands that measure what is missing"}
    ).text
    assert "sparsellm eval opt --text pydoc --against dense-opt" in commands
    assert commands.endswith("sparsellm report opt")
    assert (
        "sparsellm bench opt-packed"
        in opt.one("pre", **{"aria-label": "Commands that pack and measure"}).text
    )
    assert not half.all("pre", **{"aria-label": "Commands that pack and measure"})


def test_text_of_users_and_models_is_text(half: Page, copied: Path) -> None:
    assert [quote.text for quote in half.all("blockquote")] == [
        "two </script><script>alert(1)</script>",
        "three",
    ]
    assert len(half.all("script")) == 3
    evil = "</script><img src=x onerror=alert(1)>"
    linears = json.loads((copied / "pruning.json").read_text())["linears"]
    linears[0]["name"] = f"model.layers.0.{evil}"
    rewrite(
        copied / "pruning.json",
        linears=linears,
        command=evil,
        warnings=[evil],
        environment={evil: evil},
    )
    page = page_of(write_report(copied))
    assert len(page.all("script")) == 3
    assert not page.all("img")
    assert escape(evil) in page.figures()["sparsity-map"]["data"][0]["y"]
    assert page.source.count("onerror=alert(1)>") == 0


OPTIONAL = (
    "base", "environment", "memory", "seconds", "command", "recipe",
    "matrices", "dense", "versions", "sweeps", "allocation", "warnings",
)  # fmt: skip


def test_a_record_of_an_older_release_is_read(copied: Path) -> None:
    rewrite(copied / "pruning.json", **dict.fromkeys(OPTIONAL))
    (copied / "results.json").write_text(
        json.dumps(results(31.4, dense=None, benchmarks=[]))
    )
    page = page_of(write_report(copied))
    assert (
        "not measured 31.4 (28.26–34.54)"
        in page.one("table", **{"class": "headline"}).text
    )
    assert (
        "--against"
        in page.one(
            "pre", **{"aria-label": "Commands that measure what is missing"}
        ).text
    )
    assert page.one("h1").text == "a model: 50% zeros"
    assert page.figures().keys() == {"sparsity-map", "error-map", "allocation"}


def test_what_a_checkpoint_lacks_is_left_out(copied: Path) -> None:
    linears = json.loads((copied / "pruning.json").read_text())["linears"]
    linears[0]["error"], linears[1]["error"] = float("nan"), float("inf")
    rewrite(copied / "pruning.json", linears=linears)
    page = page_of(write_report(copied))
    assert page.figures()["error-map"]["data"][0]["z"][0][0] is None
    assert page.rows("Error of each linear")[1][1] == "–"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "pruning.json",
            None,
            "has no pruning.json; give a directory that `sparsellm prune` wrote",
        ),
        ("pruning.json", '{"sparsity_asked": 0.5, "linears": []}', "linears is []"),
        ("results.json", '{"format": 2}', "format is 2"),
    ],
)
def test_files_that_are_wrong(
    name: str, content: str | None, said: str, copied: Path, refusal: Any
) -> None:
    (copied / "report.html").unlink()
    (copied / name).unlink()
    if content is not None:
        (copied / name).write_text(content)
    before = sorted(copied.iterdir())
    assert said in refusal("report", copied)
    assert sorted(copied.iterdir()) == before


@pytest.mark.parametrize(
    "place",
    ["a file.html", "nowhere", "", "new.pdf", "link.html", "dangling.html", None],
)
def test_places_that_are_refused(
    place: str | None, copied: Path, tmp_path: Path, refusal: Any
) -> None:
    (tmp_path / "a file.html").write_text("mine")
    (tmp_path / "a folder").mkdir()
    (tmp_path / "link.html").symlink_to(tmp_path / "a file.html")
    (tmp_path / "dangling.html").symlink_to(tmp_path / "nothing")
    (copied / "report.html").write_text("mine")
    out = (
        tmp_path / place / "x.html"
        if place == "nowhere"
        else tmp_path / place
        if place
        else ""
    )
    said = refusal("report", copied, *([] if place is None else ["--out", out]))
    assert ("is not the name of a page" in said) == (place == "new.pdf")
    assert not (tmp_path / "new.pdf").exists()
    assert (
        (tmp_path / "a file.html").read_text()
        == (copied / "report.html").read_text()
        == "mine"
    )
    assert not (tmp_path / "nothing").exists()


def pruned(runs: Path, out: Path) -> tuple[PruneResult, str]:
    """A run and what it says."""
    notes: list[str] = []
    recipe = Recipe(**{**SMALL, "method": "magnitude"})
    result = prune(
        runs / "dense-llama",
        recipe,
        out=out,
        progress=lambda event: notes.append(event.detail),
    )
    return result, "\n".join(notes)


def test_a_file_that_appears_is_not_replaced(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.html"

    def appears(folder: Path) -> None:
        page.write_text("mine")

    monkeypatch.setattr("sparsellm.report.document.listed_files", appears)
    with pytest.raises(StorageError, match="html appeared"):
        write_report(runs / "half", page)
    assert page.read_text() == "mine"


def test_without_the_extra_a_checkpoint_is_whole(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document._library.cache_clear()
    monkeypatch.setitem(sys.modules, "plotly", None)
    result, said = pruned(runs, tmp_path / "p")
    assert result.report is None
    assert not (tmp_path / "p" / "report.html").exists()
    missing = "a report needs the package plotly: pip install plotly; afterwards"
    assert (
        f"report.html was not written: {missing} `sparsellm report {tmp_path / 'p'}`"
        in said
    )
    with pytest.raises(MissingExtraError, match="pip install plotly"):
        write_report(tmp_path / "p")
    assert "<table>" in result._repr_html_()


def test_a_failed_report_costs_no_checkpoint(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document, "render_run", lambda *_: 1 / 0)
    assert (
        "report.html was not written: ZeroDivisionError: division by zero; afterwards"
        in pruned(runs, tmp_path)[1]
    )
    assert (tmp_path / "config.json").is_file()


def test_the_result_in_a_notebook() -> None:
    result = prune(
        tiny_llama(),
        Recipe(method="wanda", sparsity=0.5),
        calibration=windows(4, 32, seed=0),
    )
    page = Page(result._repr_html_())
    assert page.all("script") == page.all("style") == []
    last = page.rows("wanda 50%: 50.0% zeros in the blocks")[-1]
    assert last[:3] == ["all pruned linears", f"{result.weights:,}", "50.0%"]


def test_experts_are_one_cell_of_a_block(copied: Path) -> None:
    linears = [
        {
            "name": f"model.layers.{b}.mlp.experts.{e}.w1",
            "shape": [2, 8],
            "zeros": 4 * e,
            "error": 0.1 * (e + 1),
        }
        for b in range(2)
        for e in range(4)
    ]
    rewrite(copied / "pruning.json", linears=linears)
    assert read_checkpoint(copied).pruning.blocks == [0, 1]
    page = page_of(write_report(copied))
    assert page.rows("Sparsity of each linear") == [
        ["block", "w1"],
        ["0", "37.5%"],
        ["1", "37.5%"],
    ]
    assert page.rows("Error of each linear")[1] == ["0", "0.25"]


def test_a_page_is_not_as_large_as_kinds_times_blocks(copied: Path) -> None:
    history = [{"iteration": step, "objective": 1.0} for step in range(3000)]
    more: dict[str, Any] = {
        "shape": [2, 2],
        "zeros": 2,
        "asked": 0.5,
        "error": 0.1,
        "history": history[:1],
    }
    linears = [
        {"name": f"model.layers.{number}.kind{number}", **more}
        for number in range(3000)
    ]
    linears[0]["history"] = history
    (copied / "pruning.json").write_text(
        json.dumps({"sparsity_asked": 0.5, "linears": linears})
    )
    page = write_report(copied, copied.parent / "page.html").read_text()
    assert len(page) < 20e6
    assert "2968 other kinds" in page


def test_the_first_table_has_what_the_run_measured_at_its_end(
    opt: Page, runs: Path
) -> None:
    measured = json.loads((runs / "opt" / "pruning.json").read_text())["held_out"]
    text = " ".join(opt.one("table", **{"class": "headline"}).text.split())
    dense = measured["dense_perplexity"]
    pruned = measured["perplexity"]
    assert f"{dense:.4g} {pruned:.4g} × {pruned / dense:.2f}" in text
    assert "held-out text: pydoc, 8 windows of 32" in text
    assert f" 0 {measured['kl']:.3g} " in text
    assert f"100% {measured['agreement']:.1%}" in text


def test_without_that_it_has_the_divergence_that_the_sweep_measured(
    copied: Path,
) -> None:
    sweeps = [{"passes": 0, "held_out": 0.321}, {"passes": 1, "held_out": 0.123}]
    rewrite(copied / "pruning.json", sweeps=sweeps, held_out=None)
    (copied / "results.json").unlink()
    page = page_of(write_report(copied))
    text = " ".join(page.one("table", **{"class": "headline"}).text.split())
    assert "held-out calibration windows 0 0.123" in text


def test_a_report_says_that_a_sweep_gained_nothing(copied: Path) -> None:
    sweeps = [{"passes": 0, "held_out": 0.1}, {"passes": 1, "held_out": 0.2}]
    rewrite(copied / "pruning.json", sweeps=sweeps)
    page = page_of(write_report(copied))
    assert (
        "the sweep gained nothing"
        in page.one("section", **{"aria-labelledby": "headline"}).text
    )

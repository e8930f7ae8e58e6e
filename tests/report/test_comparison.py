"""The comparison of several runs: the table, the reference line, and runs that do not compare."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sparsellm import pack
from sparsellm.errors import RecipeError, StorageError
from sparsellm.report.checkpoint import headline, read_checkpoint
from sparsellm.report.comparison import write_comparison
from tests.report.pages import page_of, results, rewrite

SUMMARY = "Quality, size and speed of each run"


def test_runs_side_by_side_with_the_dense_model(
    runs: Path, tmp_path: Path, run: Any
) -> None:
    out = tmp_path / "compare.html"
    _, stdout, stderr = run("report", runs / "half", runs / "nm", "--out", out, exits=0)
    assert (stdout.strip(), stderr) == (f"written to {out}", "")
    page = page_of(out)
    assert page.one("h1").text == "2 pruned versions of dense-llama"
    rows = page.rows(SUMMARY)
    assert [row[0] for row in rows] == ["run", "dense", "half", "nm"]
    assert [row[3] for row in rows[1:]] == ["20", "31.4", "41.2"]
    assert [row[8] for row in rows[1:]] == ["20", "33", "33"]
    assert rows[3][1] == "sparsegpt 2:4"
    figures = page.figures()
    assert {
        "quality-size",
        "quality-speed",
        "quality-sparsity",
        "depth-sparsity",
        "depth-error",
    } == figures.keys()
    size = figures["quality-size"]
    assert [trace["y"] for trace in size["data"]] == [[20.0], [31.4], [41.2]]
    assert (
        size["layout"]["shapes"][0]["y0"] == size["layout"]["shapes"][0]["y1"] == 20.0
    )
    assert (
        size["data"][1]["x"][0]
        == sum(f.stat().st_size for f in (runs / "half").glob("*.safetensors")) / 1e6
    )
    assert page.rows("Sparsity by block")[1] == ["0", "50.0%", "50.0%"]
    # a report of ours is replaced
    run("report", runs / "half", runs / "nm", "--out", out, exits=0)


def test_a_run_is_recommended_with_the_reason(runs: Path, tmp_path: Path) -> None:
    def advice(**constraints: Any) -> str:
        out = write_comparison(
            [tmp_path / "half", tmp_path / "nm"], tmp_path / "c.html", **constraints
        )
        return page_of(out).one("p", id="advice").text

    for name, recovery, kl, size in (
        ("half", 0.97, 0.1, 1_500_000),
        ("nm", 0.96, 0.2, 1_200_000),
    ):
        content = json.loads(
            Path(
                shutil.copytree(runs / name, tmp_path / name) / "results.json"
            ).read_text()
        )
        content["evaluations"][0]["against"] |= {"recovery": recovery, "kl": kl}
        content["benchmarks"][0]["packed_disk_bytes"] = size
        (tmp_path / name / "results.json").write_text(json.dumps(content))
    half, nm = (
        "half (97.0% recovery, 1.5 MB packed)",
        "nm (96.0% recovery, 1.2 MB packed)",
    )
    best = f"The best recovery is that of {half}."
    why = "it has the smallest size among the runs with a recovery of 95.0% or more"
    assert advice() == f"Take {nm}: {why}. {best}"
    rows = page_of(tmp_path / "c.html").rows("Best at each size")
    assert rows[1:] == [
        ["1.2 MB packed", "nm", "0.2", "96.0%"],
        ["1.5 MB packed", "half", "0.1", "97.0%"],
    ]
    assert advice(recover=0.98) == f"No run has a recovery of 98.0% or more. {best}"
    assert (
        advice(max_bytes=2 * 10**6)
        == f"Take {half}: it has the best recovery among the runs with at most 2.0 MB."
    )


def test_a_directory_called_dense_is_not_the_dense_model(
    runs: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs / "half", tmp_path / "dense")
    shutil.copytree(runs / "nm", tmp_path / "a<br>b")
    page = page_of(
        write_comparison([tmp_path / "dense", tmp_path / "a<br>b"], tmp_path / "c.html")
    )
    assert [row[0] for row in page.rows(SUMMARY)[1:]] == [
        "dense",
        "dense (2)",
        "a<br>b",
    ]
    stars = {
        trace["name"]: trace["marker"]["symbol"] == "star"
        for trace in page.figures()["quality-size"]["data"]
    }
    # Plotly's markup is text
    assert stars == {
        "dense": True,
        "dense (2)": False,
        "a&lt;br&gt;b": False,
    }


def test_quality_is_compared_by_one_protocol(
    runs: Path, copied: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs / "nm", tmp_path / "third")
    content = results(31.4)
    content["evaluations"][0]["protocol"]["window"] = 128
    (copied / "results.json").write_text(json.dumps(content))
    page = page_of(
        write_comparison([copied, runs / "nm", tmp_path / "third"], tmp_path / "c.html")
    )
    assert [row[3] for row in page.rows(SUMMARY)[2:]] == [
        "not measured",
        "41.2",
        "41.2",
    ]
    assert "window 64" in page.one("header").text
    assert len(page.figures()["quality-size"]["data"]) == 3


def test_divergences_from_another_model_do_not_stand_side_by_side(
    runs: Path, copied: Path, tmp_path: Path
) -> None:
    content = results(31.4)
    content["evaluations"][0]["against"] |= {
        "model": "other",
        "perplexity": {"value": 99.0},
    }
    (copied / "results.json").write_text(json.dumps(content))
    shutil.copytree(runs / "nm", tmp_path / "third")
    for order in (
        [runs / "nm", tmp_path / "third", copied],
        [copied, runs / "nm", tmp_path / "third"],
    ):
        head, _, *rows = page_of(write_comparison(order, tmp_path / "c.html")).rows(
            SUMMARY
        )
        for row in rows:
            assert (row[head.index("KL")] == "not measured") == (row[0] == "half"), row
    assert any(
        row.detail.endswith(", against other")
        for row in headline(read_checkpoint(copied))
    )


def test_runs_that_were_never_measured(runs: Path, tmp_path: Path) -> None:
    for name in ("half", "nm"):
        shutil.copytree(
            runs / name, tmp_path / name, ignore=shutil.ignore_patterns("results.json")
        )
    page = page_of(
        write_comparison([tmp_path / "half", tmp_path / "nm"], tmp_path / "c.html")
    )
    assert page.figures().keys() == {"depth-sparsity", "depth-error"}
    assert [row[3] for row in page.rows(SUMMARY)[1:]] == ["not measured"] * 3
    assert (
        "sparsellm eval nm --text"
        in page.one(
            "pre", **{"aria-label": "Commands that measure what is missing"}
        ).text
    )


def test_a_packed_run_next_to_its_dense_form(runs: Path, tmp_path: Path) -> None:
    """The base model is the same; directories of one name are told apart by a number."""
    pack(runs / "half", out=tmp_path / "half")
    page = page_of(
        write_comparison([runs / "half", tmp_path / "half"], tmp_path / "c.html")
    )
    assert [row[0] for row in page.rows(SUMMARY)[2:]] == ["half", "half (2)"]


def test_speeds_of_another_machine_do_not_stand_side_by_side(
    runs: Path, copied: Path, tmp_path: Path
) -> None:
    results = json.loads((copied / "results.json").read_text())
    rewrite(
        copied / "results.json",
        benchmarks=[
            {**entry, "machine": "a server"} for entry in results["benchmarks"]
        ],
    )
    head, _, first, second = page_of(
        write_comparison([runs / "half", copied], tmp_path / "c.html")
    ).rows(SUMMARY)
    column = head.index("tokens/s")
    assert (first[column], second[column]) == ("33", "another machine or batch")


def test_runs_of_another_base_model_are_refused(
    runs: Path, copied: Path, tmp_path: Path, refusal: Any
) -> None:
    base = json.loads((copied / "pruning.json").read_text())["base"]
    # the same shapes, but other weights
    rewrite(copied / "pruning.json", base={**base, "digest": "0" * 16})
    for other in (runs / "opt", copied):
        said = refusal("report", runs / "nm", other, "--out", tmp_path / "c.html")
        assert "another base model; compare runs of one model" in said
    assert not (tmp_path / "c.html").exists()


def test_other_refusals(runs: Path, tmp_path: Path, run: Any) -> None:
    for directories in ([], str(runs / "half")):
        with pytest.raises(RecipeError, match="directories is"):
            write_comparison(directories, tmp_path / "c.html")
    with pytest.raises(StorageError, match="is named twice; name each run once"):
        write_comparison([runs / "half", runs / "half"], tmp_path / "c.html")
    with pytest.raises(StorageError, match=r"has no pruning\.json"):
        write_comparison([runs / "half", runs / "dense-opt"], tmp_path / "c.html")
    assert "give --out compare.html" in run("report", runs / "half", runs / "nm")[2]
    assert not (tmp_path / "c.html").exists()

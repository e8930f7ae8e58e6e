"""A grid of runs: its cells, what they share, resuming, the recommendation, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, Mock

import pytest

import sparsellm
from sparsellm import Recipe, api
from sparsellm.app import compare, console, tables
from sparsellm.app.compare import Comparison, cells_of
from sparsellm.errors import RecipeError, StorageError
from sparsellm.files.results import read_results
from sparsellm.progress import Progress
from sparsellm.report.comparison import Candidate, best_at_each_size, recommend
from tests.files.small import shards_of, tree
from tests.models import save_tiny, tiny_llama, tiny_tokenizer
from tests.models.families import family

SETTINGS = {"samples": 4, "seq_len": 32, "effort": 0}


def grid(llama: Path, out: Path, **changes: object) -> Comparison:
    cells = cells_of(SETTINGS, methods=["magnitude", "sparsellm"], sparsities=[0.5])
    cells |= cells_of(
        {"samples": 4, "seq_len": 32}, methods=["magnitude"], patterns=["2:4"]
    )
    settings = {
        "cells": cells,
        "text": "pydoc",
        "seq_len": 32,
        "max_tokens": 256,
        **changes,
    }
    return compare.compare(llama, out=out, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def finished(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return grid(llama, tmp_path_factory.mktemp("grid") / "out")


def test_every_cell_is_what_a_run_by_itself_gives(
    llama: Path, finished: Comparison, tmp_path: Path
) -> None:
    assert [cell.name for cell in finished.cells] == [
        "magnitude-0.5",
        "sparsellm-0.5",
        "magnitude-2-4",
    ]
    targets = [{"sparsity": 0.5}, {"sparsity": 0.5, "effort": 0}, {"pattern": "2:4"}]
    for cell, target in zip(finished.cells, targets, strict=True):
        recipe = {
            "samples": 4,
            "seq_len": 32,
            "method": cell.name.partition("-")[0],
            **target,
        }
        sparsellm.prune(llama, recipe, out=tmp_path / cell.name)
        assert shards_of(tmp_path / cell.name) == shards_of(finished.out / cell.name), (
            cell.name
        )
        alone = sparsellm.evaluate(
            tmp_path / cell.name, "pydoc", seq_len=32, max_tokens=256, against=llama
        )
        assert alone.against is not None
        assert (cell.perplexity, cell.kl) == (alone.value, alone.against.kl)
        assert cell.recovery == pytest.approx(cell.dense_perplexity / cell.perplexity)
        packed = finished.out / f"{cell.name}-packed"
        assert cell.packed_bytes == sum(
            file.stat().st_size for file in packed.glob("*.safetensors")
        )
        for place in (finished.out / cell.name, packed):
            results = json.loads((place / "results.json").read_text())
            assert results["evaluations"][0]["perplexity"]["value"] == cell.perplexity


def test_a_stopped_comparison_goes_on_and_takes_further_cells(
    llama: Path, finished: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = Mock(
        wraps=compare.pack, side_effect=[DEFAULT, KeyboardInterrupt, *[DEFAULT] * 9]
    )
    monkeypatch.setattr(compare, "pack", pack)
    cells = cells_of(SETTINGS, methods=["magnitude", "sparsellm"], sparsities=[0.5])
    with pytest.raises(KeyboardInterrupt):
        grid(llama, tmp_path / "out", cells=cells)
    record = tmp_path / "out" / "sparsellm-0.5" / "pruning.json"
    began = record.stat().st_mtime_ns
    again = grid(llama, tmp_path / "out")
    assert record.stat().st_mtime_ns == began, "it was pruned twice"
    assert [(c.name, c.perplexity, c.kl) for c in again.cells] == [
        (c.name, c.perplexity, c.kl) for c in finished.cells
    ]
    assert pack.call_count == 2 + 2


@pytest.mark.parametrize("step", ["write_report", "card"])
def test_pages_that_lack_a_measurement_are_written_again(
    step: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"samples": 4, "seq_len": 32}
    cells = cells_of(settings, methods=["magnitude"], sparsities=[0.5])
    packed = tmp_path / "out" / "magnitude-0.5-packed"
    monkeypatch.setattr(api, step, Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        grid(llama, packed.parent, cells=cells)
    assert len(read_results(packed).evaluations) == 1
    monkeypatch.undo()
    (kl,) = [cell.kl for cell in grid(llama, packed.parent, cells=cells).cells]
    assert f"{kl:.4f}" in (packed / "README.md").read_text()
    assert f"{kl:.4f}" in (packed / "report.html").read_text()


def test_what_is_finished_is_not_done_again(
    llama: Path, finished: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("README.md", "report.html")
    pages = [page for name in names for page in finished.out.glob(f"*/{name}")]
    times = [page.stat().st_mtime_ns for page in pages]
    for module, name in ((api, "prune"), (compare, "pack"), (api, "evaluate")):
        monkeypatch.setattr(module, name, Mock(side_effect=AssertionError(name)))
    assert grid(llama, finished.out).cells == finished.cells
    assert [page.stat().st_mtime_ns for page in pages] == times


def test_another_text_is_measured_on_the_same_checkpoints(
    llama: Path, finished: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(finished.out, tmp_path / "out"))
    monkeypatch.setattr(api, "prune", Mock(side_effect=AssertionError))
    other = grid(llama, out, max_tokens=512)
    assert [cell.kl for cell in other.cells] != [cell.kl for cell in finished.cells]
    for cell in other.cells:
        kept = json.loads((out / f"{cell.name}-packed" / "results.json").read_text())
        assert [one["protocol"]["windows"] for one in kept["evaluations"]] == [8, 16]
    assert grid(llama, out).cells == finished.cells


def test_other_settings_of_a_finished_cell_are_refused(
    llama: Path, finished: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted((file, file.stat().st_mtime_ns) for file in finished.out.rglob("*"))
    cells = cells_of({**SETTINGS, "seed": 1}, methods=["sparsellm"], sparsities=[0.5])
    with pytest.raises(
        sparsellm.SparseLLMError, match=r"other settings: seed is 0 there and 1 here"
    ):
        grid(llama, finished.out, cells=cells)
    monkeypatch.setattr(compare, "loaded", lambda: {"mine.py": "ab"})
    with pytest.raises(
        sparsellm.SparseLLMError,
        match=r"other settings: plugins\.mine\.py is None there",
    ):
        grid(llama, finished.out)
    assert (
        sorted((file, file.stat().st_mtime_ns) for file in finished.out.rglob("*"))
        == before
    )


def test_another_calibration_text_of_the_same_name_is_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = tmp_path / "words.txt"
    words.write_text("The first text of this name. " * 400)
    out = tmp_path / "out"
    calibrated = {**SETTINGS, "calibration": str(words)}
    cells = cells_of(calibrated, methods=["sparsellm", "wanda"], sparsities=[0.5])
    first = grid(llama, out, cells=cells)
    monkeypatch.setattr(api, "prune", Mock(side_effect=AssertionError))
    words.write_bytes(words.read_bytes())  # the same text once more
    assert grid(llama, out, cells=cells).cells == first.cells
    words.write_text("Then another one. " * 400)
    before = tree(out)
    with pytest.raises(RecipeError) as refused:
        grid(llama, out, cells=cells)
    (line,) = str(refused.value).splitlines()
    assert line.startswith("cell sparsellm-0.5: ")
    assert "another calibration text: the text words.txt has changed since" in line
    assert tree(out) == before


@pytest.mark.parametrize("kind", ["sweep", "tokens", "experts", "part"])
def test_the_text_of_a_cell_is_known_again(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By as many windows as its sweep reads, and by the model without its experts."""
    monkeypatch.setenv("SPARSELLM_CACHE", str(tmp_path / "cache"))
    words = tmp_path / "words.txt"
    words.write_text("The first text of this name. " * 800)
    base = {"samples": 4, "seq_len": 32, "calibration": str(words)}
    base |= {"tokens": {"sweep_tokens": 2000}}.get(kind, {"effort": 1})
    model: Any = tiny_llama(num_hidden_layers=1)
    experts = []
    if kind == "experts":
        model = family("Mixtral")
        experts = [0.5]
    if kind == "part":
        base["calibration"] = f"{words}:0.5,self:0.5"
    dense = save_tiny(model, tiny_tokenizer(), tmp_path / "dense")
    cells = cells_of(base, methods=["sparsellm"], sparsities=[0.5], experts=experts)
    first = grid(dense, tmp_path / "out", cells=cells)
    monkeypatch.setattr(api, "prune", Mock(side_effect=AssertionError))
    assert grid(dense, tmp_path / "out", cells=cells).cells == first.cells
    words.write_text("Then another one. " * 2000)
    with pytest.raises(RecipeError, match=r"text words\.txt.* has changed since"):
        grid(dense, tmp_path / "out", cells=cells)


def test_more_windows_than_those_of_a_finished_cell_are_refused(
    llama: Path, finished: Comparison
) -> None:
    cells = cells_of(
        {**SETTINGS, "samples": 5}, methods=["sparsellm"], sparsities=[0.5]
    )
    with pytest.raises(RecipeError, match=r"samples is 4 there and 5 here"):
        grid(llama, finished.out, cells=cells)


def test_two_models_do_not_share_a_cell(
    llama: Path, finished: Comparison, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(llama, tmp_path / "another-place"))
    out = Path(shutil.copytree(finished.out, tmp_path / "out"))
    again = grid(moved, out)
    assert [cell.kl for cell in again.cells] == [cell.kl for cell in finished.cells]
    other = save_tiny(tiny_llama(seed=1), tiny_tokenizer(), tmp_path / "other")
    with pytest.raises(
        RecipeError, match=r"magnitude-0\.5 was made with other settings: model is"
    ):
        grid(other, out)


@pytest.mark.parametrize(
    ("recover", "max_bytes", "name"),
    [
        (None, None, None),
        (0.9, None, "b"),
        (0.5, None, "c"),
        (None, 60, "b"),
        (None, 20, None),
        (0.9, 40, None),
    ],
)
def test_a_recommendation_meets_the_constraints(
    recover: float | None, max_bytes: int | None, name: str | None
) -> None:
    cells = [
        Candidate("a", 0.95, 80, 0.1),
        Candidate("b", 0.92, 50, 0.2),
        Candidate("c", 0.6, 30, 0.7),
    ]
    chosen = recommend(cells, recover, max_bytes)
    assert (chosen.name if chosen else None) == name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "one sparsity or pattern"),
        ("--sparsity 0.5,0.5", "asked for twice"),
        ("--sparsity 0.5 --method wanda --set effort=1", "known to none"),
        ("--sparsity 0.5 --text gone.txt", "text file 'gone.txt' does not exist"),
        ("--pattern 2:4,3:7 --method wanda", "which 7 does not divide"),
        (
            "--sparsity 0 --method wanda,sparsegpt --set grid=w8a16",
            "no packed form in int8",
        ),
        ("--sparsity 0.3 --experts 0.5", "has no mixture"),
    ],
)
def test_mistakes_are_said_before_the_work(
    words: str, message: str, llama: Path, tmp_path: Path, refusal: Any
) -> None:
    assert message in refusal(
        "compare", llama, "--out", tmp_path / "out", *words.split()
    )
    assert not (tmp_path / "out").exists()


SMALL = [
    "--calibration=pydoc",
    "--sparsity=0.5",
    "--text-seq-len=32",
    "--max-tokens=256",
]
SMALL += ["--samples=4", "--seq-len=32", "--method"]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", "is the current directory"),
        ("x" * 250, "File name too long"),
        ("p.partial", "is a working directory"),
        ("model/grid", "overlaps with the model"),
        ("mine/note", "note is a link or a file"),
    ],
)
def test_a_directory_for_no_grid_is_refused_in_one_line(
    out: str,
    message: str,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refusal: Any,
) -> None:
    (tmp_path / "model").symlink_to(llama)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note").write_text("mine")
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    assert message in refusal("compare", "model", "--out", out, *SMALL, "magnitude")
    assert tree(tmp_path) == before


def made_by_somebody(llama: Path, out: Path) -> None:
    sparsellm.prune(
        llama, Recipe(method="magnitude", sparsity=0.3, samples=4, seq_len=32), out=out
    )


FOREIGN: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "wanda-0.5": (made_by_somebody, "wanda-0.5 was made with other settings: method"),
    "wanda-0.5-packed": (
        made_by_somebody,
        "wanda-0.5-packed exists and is not empty",
    ),
    "compare.html": (
        lambda _, path: path.write_text("mine"),
        "compare.html' is not a report of sparsellm",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_stop_it_before_a_cell(
    name: str, llama: Path, tmp_path: Path, run: Any, refusal: Any
) -> None:
    out = tmp_path / "grid"
    assert run("compare", llama, "--out", out, *SMALL, "magnitude")[0] == 0
    make, message = FOREIGN[name]
    make(llama, out / name)
    before = tree(out)
    assert message in refusal("compare", llama, "--out", out, *SMALL, "magnitude,wanda")
    assert tree(out) == before


@pytest.mark.parametrize("page", ["README.md", "report.html"])
def test_an_edited_page_is_refused_before_a_measurement_is_added(
    page: str, llama: Path, finished: Comparison, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(finished.out, tmp_path / "out"))
    packed = out / "sparsellm-0.5-packed"
    (packed / page).write_text("mine")
    assert grid(llama, out).cells == finished.cells, "nothing is to be added"
    (packed / "results.json").unlink()
    before = tree(out)
    with pytest.raises(StorageError, match=rf"sparsellm-0\.5: .*{page}"):
        grid(llama, out)
    assert tree(out) == before


def test_no_run_is_best_in_a_size_if_a_smaller_one_diverges_less() -> None:
    sizes = {
        "a": (80, 0.1),
        "b": (50, 0.2),
        "c": (60, 0.3),
        "d": (50, 0.4),
        "e": (90, 0.1),
    }
    runs = [Candidate(name, 1 - kl, size, kl) for name, (size, kl) in sizes.items()]
    assert [run.name for run in best_at_each_size(runs)] == ["b", "a"]


def test_the_command_prints_one_table_and_a_recommendation(
    llama: Path, tmp_path: Path, run: Any
) -> None:
    words = "--method magnitude,wanda --sparsity 0.5 --text-seq-len 32 --max-tokens 256 --samples 4 --seq-len 32"
    said = run(
        "compare",
        llama,
        "--out",
        tmp_path,
        *words.split(),
        "--max-bytes",
        "1GB",
        columns=80,
        exits=0,
    )[1]
    for part in (
        "dense",
        "magnitude-0.5",
        "wanda-0.5",
        "least KL at each size",
        "recommended: ",
    ):
        assert part in said
    assert all(len(line) <= 80 for line in said.splitlines() if "│" in line)


def test_a_grid_has_a_cell_for_each_effort_and_type_of_values() -> None:
    base = {"samples": 4, "seq_len": 32}
    cells = cells_of(
        base,
        methods=["wanda", "sparsellm"],
        sparsities=[0.3],
        efforts=[0, 2],
        values=["keep", "int4"],
    )
    assert {
        name: (cell.method, cell.effort, cell.values) for name, cell in cells.items()
    } == {
        "wanda-0.3": ("wanda", None, "keep"),
        "sparsellm-0.3-effort0": ("sparsellm", 0, "keep"),
        "sparsellm-0.3-effort2": ("sparsellm", 2, "keep"),
        "wanda-0.3-int4": ("wanda", None, "int4"),
        "sparsellm-0.3-effort0-int4": ("sparsellm", 0, "int4"),
        "sparsellm-0.3-effort2-int4": ("sparsellm", 2, "int4"),
    }
    with pytest.raises(
        RecipeError, match="effort is known to none of the methods wanda"
    ):
        cells_of(base, methods=["wanda"], sparsities=[0.3], efforts=[1])
    with pytest.raises(RecipeError, match="cells is empty"):
        sparsellm.compare("demo", out="grid", cells={}, text="pydoc")
    for name, value in {"methods": "wanda", "experts": 0.5}.items():
        with pytest.raises(RecipeError, match=rf"{name} is {value!r}"):
            cells_of(base, **{"methods": ["wanda"], "sparsities": [0.3], name: value})


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (["magnitude-0.5", "wanda-0.7"], 80),
        (["sparsellm-0.5-effort2-int4", "sparsellm-0.75-effort2-int4"], 80),
        (["sparsellm-0.5-effort2-int4", "sparsellm-0.75-effort2-int4"], 120),
    ],
)
def test_no_name_of_a_run_is_broken(
    names: list[str],
    columns: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cell = {
        "sparsity": 0.5,
        "perplexity": 123.45,
        "dense_perplexity": 22.9,
        "kl": 0.123,
        "agreement": 0.87,
        "recovery": 0.186,
        "packed_bytes": 123_456_789,
        "dense_bytes": 269_060_552,
        "tokens_per_second": None,
        "dense_tokens_per_second": None,
        "transformers_tokens_per_second": None,
        "seconds": 284.0,
        "peak_rss": 1,
    }
    cells = [compare.Measured(name=name, **cell) for name in names]  # type: ignore[arg-type]
    result = Comparison(
        out=Path("c"), page=None, recommended=None, best_at_each_size=[], cells=cells
    )
    monkeypatch.setenv("COLUMNS", str(columns))
    console.out.cache_clear()
    tables.print_comparison(result, limited=False)
    console.out.cache_clear()
    said = capsys.readouterr().out
    head, *_ = (line for line in said.splitlines() if "┃" in line)
    rows = [line for line in said.splitlines() if "│" in line]
    assert all(len(line) <= columns for line in rows)
    for name in names:
        (row,) = (line for line in rows if f" {name} " in line)
        assert {"123.45", "0.123", "123.5", "4 min 44 s"} <= {
            part.strip() for part in row.split("│")
        }
    assert len(rows) == 1 + len(names)
    assert ("recovery" in head) == (columns > 100 or len(names[0]) < 20)


def test_each_run_has_times_of_its_own(llama: Path, tmp_path: Path) -> None:
    parts: dict[str, set[str]] = {}

    def tell(event: Progress) -> None:
        parts.setdefault(event.part, set()).add(event.phase)

    cells = cells_of(
        {"samples": 4, "seq_len": 32, "calibration": "pydoc"},
        methods=["magnitude", "wanda"],
        sparsities=[0.5],
    )
    grid(llama, tmp_path, cells=cells, progress=tell)
    for part in ("1/2 magnitude-0.5", "2/2 wanda-0.5"):
        assert parts[part] >= {"prune", "save"}

"""A grid of runs: its cells, what they share, resuming, the recommendation, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import sparsellm
from sparsellm import compare
from sparsellm.compare import GridResult, Measured, Protocol, cells_of, recommend
from sparsellm.evaluation import streamed
from sparsellm.run import walk as running

SETTINGS = {"samples": 4, "seq_len": 32, "effort": 0}
PROTOCOL = Protocol("pydoc", 32, 256)


def grid(llama: Path, out: Path, **changes: object) -> GridResult:
    cells = cells_of(SETTINGS, methods=["magnitude", "sparsellm"], sparsities=[0.5])
    cells |= cells_of({"samples": 4, "seq_len": 32}, methods=["magnitude"], patterns=["2:4"])
    settings = {"cells": cells, "protocol": PROTOCOL, **changes}
    return compare.compare(llama, out=out, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def finished(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> GridResult:
    return grid(llama, tmp_path_factory.mktemp("grid") / "out")


def test_every_cell_is_what_a_run_by_itself_gives(llama: Path, finished: GridResult, tmp_path: Path) -> None:
    assert [cell.name for cell in finished.cells] == ["magnitude-0.5", "sparsellm-0.5", "magnitude-2-4"]
    targets = [{"sparsity": 0.5}, {"sparsity": 0.5, "effort": 0}, {"pattern": "2:4"}]
    for cell, target in zip(finished.cells, targets, strict=True):
        recipe = {"samples": 4, "seq_len": 32, "method": cell.name.partition("-")[0], **target}
        sparsellm.prune(llama, recipe, out=tmp_path / cell.name)
        for shard in (tmp_path / cell.name).glob("*.safetensors"):
            assert shard.read_bytes() == (finished.out / cell.name / shard.name).read_bytes(), cell.name
        alone = sparsellm.evaluate(tmp_path / cell.name, "pydoc", seq_len=32, max_tokens=256, against=llama)
        assert alone.against is not None
        assert (cell.perplexity, cell.kl) == (alone.value, alone.against.kl)
        assert cell.recovery == pytest.approx(cell.dense_perplexity / cell.perplexity)
        packed = finished.out / f"{cell.name}-packed"
        assert cell.packed_bytes == sum(file.stat().st_size for file in packed.glob("*.safetensors"))
        for place in (finished.out / cell.name, packed):
            results = json.loads((place / "results.json").read_text())
            assert results["evaluations"][0]["perplexity"]["value"] == cell.perplexity


def test_quality_and_size_are_those_of_the_packed_checkpoint(llama: Path, tmp_path: Path) -> None:
    cells = cells_of({"samples": 4, "seq_len": 32}, methods=["magnitude"], sparsities=[0.5, 0.6])
    result = grid(llama, tmp_path / "out", cells=cells, protocol=Protocol("pydoc", 32, 256, values="int4"))
    cell = result.cells[0]
    packed, pruned = (
        sparsellm.evaluate(result.out / name, "pydoc", seq_len=32, max_tokens=256).value
        for name in (f"{cell.name}-packed", cell.name)
    )
    assert cell.perplexity == packed != pruned
    assert not (result.out / cell.name / "results.json").exists(), "its values are others"
    assert result.page is not None
    assert "magnitude-0.5-packed" in result.page.read_text(encoding="utf-8")


def test_gradients_windows_and_the_dense_model_are_computed_once(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    for module, name in ((running, "loss_gradients"), (streamed, "_outputs")):
        real = getattr(module, name)

        def counted(*args: object, real: object = real, name: str = name, **kwargs: object) -> object:
            made.append(name)
            return real(*args, **kwargs)  # type: ignore[operator]

        monkeypatch.setattr(module, name, counted)
    grid(llama, tmp_path / "out", cells=cells_of(SETTINGS, methods=["sparsellm"], sparsities=[0.5, 0.7]))
    assert made.count("loss_gradients") == 1
    assert made.count("_outputs") == 2 + 1


def test_a_stopped_grid_goes_on_and_takes_further_cells(
    llama: Path, finished: GridResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = compare.pack, []

    def stop(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(compare, "pack", stop)
    first = cells_of(SETTINGS, methods=["magnitude", "sparsellm"], sparsities=[0.5])
    with pytest.raises(KeyboardInterrupt):
        grid(llama, tmp_path / "out", cells=first)
    began = (tmp_path / "out" / "sparsellm-0.5" / "pruning.json").stat().st_mtime_ns
    result = grid(llama, tmp_path / "out")
    assert (tmp_path / "out" / "sparsellm-0.5" / "pruning.json").stat().st_mtime_ns == began, "it was pruned twice"
    assert [(c.name, c.perplexity, c.kl) for c in result.cells] == [
        (c.name, c.perplexity, c.kl) for c in finished.cells
    ]
    assert len(calls) == 2 + 2


def test_other_settings_of_a_finished_cell_are_refused(llama: Path, finished: GridResult) -> None:
    before = sorted((file, file.stat().st_mtime_ns) for file in finished.out.rglob("*"))
    cells = cells_of({**SETTINGS, "seed": 1}, methods=["sparsellm"], sparsities=[0.5])
    with pytest.raises(sparsellm.SparseLLMError, match=r"another protocol\.max_tokens"):
        grid(llama, finished.out, protocol=Protocol("pydoc", 32, 512))
    with pytest.raises(sparsellm.SparseLLMError, match=r"another recipe\.seed"):
        grid(llama, finished.out, cells=cells)
    assert sorted((file, file.stat().st_mtime_ns) for file in finished.out.rglob("*")) == before


def measured(name: str, recovery: float, size: int) -> Measured:
    numbers = {"sparsity": 0.5, "perplexity": 1.0, "dense_perplexity": 1.0, "kl": 0.0, "agreement": 1.0, "seconds": 1.0}
    return Measured(
        name=name, recovery=recovery, packed_bytes=size, dense_bytes=9, peak_rss=1,
        tokens_per_second=None, dense_tokens_per_second=None, settings={}, **numbers,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("recover", "max_bytes", "name"),
    [(None, None, None), (0.9, None, "b"), (0.5, None, "c"), (None, 60, "b"), (None, 20, None), (0.9, 40, None)],
)
def test_the_recommendation_satisfies_the_constraints(
    recover: float | None, max_bytes: int | None, name: str | None
) -> None:
    cells = [measured("a", 0.95, 80), measured("b", 0.92, 50), measured("c", 0.6, 30)]
    chosen = recommend(cells, recover, max_bytes)
    assert (chosen.name if chosen else None) == name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "one sparsity or pattern"),
        ("--sparsity 0.5,x", "sparsity is 'x'"),
        ("--sparsity 0.5,0.5", "asked for twice"),
        ("--sparsity 0.5 --method wandaa", "wanda"),
        ("--sparsity 0.5 --method wanda --set effort=1", "known to none"),
        ("--sparsity 0.5 --recover 1.5", "--recover is 1.5"),
        ("--sparsity 0.5 --text gone.txt", "text file 'gone.txt' does not exist"),
        ("--sparsity 0.5 --values int9", "unknown value type 'int9'"),
        ("--sparsity 0.5 --seq-len 4000", "4000"),
        ("--sparsity 0.5 --max-tokens 0", "max_tokens is 0"),
    ],
)
def test_what_is_wrong_is_one_line_before_the_work(
    words: str, message: str, llama: Path, tmp_path: Path, run: Any
) -> None:
    code, _, said = run("compare", llama, "--out", tmp_path / "out", *words.split())
    assert code == 2
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_command_prints_one_table_and_a_recommendation(llama: Path, tmp_path: Path, run: Any) -> None:
    words = "--method magnitude,wanda --sparsity 0.5 --seq-len 32 --max-tokens 256 --set samples=4 --set seq_len=32"
    code, said, stderr = run("compare", llama, "--out", tmp_path, *words.split(), "--recover", "0.01", columns=80)
    assert code == 0, stderr
    assert all(part in said for part in ("dense", "magnitude-0.5", "wanda-0.5", "recommended: "))
    assert all(len(line) <= 80 for line in said.splitlines() if "│" in line)

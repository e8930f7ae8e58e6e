"""The command: what it says of zeros, one line for a mistake, and where card and report name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import sparsellm
from sparsellm.exports import template
from sparsellm.files.results import read_results
from sparsellm.report.charts import megabytes
from tests.exports.checkpoints import pruned, wide_llama
from tests.killing import full_disk
from tests.models import converter


def test_export_says_what_zeros_cost_and_is_named_from_then_on(
    tmp_path: Path, run: Any
) -> None:
    directory = pruned(wide_llama(), tmp_path, "q4_0")
    out = tmp_path / "small model.gguf"
    line = (
        "export",
        directory,
        "--to",
        "gguf",
        "--out",
        out,
        "--converter",
        converter.__file__,
    )
    _, stdout, stderr = run(*line, exits=0)
    assert "gguf stores the 50% of zeros like other values" in stderr
    assert "it runs in llama.cpp, Ollama, LM Studio" in stdout
    run("report", directory, exits=0)
    written = out.stat().st_size
    for name, size in (
        ("README.md", f"{written:,} bytes"),
        ("report.html", megabytes(written / 1e6)),
    ):
        page = (directory / name).read_text()
        assert "small model.gguf" in page
        assert size in page
        assert "llama.cpp, Ollama, LM Studio" in page
        assert " --values int4" in page
    line = (
        "export",
        directory,
        "--to",
        "compressed-tensors",
        "--out",
        tmp_path / "ct",
        "--json",
        "--no-save",
    )
    content = json.loads(run(*line, exits=0)[1])
    assert content["results"] is None
    assert content["record"]["bytes"] == sum(
        file.stat().st_size for file in (tmp_path / "ct").glob("*.safetensors")
    )
    assert (
        content["packed_bytes"] < content["linear_bytes"] < content["record"]["bytes"]
    )
    packed = sparsellm.pack(directory, out=tmp_path / "packed").packed_bytes
    # rows have different numbers of zeros
    assert content["packed_bytes"] == pytest.approx(packed, rel=0.01)
    assert "path" not in content["record"]


@pytest.mark.parametrize("to", ["gguf", "compressed-tensors"])
def test_a_second_start_ends_an_export_on_a_full_disk(
    tmp_path: Path, run: Any, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is full at every place in turn; the record in the pruned checkpoint is there once."""
    directory = pruned(wide_llama(num_hidden_layers=1), tmp_path, "w4a16-32")
    name = "out"
    like: tuple[object, ...] = ()
    if to == "gguf":
        name = "out.gguf"
        like = ("--converter", converter.__file__)
        monkeypatch.setattr(template, "_convert", converter.called)
    after, code = 0, 2
    while code == 2:
        after += 1
        with full_disk(after):
            code, _, stderr = run(
                "export", directory, "--to", to, "--out", tmp_path / name, *like
            )
        if code == 2:
            assert "is full; make room and run the same command again" in stderr
            assert not (tmp_path / name).exists()
    assert (code, [export.name for export in read_results(directory).exports]) == (
        0,
        [name],
    )


def test_a_mistake_is_one_line_and_nothing_is_written(
    tmp_path: Path, refusal: Any
) -> None:
    directory, out = (
        pruned(wide_llama(num_hidden_layers=1), tmp_path, "w8a8"),
        tmp_path / "out",
    )
    before, line = (
        sorted(tmp_path.iterdir()),
        ("export", directory, "--out", out, "--to"),
    )
    assert "onnx" in refusal(*line, "onnx")
    assert "settings of GGUF" in refusal(
        *line, "compressed-tensors", "--like", "a.gguf"
    )
    assert sorted(tmp_path.iterdir()) == before

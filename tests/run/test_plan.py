"""What a run needs, by a config alone and at the door of a run: the same numbers, and nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

import sparsellm
from sparsellm import Recipe, machine
from sparsellm.errors import StorageError
from sparsellm.progress import between
from tests.files.small import tree
from tests.models import save_tiny, tiny_llama, tiny_tokenizer
from tests.models.families import mixtral

SMALL = Recipe(samples=4, seq_len=32)


@pytest.mark.parametrize("make", [tiny_llama, mixtral])
def test_a_config_alone_tells_what_a_run_takes(make: Any, tmp_path: Path) -> None:
    model = save_tiny(make(), tiny_tokenizer(), tmp_path / "model")
    alone = shutil.copy(model / "config.json", tmp_path / "some.json")
    door = sparsellm.dry_run(model, SMALL, out=tmp_path / "out")
    by_directory = sparsellm.plan(model, SMALL)
    by_config = sparsellm.plan(alone, SMALL)
    assert (by_config.model, door.model) == ("some.json", "model")
    for one in (by_directory, by_config):
        assert one.tokens == door.tokens
        assert one.disk_bytes == door.disk_bytes
        assert one.hidden_bytes == door.hidden_bytes
        assert one.seconds == by_directory.seconds


def test_a_dry_run_refuses_what_a_run_does_and_writes_nothing(
    llama: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, out = tree(tmp_path), tmp_path / "out"
    few = ["--samples", 4, "--seq-len", 32, "--method", "wanda"]
    few += ["--calibration", "pydoc"]
    line = ("prune", llama, "--out", out, *few)
    told = json.loads(run(*line, "--dry-run", "--json", exits=0)[1])
    assert told["memory_bytes"] > told["hidden_bytes"] > 0
    assert tree(tmp_path) == before
    assert "prune blocks" in run(*line, "--dry-run", exits=0)[1]
    assert run(*line)[0] == 0
    assert "exists and is not empty" in run(*line, "--dry-run", exits=2)[2]
    state = tmp_path / "more.partial" / ".sparsellm-run"
    state.mkdir(parents=True)
    (state / "run.json").write_text('{"recipe": {"seed": 1}}')
    assert (
        "holds another unfinished run"
        in run(*line[:3], tmp_path / "more", *line[4:], "--dry-run", exits=2)[2]
    )
    model = save_tiny(tiny_llama(hidden_size=512), tiny_tokenizer(), tmp_path / "m")
    # Too little for hidden states, for which there is then no room in files.
    recipe = Recipe(method="wanda", calibration="pydoc", memory=machine.held_rss())
    usage = shutil.disk_usage(tmp_path)._replace(
        free=(model / "model.safetensors").stat().st_size
    )
    monkeypatch.setattr(
        "sparsellm.files.directory.shutil.disk_usage", lambda place: usage
    )
    with pytest.raises(StorageError, match="make room"):
        sparsellm.dry_run(model, recipe, out=tmp_path / "p")


def config(directory: Path, **changes: Any) -> Path:
    """Llama 3 of 70B, as a config."""
    sizes = {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    }
    more = {
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "dtype": "bfloat16",
        **changes,
    }
    LlamaConfig(**sizes | more).to_json_file(directory / "config.json")
    return directory / "config.json"


def test_gpus_and_processes_divide_a_large_model(tmp_path: Path) -> None:
    model = config(tmp_path)
    one, eight = (sparsellm.plan(model, gpu="h100", ranks=ranks) for ranks in (1, 8))
    assert eight.seconds["prune"] < one.seconds["prune"] / 2
    assert eight.hidden_bytes < one.hidden_bytes
    assert one.notes == []
    assert 0 < one.device_bytes < 80e9
    assert one.disk_bytes > 2 * 137e9  # 68.5 billion weights in the blocks
    little = sparsellm.plan(model, {"memory": "20GB"}, gpu="h100")
    assert little.hidden_on_disk_bytes > 400e9
    small = sparsellm.plan(model, {"device_memory": "4GB"}, gpu="l4")
    assert "it does not fit" in small.notes[0]


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.1, 9.9, "a few seconds"),
        (20, 70, "20 to 70 seconds"),
        (60, 200, "1 to 3 minutes"),
        (80, 95, "1 to 2 minutes"),
        (7000, 7300, "2 hours"),
        (5e5, 1e6, "6 to 12 days"),
    ],
)
def test_a_range_of_time_has_one_unit(low: float, high: float, said: str) -> None:
    assert between(low, high) == said


@pytest.mark.parametrize(
    ("options", "layers", "why"),
    [
        (["--gpu", "h101"], 2, "did you mean 'h100'"),
        (["--ranks", "0"], 2, "ranks is 0"),
        (["--ranks", "256"], 2, "128 calibration windows"),
        ([], 0, "num_hidden_layers 0"),
        (["--sparsity", "2"], 2, "sparsity"),
    ],
)
def test_what_has_no_plan_is_refused(
    options: list[str], layers: int, why: str, tmp_path: Path, refusal: Any
) -> None:
    model = config(
        tmp_path, hidden_size=64, intermediate_size=96, num_hidden_layers=layers
    )
    assert why in refusal("plan", model, *options)


def test_a_sweep_of_a_small_model_over_many_tokens_takes_minutes(llama: Path) -> None:
    """A block takes milliseconds in each step, whatever it multiplies."""
    few, many = (
        sparsellm.plan(llama, samples=32, seq_len=64, sweep_tokens=tokens)
        for tokens in (100_000, 4_000_000)
    )
    assert many.seconds["sweep"] > 60
    assert few.seconds["sweep"] > 1


def test_a_sweep_over_a_short_text_has_a_step_for_each_pass(
    llama: Path, tmp_path: Path
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("the quick brown fox " * 200)
    settings = {"samples": 2, "seq_len": 16, "sweep_tokens": 400_000}
    settings |= {"calibration": str(text)}
    told = sparsellm.dry_run(llama, settings, out=tmp_path / "out")
    passes = 400_000 / (2 * 16)
    # a block takes milliseconds in a step
    assert told.seconds["sweep"] > passes * 0.002

"""What a run needs, by a config alone and at the door of a run: the same numbers, and nothing written."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import StorageError
from sparsellm.run import predictions
from sparsellm.run import prune as running
from sparsellm.run import walk as walking
from sparsellm.run.speeds import Speeds
from tests.files.small import tree
from tests.models import save_tiny, tiny_llama, tiny_tokenizer, windows
from tests.models.families import mixtral

SMALL = Recipe(samples=4, seq_len=32)


@pytest.mark.parametrize("make", [tiny_llama, mixtral])
def test_a_config_alone_predicts_what_a_run_does(make: Any, tmp_path: Path) -> None:
    model = save_tiny(make(), tiny_tokenizer(), tmp_path / "model")
    alone = shutil.copy(model / "config.json", tmp_path / "some.json")
    door = sparsellm.dry_run(model, SMALL, out=tmp_path / "out")
    by_directory, by_config = (
        sparsellm.plan(source, SMALL) for source in (model, alone)
    )
    assert (by_config.model, door.model) == ("some.json", "model")
    assert by_config.seconds == by_directory.seconds == pytest.approx(door.seconds)
    for one in (by_directory, by_config):
        assert one.tokens == door.tokens
        assert one.disk_bytes == door.disk_bytes
        assert one.memory.working_bytes == door.memory.working_bytes
        assert one.memory.hidden_in_memory_bytes == door.memory.hidden_in_memory_bytes


def test_a_dry_run_refuses_what_a_run_does_and_writes_nothing(
    llama: Path, tmp_path: Path, run: Any, monkeypatch: Any
) -> None:
    before, out = tree(tmp_path), tmp_path / "out"
    few = (
        "--samples",
        4,
        "--seq-len",
        32,
        "--method",
        "wanda",
        "--calibration",
        "pydoc",
    )
    line = ("prune", llama, "--out", out, *few)
    told = json.loads(run(*line, "--dry-run", "--json", exits=0)[1])
    assert tree(tmp_path) == before
    assert "prune blocks" in run(*line, "--dry-run", exits=0)[1]
    assert run(*line)[0] == 0
    assert (
        json.loads((out / "pruning.json").read_text())["memory"]["working_bytes"]
        == told["memory"]["working_bytes"]
    )
    assert "exists and is not empty" in run(*line, "--dry-run", exits=2)[2]
    state = tmp_path / "more.partial" / ".sparsellm-run"
    state.mkdir(parents=True)
    (state / "run.json").write_text('{"recipe": {"seed": 1}}')
    assert (
        "holds another unfinished run"
        in run(*line[:3], tmp_path / "more", *line[4:], "--dry-run", exits=2)[2]
    )
    model = save_tiny(tiny_llama(hidden_size=512), tiny_tokenizer(), tmp_path / "m")
    recipe = Recipe(method="wanda", calibration="pydoc")
    memory = sparsellm.dry_run(model, recipe, out=tmp_path / "p").memory
    recipe = recipe.updated(
        memory=memory.predicted_peak_rss_bytes - memory.hidden_in_memory_bytes // 2
    )
    usage = shutil.disk_usage(tmp_path)._replace(
        free=(model / "model.safetensors").stat().st_size
    )
    monkeypatch.setattr(
        "sparsellm.files.directory.shutil.disk_usage", lambda place: usage
    )
    with pytest.raises(
        StorageError, match="make room"
    ):  # hidden states do not fit there
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
    assert eight.memory.hidden_in_memory_bytes < one.memory.hidden_in_memory_bytes
    assert (one.notes, one.wanted_ranks) == ([], 1)
    assert one.memory.predicted_peak_device_bytes < 80e9
    small = sparsellm.plan(model, gpu="l4")
    assert small.memory.predicted_peak_device_bytes > 22e9
    assert small.wanted_ranks == 0
    assert small.notes[0].endswith("it does not fit; method sparsegpt does")
    assert (
        sparsellm.plan(
            model, {"memory": "200GB"}, gpu="h100"
        ).memory.hidden_on_disk_bytes
        > 400e9
    )


def test_the_sweep_is_the_fastest_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = config(
        tmp_path, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32
    )
    chosen, seconds = sparsellm.plan(model, gpu="h100"), []
    for way in [*predictions.RESIDENT, predictions.STREAMED]:
        monkeypatch.setattr(predictions, "sweeps", lambda *_, way=way: [way])
        alone = sparsellm.plan(model, gpu="h100")
        seconds += [] if alone.notes else [sum(alone.seconds.values())]
    assert len(set(seconds)) > 1
    assert sum(chosen.seconds.values()) == min(seconds)


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


class Counter(TorchDispatchMode):
    """Counts the operations of products, forward and backward, by torch's formulas."""

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        value = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=value)
        return value


@pytest.mark.parametrize(
    ("module", "name"), [(walking, "loss_gradients"), (running, "sweep")]
)
def test_backward_work_is_as_predicted(
    module: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, counter = getattr(module, name), Counter()

    def counted(*arguments: Any, **options: Any) -> Any:
        with counter:
            return work(*arguments, **options)

    monkeypatch.setattr(module, name, counted)
    unit = Speeds("of one operation a second", 1 / predictions.BUSY, 1.0, float("inf"))
    monkeypatch.setattr("sparsellm.run.needs.speeds_of", lambda chain: unit)
    model = save_tiny(
        tiny_llama(hidden_size=64, intermediate_size=192), None, tmp_path / "model"
    )
    recipe = Recipe(
        samples=256, seq_len=32, products="float32", sets=1, sweep_rate=1e-4
    )
    result = sparsellm.prune(
        model, recipe, calibration=windows(256, 32), out=tmp_path / "out"
    )
    predicted = result.predicted_seconds["sweep" if name == "sweep" else "gradients"]
    assert counter.total == pytest.approx(predicted, rel=0.2)


@pytest.mark.parametrize("ranks", [1, 8])
def test_each_rank_moves_its_rows_to_its_gpu_and_gathers_all(ranks: int) -> None:
    work = predictions.Work(*[0.0] * 5, weights=1000, sums=0, stored=0, hidden=0)
    way = next(
        name for name, residence in predictions.RESIDENT.items() if residence.offloads
    )
    extent = predictions.Extent(64, 512, 512, swept=65536, ranks=ranks)
    speeds = Speeds(
        "GPUs", math.inf, math.inf, math.inf, link=28.0, gpu_bytes=1, exchanged=6.0
    )
    steps = (
        65536 / ranks / (512 if ranks == 1 else 128) - 8
    )  # those of a rank; eight are held out
    seconds = predictions.sweep_seconds(work, extent, 1, speeds, 0.0, way, 1.0)
    assert seconds == pytest.approx(steps * 1000 * (1 / ranks + (ranks > 1)))

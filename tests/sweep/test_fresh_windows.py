"""Later passes of a sweep run on windows that the walk has not seen, against what the dense model says of them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import sparsellm
from sparsellm.calibration import calibration_windows
from sparsellm.sweep import whole_model
from tests.models import save_tiny, tiny_llama, tiny_tokenizer
from tests.sweep.helpers import dense_end, ids_of

SAMPLES, SEQ_LEN = 4, 16
RECIPE = {
    "sparsity": 0.6,
    "samples": SAMPLES,
    "seq_len": SEQ_LEN,
    "batch_tokens": 32,
    "options": {"passes": 4, "sweep_rate": 0.001},
}


def runs_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Filled with the windows of each pass and the dense model's hidden states for them."""
    seen: list[tuple[Tensor, Tensor]] = []
    real = whole_model._pass

    def record(task: object, run: whole_model._Run, *args: object) -> float:
        seen.append((run.windows, torch.cat(list(run.dense))))
        return real(task, run, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(whole_model, "_pass", record)
    return seen


def ids_in(path: Path) -> list[int]:
    """The ids of a text; its lines are joined by blank lines."""
    ids: list[int] = tiny_tokenizer()(path.read_text().replace("\n", "\n\n"))["input_ids"]
    return ids


def text(path: Path, lines: int) -> Path:
    path.write_text("\n".join(f"Line {n} of {n * 7919 % 1009} about {n * 31 % 97}." for n in range(lines)))
    return path


@pytest.mark.parametrize("calibration", ["text.txt", "self"])
@pytest.mark.parametrize("options", [{"passes": 4, "sweep_rate": 0.001}, {"effort": 2}])
def test_each_pass_takes_new_windows_while_the_text_lasts(
    calibration: str, options: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text of a model itself has no end."""
    source = save_tiny(tiny_llama(), tiny_tokenizer(), tmp_path / "dense")
    text(tmp_path / "text.txt", 400)
    monkeypatch.chdir(tmp_path)
    seen = runs_of(monkeypatch)
    sparsellm.prune(source, {**RECIPE, "calibration": calibration, "options": options}, out=tmp_path / "out")
    dense = AutoModelForCausalLM.from_pretrained(source)
    rows = [tuple(row) for windows, _ in seen for row in windows.tolist()]
    assert len(seen) == options.get("passes", 3)
    assert len(set(rows)) == len(seen) * SAMPLES, "a window came twice"
    for windows, hidden in seen:
        torch.testing.assert_close(hidden, torch.cat(list(dense_end(dense, windows, 32))), rtol=1e-4, atol=1e-5)


def test_sets_come_again_in_turn_when_the_text_is_used_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(tiny_llama(), tiny_tokenizer(), tmp_path / "dense")
    tokens = len(ids_in(text(tmp_path / "text.txt", 7)))
    assert tokens // SEQ_LEN == 2 * SAMPLES + 1, "one window more than two sets, too few for a third"
    seen = runs_of(monkeypatch)
    recipe = {**RECIPE, "calibration": str(tmp_path / "text.txt")}
    sparsellm.prune(source, recipe, out=tmp_path / "out")
    first, second, third, fourth = (windows for windows, _ in seen)
    assert torch.equal(first, third)
    assert torch.equal(second, fourth)
    assert not torch.equal(first, second[: len(first)])


def test_given_ids_and_models_in_memory_have_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = runs_of(monkeypatch)
    source = save_tiny(tiny_llama(), tiny_tokenizer(), tmp_path / "dense")
    sparsellm.prune(source, RECIPE, calibration=ids_of(SAMPLES, SEQ_LEN), out=tmp_path / "out")
    written = str(text(tmp_path / "text.txt", 400))
    sparsellm.prune(tiny_llama(), {**RECIPE, "calibration": written}, tokenizer=tiny_tokenizer())
    assert len(seen) == 8
    for passes in (seen[:4], seen[4:]):
        assert all(torch.equal(windows, passes[0][0]) for windows, _ in passes)


def test_the_windows_of_the_statistics_and_the_fresh_ones_do_not_overlap(tmp_path: Path) -> None:
    written = text(tmp_path / "text.txt", 400)
    ids = ids_in(written)
    windows = calibration_windows(str(written), tiny_tokenizer(), 5, 32, 0, fresh=15)
    assert windows.shape == (20, 32)
    place = {tuple(ids[start : start + 32]): start for start in range(len(ids) - 31)}
    starts = sorted(place[tuple(row)] for row in windows.tolist())
    assert all(after - before >= 32 for before, after in itertools.pairwise(starts))
    many = calibration_windows(str(written), tiny_tokenizer(), 5, 32, 0, fresh=10**5)
    assert len(many) == len(ids) // 32

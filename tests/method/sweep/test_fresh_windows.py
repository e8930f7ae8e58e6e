"""Sweeps run on windows that the walk has not seen, against what the dense model says of them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import sparsellm
from sparsellm import Recipe
from sparsellm.method.sweep import whole_model
from sparsellm.run import calibration as reading
from sparsellm.run import prune as story
from sparsellm.run.choice import Choice
from sparsellm.run.warnings import short_text
from sparsellm.text.windows import calibration_windows
from tests.killing import ahead_of
from tests.method.sweep.helpers import Family, dense_end, ids_of, tiny_zamba
from tests.models import save_tiny, tiny_llama, tiny_tokenizer

SAMPLES, SEQ_LEN = 4, 16
RECIPE = {
    "sparsity": 0.6,
    "samples": SAMPLES,
    "seq_len": SEQ_LEN,
    "batch_tokens": 32,
    "passes": 4,
    "sweep_rate": 0.001,
}


def runs_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Filled with the windows of each pass and the dense model's hidden states for them."""
    seen: list[tuple[Tensor, Tensor]] = []
    ahead_of(
        monkeypatch,
        whole_model,
        "_pass",
        lambda _, run, **__: seen.append((run.windows, torch.cat(list(run.dense)))),
    )
    return seen


def ids_in(path: Path) -> list[int]:
    """The ids of a text; its lines are joined by blank lines."""
    return tiny_tokenizer()(path.read_text().replace("\n", "\n\n"))["input_ids"]  # type: ignore[no-any-return]


def text(path: Path, lines: int) -> Path:
    path.write_text(
        "\n".join(
            f"Line {n} of {n * 7919 % 1009} about {n * 31 % 97}." for n in range(lines)
        )
    )
    return path


@pytest.mark.parametrize(
    ("family", "calibration", "passes"),
    [
        (tiny_llama, "text.txt", None),
        (tiny_llama, "self", 4),  # the text of a model itself has no end
        (
            tiny_zamba,
            "text.txt",
            2,
        ),  # blocks share pruned weights, which the dense model runs without
    ],
    ids=["text", "self", "shared"],
)
def test_each_pass_takes_new_windows_while_the_text_lasts(
    family: Family,
    calibration: str,
    passes: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = save_tiny(family(), tiny_tokenizer(), tmp_path / "dense")
    text(tmp_path / "text.txt", 400)
    monkeypatch.chdir(tmp_path)
    seen, statistics, walk = runs_of(monkeypatch), [], story.walk
    monkeypatch.setattr(
        story,
        "walk",
        lambda models, decided, **rest: (
            statistics.append(decided.windows.first) or walk(models, decided, **rest)
        ),
    )
    recipe = {**RECIPE, "calibration": calibration, "effort": 2, "passes": passes}
    if family is tiny_zamba:
        recipe["exclude"] = [
            "*.x_proj_weight",
            "*.dt_proj_weight",
            "*.A_log",
            "*.conv1d",
        ]
    sparsellm.prune(source, recipe, out=tmp_path / "out")
    dense = AutoModelForCausalLM.from_pretrained(source)
    rows = [tuple(row) for windows, _ in seen for row in windows.tolist()]
    assert [len(windows) for windows, _ in seen] == [SAMPLES // 2] * (passes or 3)
    assert len(set(rows)) == len(seen) * SAMPLES // 2, "a window came twice"
    (windows,) = statistics
    assert len(windows) == SAMPLES
    assert not {*rows} & {*map(tuple, windows.tolist())}, (
        "a window of the statistics is in a pass"
    )
    for windows, hidden in seen:
        torch.testing.assert_close(
            hidden, torch.cat(list(dense_end(dense, windows, 32))), rtol=1e-4, atol=1e-5
        )


def test_sets_come_again_when_the_text_is_used_up(
    llama: Path, tmp_path: Path, steps: Any, monkeypatch: Any
) -> None:
    tokens = len(ids_in(text(tmp_path / "text.txt", 5)))
    assert tokens // SEQ_LEN == 6, (
        "the windows of the statistics, and up to two between them"
    )
    seen = runs_of(monkeypatch)
    sparsellm.prune(
        llama,
        {**RECIPE, "calibration": str(tmp_path / "text.txt")},
        out=tmp_path / "out",
    )
    first, second, third, fourth = (windows for windows, _ in seen)
    assert torch.equal(first, third)
    assert torch.equal(second, fourth)
    assert [len(first), len(second)] == [1, SAMPLES]  # one window is half a set
    # one curve, of four steps as long as the first pass
    taken = [
        (0, 1),
        (1, 2),
        (1.5, 3),
        (2, 3),
        (3, 4),
        (3.5, 5),
    ]
    rates = [
        (0.001 * whole_model.schedule(place, 4, number), number)
        for place, number in taken
    ]
    assert [(rate, number) for _, rate, number, _ in steps] == rates
    assert not {*map(tuple, first.tolist())} & {*map(tuple, second.tolist())}


def test_ids_and_models_in_memory_have_no_others(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = runs_of(monkeypatch)
    result = sparsellm.prune(
        llama, RECIPE, calibration=ids_of(SAMPLES, SEQ_LEN), out=tmp_path / "out"
    )
    assert any(
        warning.startswith("the sweep has too few windows of its own")
        for warning in result.warnings
    )
    written = str(text(tmp_path / "text.txt", 400))
    sparsellm.prune(
        tiny_llama(), {**RECIPE, "calibration": written}, tokenizer=tiny_tokenizer()
    )
    assert len(seen) == 8
    for passes in (seen[:4], seen[4:]):
        assert all(torch.equal(windows, passes[0][0]) for windows, _ in passes)


@pytest.mark.parametrize(
    ("samples", "fresh", "said"),
    [(8, 4, False), (8, 3, True), (3, 3, True), (4, 4, False)],
)
def test_too_few_windows_of_the_sweep_are_said(
    samples: int, fresh: int, said: bool
) -> None:
    """Fewer than half a pass are not used, and fewer than four steps judge themselves."""
    ids, choice = (
        torch.zeros(1, samples, 512, dtype=torch.int64),
        Choice.of(Recipe(effort=1)),
    )
    windows = reading.Windows(
        ids, ids[0, :fresh], "no", 4096, passes=1, of_pass=samples
    )
    assert (
        any(
            "too few windows of its own" in warning
            for warning in short_text(windows, choice)
        )
        == said
    )


def test_fresh_windows_do_not_overlap_those_of_the_statistics(tmp_path: Path) -> None:
    written = text(tmp_path / "text.txt", 400)
    ids = ids_in(written)
    windows = calibration_windows(str(written), tiny_tokenizer(), 5, 32, 0, fresh=15)
    assert windows.shape == (20, 32)
    place = {tuple(ids[start : start + 32]): start for start in range(len(ids) - 31)}
    starts = sorted(place[tuple(row)] for row in windows.tolist())
    assert all(after - before >= 32 for before, after in itertools.pairwise(starts))
    many = calibration_windows(str(written), tiny_tokenizer(), 5, 32, 0, fresh=10**5)
    # less than one window is left of each gap
    assert len(ids) // 32 - 5 <= len(many) <= len(ids) // 32
    assert torch.equal(many[:5], windows[:5])
    assert torch.equal(
        windows[:5], calibration_windows(str(written), tiny_tokenizer(), 5, 32, 0)
    )


def test_windows_of_a_sweep_are_cut_to_its_steps() -> None:
    windows = torch.arange(2 * 1300).view(2, 1300)
    plain, led = reading._cut(windows, None, 1), reading._cut(windows, 9, 1)
    assert plain.tolist() == [
        row[start : start + 433] for row in windows.tolist() for start in (0, 433, 866)
    ]
    assert torch.equal(plain[:, 1:], led[:, 1:])
    assert set(led[:, 0].tolist()) == {9}
    assert windows[0, 0] == 0, "the windows of the statistics changed"
    assert [
        reading._cut(windows[:, :1000], 9, sharers).shape[1] for sharers in (1, 2, 8)
    ] == [500, 250, 125]
    assert torch.equal(reading._cut(windows[:, :700], None, 1), windows[:, :700])
    assert [whole_model.cut_to(2048, ranks) for ranks in (1, 2, 4, 8)] == [
        512,
        256,
        128,
        128,
    ]


def test_a_model_on_disk_writes_its_text_once(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it wrote is kept, so that a run that is resumed does not wait for it again."""
    monkeypatch.setenv("SPARSELLM_CACHE", str(tmp_path / "cache"))
    write, drawn, written = (
        reading.self_generated_windows,
        runs_of(monkeypatch),
        list[Tensor](),
    )
    monkeypatch.setattr(
        reading,
        "self_generated_windows",
        lambda *given: written.append(write(*given)) or written[-1],
    )
    for number, seed in enumerate((0, 0, 1)):
        sparsellm.prune(
            llama,
            {**RECIPE, "calibration": "self", "seed": seed, "passes": 1},
            out=tmp_path / str(number),
        )
    assert len(written) == 2
    first, second, third = (windows for windows, _ in drawn)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)

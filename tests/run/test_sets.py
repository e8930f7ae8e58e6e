"""Blocks take their statistics from several sets of calibration windows in turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import sparsellm
from sparsellm import Recipe
from sparsellm.run import walk
from sparsellm.run.calibration import Windows
from sparsellm.run.choice import Choice
from sparsellm.text.windows import calibration_windows
from tests.killing import ahead_of
from tests.models import save_tiny, tiny_llama, tiny_tokenizer

SAMPLES, SEQ_LEN, BLOCKS = 4, 16, 4
FIELDS: dict[str, Any] = {
    "sparsity": 0.5, "samples": SAMPLES, "seq_len": SEQ_LEN, "batch_tokens": 32, "products": "float32",
    "calibration": "pydoc",
}  # fmt: skip


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Filled with the inputs of each block that its statistics are of."""
    seen: list[Tensor] = []

    def recorded(
        index: int, linears: Any, patterns: Any, stream: Any, *_: Any, **__: Any
    ) -> None:
        seen.append(torch.cat([hidden.clone() for hidden in stream.hidden]))

    ahead_of(monkeypatch, walk, "BlockTask", recorded)
    return seen


@pytest.mark.parametrize("sets", [1, 2, 3])
def test_each_block_sees_its_own_set_behind_the_pruned_blocks(
    sets: int, inputs: list[Tensor], tmp_path: Path
) -> None:
    source = save_tiny(
        tiny_llama(num_hidden_layers=BLOCKS), tiny_tokenizer(), tmp_path / "dense"
    )
    result = sparsellm.prune(
        source, {**FIELDS, "effort": 0, "sets": sets}, out=tmp_path / "out"
    )
    assert result.calibration_tokens == sets * SAMPLES * SEQ_LEN
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    windows = calibration_windows(
        "pydoc", tiny_tokenizer(), SAMPLES, SEQ_LEN, 0, fresh=(sets - 1) * SAMPLES
    )
    assert len({*map(tuple, windows.tolist())}) == sets * SAMPLES
    for index, hidden in enumerate(inputs):
        subset = windows[SAMPLES * (index % sets) :][:SAMPLES]
        expected = (
            pruned(subset, output_hidden_states=True).hidden_states[index].detach()
        )
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)


def test_given_ids_and_short_texts_are_one_set(
    inputs: list[Tensor], tmp_path: Path
) -> None:
    source = save_tiny(
        tiny_llama(num_hidden_layers=2), tiny_tokenizer(), tmp_path / "dense"
    )
    windows = calibration_windows("pydoc", tiny_tokenizer(), SAMPLES, SEQ_LEN, 0)
    recipe = {**FIELDS, "effort": 0}
    sparsellm.prune(source, recipe, calibration=windows, out=tmp_path / "given")
    sparsellm.prune(source, {**recipe, "effort": 0, "sets": 1}, out=tmp_path / "one")
    given, one = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("given", "one")
    )
    assert all(torch.equal(value, one[name]) for name, value in given.items())
    assert len(inputs) == 4
    short = "A text that has room for the windows of one set, not two. " * 2
    assert (
        SAMPLES * SEQ_LEN
        < len(tiny_tokenizer()(short)["input_ids"])
        < 2 * SAMPLES * SEQ_LEN
    )
    (tmp_path / "short.txt").write_text(short)
    recipe = {
        **recipe,
        "calibration": str(tmp_path / "short.txt"),
        "effort": 0,
        "sets": 2,
        "sweep_rate": 0.1,
    }
    result = sparsellm.prune(source, recipe, out=tmp_path / "short")
    for said in (
        "room for 1 of 2 sets",
        "no sweep follows, so sweep_rate changes nothing",
    ):
        assert [line for line in result.warnings if said in line]
    first = AutoModelForCausalLM.from_pretrained(source).get_input_embeddings()
    windows = calibration_windows(
        str(tmp_path / "short.txt"), tiny_tokenizer(), SAMPLES, SEQ_LEN, 0
    )
    torch.testing.assert_close(inputs[4], first(windows).detach())
    assert len(inputs[5]) == SAMPLES


def test_more_sweeps_take_more_sets() -> None:
    assert [Choice.of(Recipe(effort=effort)).sets for effort in (0, None, 2, 3)] == [
        1,
        2,
        4,
        4,
    ]
    assert [
        Choice.of(Recipe(**given)).sets for given in ({"passes": 0}, {"sets": 3})
    ] == [1, 3]


@pytest.mark.parametrize(
    ("fresh", "of_pass", "parts", "passes"),
    [
        (64, 16, [16] * 4, 4),
        (40, 16, [16, 16, 8, 4], 6),
        (7, 16, [4], 16),
        (0, 1, [1] * 4, 4),
        (1, 3, [3], 4),
    ],
)
def test_a_sweep_longer_than_a_text_reads_it_again(
    fresh: int, of_pass: int, parts: list[int], passes: int
) -> None:
    """4 passes are asked for: over fresh windows, then those of the statistics, until their tokens are enough."""
    ids = torch.arange((fresh + SAMPLES) * SEQ_LEN).view(-1, SEQ_LEN)
    windows = Windows(
        ids[None, :SAMPLES],
        ids[SAMPLES:],
        "no",
        32,
        passes=4,
        of_pass=of_pass,
        divided=True,
    )
    assert (
        list(map(len, windows.by_pass)),
        windows.passes_over(4 * of_pass * SEQ_LEN),
    ) == (parts, passes)
    ids = torch.arange(8 * 1600).view(-1, 1600)  # which are cut to 3 of 533
    assert (
        Windows(ids[None, :4], ids[4:], "no", 32, passes=4, divided=True).passes_over(
            4 * 1600
        )
        == 4
    )


def test_a_short_text_makes_more_passes_and_a_long_one_no_longer_ones(
    tmp_path: Path, steps: Any
) -> None:
    source, ids = (
        save_tiny(tiny_llama(), tiny_tokenizer(), tmp_path / "dense"),
        torch.arange(64).view(4, 16) % 50,
    )
    sweeps = sparsellm.prune(
        source, {**FIELDS, "sweep_tokens": 192}, calibration=ids, out=tmp_path / "out"
    ).sweeps
    assert [sweep.passes for sweep in sweeps] == [0, 1, 2, 3]
    for model, out in ((source, tmp_path / "few"), (tiny_llama(), None)):
        steps.clear()
        sparsellm.prune(model, {**FIELDS, "sweep_tokens": 32}, calibration=ids, out=out)
        assert [tokens for *_, tokens in steps] == [32]

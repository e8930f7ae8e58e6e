"""Windows against a plain re-reading of the text."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsellm import machine
from sparsellm.errors import DataError
from sparsellm.text import self_generated, windows
from sparsellm.text.self_generated import self_generated_windows
from sparsellm.text.texts import Text
from sparsellm.text.windows import (
    calibration_windows,
    check_seq_len,
    evaluation_windows,
    windows_of_ids,
)
from sparsepack.errors import Note
from tests.models import POSITIONS, tiny_gpt2, tiny_llama, tiny_tokenizer


@pytest.fixture
def counting(tmp_path: Path) -> tuple[str, list[int]]:
    """A file and its tokens; every stretch of 8 tokens or more stands at one place only."""
    path = tmp_path / "counting.txt"
    path.write_text(" ".join(f"{number} {number * 7919}" for number in range(400)))
    return str(path), tiny_tokenizer()(path.read_text())["input_ids"]


def written(
    samples: int, seq_len: int, seed: int = 0, *, model: Any = None, **changes: Any
) -> torch.Tensor:
    """Windows that a model writes."""
    given = {"bos": None, "fresh": 0, "progress": lambda done, total: None} | changes
    return self_generated_windows(
        model or tiny_llama(), tiny_tokenizer(), samples, seq_len, seed, **given
    )


def places(windows: torch.Tensor, ids: list[int]) -> list[int]:
    """Where each window stands in the text; exactly one place is required."""
    starts = []
    for window in windows.tolist():
        here = [
            start
            for start in range(len(ids) - len(window) + 1)
            if ids[start : start + len(window)] == window
        ]
        assert len(here) == 1
        starts += here
    return starts


def test_windows_of_a_long_text_are_disjoint_in_random_order(
    counting: tuple[str, list[int]],
) -> None:
    source, ids = counting
    for samples in (1, 7, len(ids) // 32):
        starts = places(
            calibration_windows(source, tiny_tokenizer(), samples, 32, seed=3), ids
        )
        assert len(starts) == samples
        assert (torch.tensor(sorted(starts)).diff() >= 32).all()
    assert starts != sorted(starts)
    assert min(starts) < len(ids) / 4
    assert max(starts) > 3 * len(ids) / 4


def test_a_short_text_is_drawn_from_with_overlap(
    counting: tuple[str, list[int]],
) -> None:
    source, ids = counting
    with pytest.warns(
        Note,
        match=rf"has {len(ids)} tokens, so that {len(ids) // 64 + 5} windows of 64 overlap",
    ):
        windows = calibration_windows(
            source, tiny_tokenizer(), len(ids) // 64 + 5, 64, seed=0
        )
    assert len(places(windows, ids)) == len(ids) // 64 + 5


def test_the_seed_decides(counting: tuple[str, list[int]]) -> None:
    draws = [
        calibration_windows(counting[0], tiny_tokenizer(), 6, 32, seed)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    torch.manual_seed(9)
    state = torch.random.get_rng_state()
    calibration_windows(counting[0], tiny_tokenizer(), 6, 32, 0)
    assert torch.equal(state, torch.random.get_rng_state())


def test_evaluation_cuts_the_text_in_order_and_drops_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text(
        "\n".join(
            [" = Heading = ", " ", *(f" Row {number} . " for number in range(60)), ""]
        )
    )
    for add_bos in (False, True):
        tokenizer = tiny_tokenizer(add_bos)
        ids = tokenizer("\n\n".join(path.read_text().split("\n")))["input_ids"]
        windows = evaluation_windows(str(path), tokenizer, 50, bos="no")
        assert windows.shape == (len(ids) // 50, 50)
        assert windows.flatten().tolist() == ids[: len(ids) // 50 * 50]
        # one beginning-of-text token in all, not one per window
        assert (windows == 0).sum() == add_bos
    assert evaluation_windows(str(path), tokenizer, 50, max_tokens=149).shape == (2, 50)


@pytest.mark.parametrize("samples", [7, 400])
def test_bos_before_every_calibration_window(
    counting: tuple[str, list[int]], samples: int
) -> None:
    """Also if the text is so short that windows overlap."""
    source, ids = counting
    windows = calibration_windows(
        source, tiny_tokenizer(add_bos=True), samples, 32, seed=3
    )
    assert (windows[:, 0] == tiny_tokenizer(add_bos=True).bos_token_id).all()
    assert len(places(windows[:, 1:], ids)) == samples
    assert torch.equal(
        windows,
        calibration_windows(source, tiny_tokenizer(), samples, 32, seed=3, bos="yes"),
    )


def test_windows_without_bos_are_those_of_the_papers(
    counting: tuple[str, list[int]],
) -> None:
    source, _ = counting
    for tokenizer, bos in (
        (tiny_tokenizer(), "auto"),
        (tiny_tokenizer(), "no"),
        (tiny_tokenizer(add_bos=True), "no"),
    ):
        windows = calibration_windows(source, tokenizer, 7, 32, seed=3, bos=bos)
        text = torch.tensor(tokenizer(Path(source).read_text())["input_ids"])
        generator = torch.Generator().manual_seed(3)
        spare = len(text) - 7 * 32
        starts = torch.randint(
            0, spare + 1, (7,), generator=generator
        ).sort().values + 32 * torch.arange(7)
        starts = starts[torch.randperm(7, generator=generator)]
        assert torch.equal(
            windows, torch.stack([text[start : start + 32] for start in starts])
        )


def test_bos_cannot_be_set_for_token_ids() -> None:
    with pytest.raises(
        DataError, match="bos is 'yes', and token ids are used as they are"
    ):
        windows_of_ids(
            torch.zeros(2, 8, dtype=torch.int64), tiny_llama().config, bos="yes"
        )


def test_a_text_that_is_too_short_says_by_how_much(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("abcdefgh")
    tokens = len(tiny_tokenizer()("abcdefgh")["input_ids"])
    with pytest.raises(
        DataError, match=rf"has {tokens} tokens and {tokens + 1} are needed"
    ):
        calibration_windows(str(path), tiny_tokenizer(), 2, tokens, 0)
    with pytest.raises(DataError, match="max_tokens is 7"):
        evaluation_windows("pydoc", tiny_tokenizer(), 8, 7)
    with pytest.raises(DataError, match=rf"has {tokens} tokens and 99 are needed"):
        evaluation_windows(str(path), tiny_tokenizer(), 99)
    assert calibration_windows(str(path), tiny_tokenizer(), 3, tokens - 1, 0).shape == (
        3,
        tokens - 1,
    )


def test_more_windows_than_the_memory_holds_are_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the text is read, and before anything is allocated for them."""
    monkeypatch.setattr(
        windows, "read_source", lambda *_: pytest.fail("the text was read")
    )
    monkeypatch.setattr(machine, "free_memory", lambda: 1000)
    with pytest.raises(DataError, match="of memory are free"):
        calibration_windows("pydoc", tiny_tokenizer(), 8, 16, 0)
    with pytest.raises(
        DataError, match=r"8 windows of 16 .* lower samples, effort or seq_len"
    ):
        written(7, 16, fresh=1)


def test_a_text_larger_than_memory_is_refused(
    counting: tuple[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer holds a text more than a hundred times."""
    source, _ = counting
    monkeypatch.setattr(windows, "TOKENISING", 1 << 20)
    needed = windows.TOKENISING * len(Path(source).read_text())
    monkeypatch.setattr(machine, "free_memory", lambda: needed - 1)
    with pytest.raises(
        DataError, match=r"tokenising it takes about .* give a part of it"
    ):
        evaluation_windows(source, tiny_tokenizer(), 16)
    monkeypatch.setattr(machine, "free_memory", lambda: needed)
    assert len(evaluation_windows(source, tiny_tokenizer(), 16))
    documents = itertools.repeat("word " * 1000)  # without an end
    with pytest.raises(
        DataError, match=r"more than .* million characters; .* give a part of it"
    ):
        calibration_windows(Text(documents), tiny_tokenizer(), 4, 16, 0)


def test_more_windows_than_the_text_has_are_refused(
    counting: tuple[str, list[int]],
) -> None:
    source, ids = counting
    most = max(len(ids) - 16, 1024)
    with pytest.raises(
        DataError, match=f"{most} windows of 16 may be drawn, not {most + 1}"
    ):
        calibration_windows(source, tiny_tokenizer(), most + 1, 16, 0)
    assert calibration_windows(source, tiny_tokenizer(), most, 16, 0).shape == (
        most,
        16,
    )


def test_windows_longer_than_the_positions_are_refused(family: Any) -> None:
    config = family().config
    check_seq_len(config, POSITIONS)
    with pytest.raises(
        DataError,
        match=f"seq_len is {POSITIONS + 1}, and this model has {POSITIONS} positions",
    ):
        check_seq_len(config, POSITIONS + 1)


def test_per_document_windows_lie_inside_one_long_document_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    documents = [
        "short",
        *(
            " ".join(f"{word}{number}" for number in range(60))
            for word in ("a", "b", "c")
        ),
    ]
    text, tokenizer = Text(documents, joiner=" ", per_document=True), tiny_tokenizer()
    drawn = {
        tokenizer.decode(window)
        for window in calibration_windows(text, tokenizer, 12, 24, seed=0)
    }
    assert len(drawn) > 6
    assert all(any(part in document for document in documents[1:]) for part in drawn)
    monkeypatch.setattr(windows, "_MOST_MISSES", 9)
    with pytest.raises(DataError, match="too few documents longer than 5000"):
        calibration_windows(text, tokenizer, 1, 5000, seed=0)


def test_a_model_writes_the_same_text_for_the_same_seed() -> None:
    model = tiny_gpt2()
    one, again, other = (written(19, 30, seed, model=model) for seed in (0, 0, 1))
    assert one.shape == (19, 30)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert len({tuple(window) for window in one.tolist()}) == 19


def test_fresh_windows_a_model_writes_leave_the_others_as_they_are() -> None:
    """Also where the last batch of the others is not full."""
    said: list[tuple[int, int]] = []
    more = written(19, 8, fresh=38, progress=lambda *tokens: said.append(tokens))
    assert more.shape == (57, 8)
    assert torch.equal(more[:19], written(19, 8))
    assert len({tuple(window) for window in more.tolist()}) == 57
    assert said == sorted(said)
    assert said[-1] == (57 * 8, 57 * 8)


def test_self_generated_text_is_greedy_first_then_follows_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the cache of keys and values, as without it."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    sampled = written(4, 20, 2, bos=0)
    monkeypatch.setattr(self_generated, "GREEDY_TOKENS", 20)
    greedy = written(4, 20, 2, bos=0)
    assert (greedy[:, 0] == 0).all()
    # (4, 20)
    likeliest = model(input_ids=greedy).logits[:, :, : len(tokenizer)].argmax(-1)
    # after the end of a text, a new one starts at random
    continues = greedy[:, 1:-1] != tokenizer.eos_token_id
    assert torch.equal(greedy[:, 2:][continues], likeliest[:, 1:-1][continues])
    assert torch.equal(sampled[:, 2:6], greedy[:, 2:6])
    assert not torch.equal(sampled[:, 6:], greedy[:, 6:])


def test_a_model_with_fewer_tokens_than_its_tokenizer_writes_its_own() -> None:
    known = len(tiny_tokenizer()) - 20
    assert int(written(8, 20, model=tiny_llama(vocab_size=known)).max()) < known

"""A mixture of calibration texts: its grammar, its windows, and a run on it; conversations as a text."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsellm.errors import DataError
from sparsellm.inputs import mixture_of
from sparsellm.text.sources import as_text, check_sources, read_source, shares_of
from sparsellm.text.texts import Text
from sparsellm.text.windows import calibration_windows, mixed_windows
from tests.models import save_tiny, tiny_llama, tiny_tokenizer

CHAT = [
    {"role": "user", "content": "what is it"},
    {"role": "assistant", "content": "a name"},
]
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two texts without a common character, and conversations."""
    monkeypatch.chdir(tmp_path)
    Path("a,b.txt").write_text(
        " ".join(f"{number} {number * 7919}" for number in range(900))
    )
    Path("words.jsonl").write_text(
        json.dumps({"text": "some words that come again and again\n" * 300}) + "\n"
    )
    Path("chat.jsonl").write_text((json.dumps({"messages": CHAT}) + "\n") * 200)
    return ["a,b.txt", "words.jsonl", "chat.jsonl"]


def drawn(source: str, samples: int, fresh: int) -> torch.Tensor:
    return calibration_windows(
        source, tiny_tokenizer(), samples, 32, seed=1, fresh=fresh
    )


def test_shares_follow_names_with_commas_and_colons() -> None:
    source = r"a,b.txt:1,hub:owner/name:2024:train:.5, C:\x\c.txt:0.50"
    assert shares_of(source) == {
        "a,b.txt": 0.5,
        "hub:owner/name:2024:train": 0.25,
        r"C:\x\c.txt": 0.25,
    }
    for alone in (
        "a.txt",
        "a,b.txt",
        "hub:owner/name:2024",
        "a.txt:0.5,b.txt",
        "a:1,b:1,",
    ):
        assert mixture_of(alone) == []
        assert shares_of(alone) == {alone: 1.0}


def test_every_batch_of_a_mixture_has_windows_of_all_texts(files: list[str]) -> None:
    mixture = "a,b.txt:0.5,words.jsonl:0.25,pydoc:0.25"
    windows, sources = mixed_windows(mixture, [8, 8, 4], drawn)
    assert torch.equal(windows, mixed_windows(mixture, [8, 8, 4], drawn)[0])
    for batch in range(0, 20, 4):
        assert sorted(sources[batch : batch + 4]) == [
            "a,b.txt",
            "a,b.txt",
            "pydoc",
            "words.jsonl",
        ]
    # the same windows from the function that draws from one source
    alike = mixed_windows(mixture, [8, 12], drawn)[0]
    assert torch.equal(drawn(mixture, 8, 12), alike)
    for source, first, further in (
        ("a,b.txt", 4, 6),
        ("words.jsonl", 2, 3),
        ("pydoc", 2, 3),
    ):
        assert torch.equal(
            windows[[name == source for name in sources]], drawn(source, first, further)
        )
    # where one text ends, whole groups end
    most = len(drawn("words.jsonl", 2, 10_000)) - 2
    assert len(
        mixed_windows("pydoc:1,words.jsonl:1", [4] * (most + 9), drawn)[0]
    ) == 4 * (1 + most // 2)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "pydoc:0.5,self:0",
            "source 'self' in text mixture .* has share 0; leave it out",
        ),
        ("pydoc:1,pydoc:2", "'pydoc' .* occurs twice"),
        ("a.txt:1,file:./a.txt:2", "names one text twice; add its shares"),
        (
            "a.txt:1,b/a.txt:2",
            "has files of one name, which reports cannot tell apart; rename one",
        ),
        (
            "pydoc:1,wikitxt2:2",
            "unknown text source 'wikitxt2'; did you mean 'wikitext2'",
        ),
        (
            "pydoc,words:0.5",
            "'pydoc' in .* has no share of the windows; write pydoc:0.5,words:0.5",
        ),
        ("pydoc:1,nowhere.txt:2", "nowhere.txt' does not exist"),
    ],
)
def test_unusable_mixtures_are_refused_before_the_work(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("b").mkdir()
    for name in ("a.txt", "b/a.txt"):
        Path(name).write_text("some text")
    with pytest.raises(DataError, match=message):
        check_sources(source, "calibration")
    with pytest.raises(DataError, match="mixes texts for calibration"):
        as_text("pydoc:1,wikitext2:1", "text", "evaluation")


def test_a_text_that_has_no_window_is_named(files: list[str]) -> None:
    Path("short.txt").write_text("12345")
    with pytest.raises(
        DataError,
        match=r"'words\.jsonl' .* its share of 4 windows is none; raise its share",
    ):
        mixed_windows("pydoc:9,words.jsonl:1", [4], drawn)
    with pytest.raises(
        DataError, match=r"source 'short\.txt' has 5 tokens and 33 are needed"
    ):
        mixed_windows("pydoc:1,short.txt:1", [4], drawn)


def test_conversations_are_joined_by_the_chat_template(files: list[str]) -> None:
    tokenizer = tiny_tokenizer()
    for text in (
        read_source("chat.jsonl", "calibration"),
        as_text([{"messages": CHAT}] * 200, "text", "calibration"),
    ):
        with pytest.raises(DataError, match="the tokenizer has no chat template"):
            calibration_windows(text, tokenizer, 4, 32, 0)
        tokenizer.chat_template = TEMPLATE
        shown = "[user]what is it\n[assistant]a name\n\n\n" * 200
        assert all(
            tokenizer.decode(window) in shown
            for window in calibration_windows(text, tokenizer, 4, 32, 0)
        )
        tokenizer.chat_template = None
    tokenizer = copy.deepcopy(tiny_tokenizer(add_bos=True))
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    windows = calibration_windows(Text([CHAT] * 200), tokenizer, 4, 32, 0)
    # that of the window, none of the template
    assert (windows == 0).nonzero()[:, 1].tolist() == [0] * 4
    for bad in ([{"role": "user"}], [{"role": "user", "content": 3}], ["a"]):
        with pytest.raises(
            DataError, match="a conversation of the text cannot be read"
        ):
            calibration_windows(Text([bad]), tokenizer, 4, 32, 0)


def test_a_run_on_a_mixture_reports_each_text(files: list[str], run: Any) -> None:
    """Also the text that the model writes; nothing that is written names a folder; a comparison takes it, too."""
    tokenizer = copy.deepcopy(tiny_tokenizer())  # other tests use it as it is
    tokenizer.chat_template = TEMPLATE
    model = save_tiny(tiny_llama(), tokenizer, Path("model"))
    mixture = "./a,b.txt:2,chat.jsonl:1,self:1"
    given = ("--calibration", mixture, "--samples", 16, "--seq-len", 32)
    _, stdout, _ = run("prune", model, "--out", "pruned", *given, exits=0)
    record = json.loads(Path("pruned/pruning.json").read_text())
    assert record["recipe"]["calibration"] == "a,b.txt:2,chat.jsonl:1,self:1"
    for sweep in record["sweeps"]:
        assert sweep["sources"].keys() == {"a,b.txt", "chat.jsonl", "self"}
        assert (
            min(sweep["sources"].values())
            <= sweep["held_out"]
            <= max(sweep["sources"].values())
        )
    assert "chat.jsonl" in Path("pruned/report.html").read_text()
    best = min(record["sweeps"], key=lambda entry: entry["held_out"])["sources"]
    assert (
        f"a,b.txt {best['a,b.txt']:.3f}, chat.jsonl {best['chat.jsonl']:.3f}, self {best['self']:.3f}"
        in stdout
    )
    line = (
        "compare",
        model,
        "--out",
        "compared",
        "--sparsity",
        0.5,
        "--method",
        "wanda,magnitude",
        "--text",
        "pydoc",
    )
    for _ in range(2):
        run(*line, *given, "--max-tokens", 128, exits=0)

"""A conversation in the terminal."""

from __future__ import annotations

import copy
import io
import signal
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from sparsellm.app.console import visible
from sparsellm.interrupts import Interrupted
from sparsellm.serving.terminal import Manner, chat
from tests.models import save_tiny, tiny_llama, tiny_tokenizer

QUICK = ("--max-new-tokens", 12)


def test_each_answer_follows_all_before(
    packed: Path, greedy: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = greedy("system: Be brief.\nuser: hi\nassistant:", 12)
    second = greedy(
        f"system: Be brief.\nuser: hi\nassistant: {first}\nuser: and\nassistant:", 12
    )
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("hi\n\nand\n/reset\nhi\n/quit\nnot read\n")
    )
    stdout = run(
        "chat", packed, "--system", "Be brief.", *QUICK, columns=10_000, exits=0
    )[1]
    assert stdout == "".join(f"{visible(text)}\n" for text in (first, second, first))


def test_ctrl_c_stops_an_answer_and_sigterm_the_talk(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[str] = []
    signals = iter((signal.SIGINT, None, signal.SIGTERM))

    def show(text: str) -> None:
        if text == "\n":
            pieces.append("|")
        elif (pieces or ["|"])[-1] == "|":
            pieces.append(text)
            if (signum := next(signals)) is not None:
                signal.raise_signal(signum)

    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\nhi\nhi\nhi\n"))
    before = signal.signal(signal.SIGTERM, Mock(side_effect=Interrupted))
    try:
        with pytest.raises(Interrupted):
            chat(
                str(packed),
                Manner(max_new_tokens=40, seed=2**63 - 1),
                {},
                show=show,
                say=pieces.append,
            )
    finally:
        signal.signal(signal.SIGTERM, before)
    assert pieces.count("|") == 2


def test_a_full_context_is_said_and_reset_goes_on(
    packed: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{'hello ' * 5000}\nhi\n"))
    _, stdout, stderr = run("chat", packed, *QUICK, exits=0)
    assert "and the model takes 8192; /reset begins anew" in stderr
    assert stdout.endswith("\n")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "the model has no chat template"),
        (("--temperature", "-1"), "--temperature is -1.0"),
        (("--threads", "0"), "--threads is 0"),
        (
            ("--system", "\udcff"),
            "half of a surrogate pair",
        ),  # a byte that is not UTF-8
    ],
)
def test_what_cannot_talk_is_one_line(
    options: Any, said: str, llama: Path, run: Any
) -> None:
    stderr = run("chat", llama, *options, exits=2)[2]
    assert stderr.count("error: ") == 1
    assert said in stderr.splitlines()[-1]


def test_a_template_that_refuses_is_one_line(
    tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer().__class__(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="</s>"
    )
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    stderr = run("chat", save_tiny(tiny_llama(), tokenizer, tmp_path), exits=2)[2]
    assert stderr.endswith(
        "refuses the conversation: TemplateError: roles must alternate\n"
    )


def test_a_template_that_takes_all_memory_is_one_line(
    tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = "{{ 'x' * 10**10 }}"
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    stderr = run("chat", save_tiny(tiny_llama(), tokenizer, tmp_path), exits=2)[2]
    assert "refuses the conversation: it takes more than 1024 MiB of memory" in stderr

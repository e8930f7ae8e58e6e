"""Conversations by chat templates, which run within limits."""

from __future__ import annotations

import copy
import os
import signal
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from sparsellm.errors import DataError
from sparsellm.text import conversations
from sparsellm.text.conversations import rendered
from tests.models import tiny_tokenizer

ASKED = [{"role": "user", "content": "é\n\ud800"}, {"role": "user", "content": "b"}]
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
FOR_EVER = (
    "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
)


def with_template(template: str) -> PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def renderer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Another process than the one of all tests."""
    other = conversations._Renderer()
    monkeypatch.setattr(conversations, "_renderer", other)
    yield other
    other.stop()


@pytest.mark.parametrize("asks", [False, True])
def test_a_text_is_what_the_tokenizer_makes(asks: bool) -> None:
    tokenizer = with_template(PLAIN)
    expected = tokenizer.apply_chat_template(
        ASKED, add_generation_prompt=asks, tokenize=False
    )
    assert rendered(tokenizer, ASKED, asks=asks) == expected
    # as messages of other programs have them
    nothing = [{**message, "tool_calls": None} for message in ASKED]
    tokenizer.chat_template = "{{ messages[0] }}"
    assert "tool_calls" not in rendered(tokenizer, nothing, asks=asks)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 'x' * 10**10 }}", "takes more than 1024 MiB of memory"),
        ("{{ 'x'.ljust(10**10) }}", "takes more than 1024 MiB of memory"),
        ("{{ 'x' * 10**7 }}", "makes 10,000,000 characters of "),
        ("{{ raise_exception('no\n roles') }}", "TemplateError: no roles"),
        ("{{ messages[5].content.a }}", "UndefinedError"),
        ("{% if %}", "TemplateSyntaxError"),
    ],
)
def test_a_template_that_takes_too_much_is_refused(template: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        rendered(with_template(template), ASKED, asks=True)
    # and the next one is rendered
    assert rendered(with_template("{{ bos_token }}a"), ASKED, asks=True).endswith("a")


def test_one_that_does_not_end_is_ended(
    renderer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversations, "SECONDS", 1)
    with pytest.raises(DataError, match="it takes more than 1 seconds"):
        rendered(with_template(FOR_EVER), ASKED, asks=True)
    assert rendered(with_template("a"), ASKED, asks=True) == "a"


def test_a_process_that_was_killed_is_named_and_replaced(renderer: Any) -> None:
    assert rendered(with_template("a"), ASKED, asks=True) == "a"
    # such as by the system, for its memory
    os.kill(renderer.start().pid, signal.SIGKILL)
    renderer.start().wait()
    with pytest.raises(DataError, match=r"its process ended \(-9\)"):
        rendered(with_template("b"), ASKED, asks=True)
    assert rendered(with_template("b"), ASKED, asks=True) == "b"


def test_after_ctrl_c_no_answer_is_that_to_another_question(
    renderer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = renderer.start()
    with monkeypatch.context() as patched:

        def interrupted() -> str:
            raise KeyboardInterrupt

        patched.setattr(process.stdout, "readline", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rendered(with_template("a"), ASKED, asks=True)
    assert rendered(with_template("b"), ASKED, asks=True) == "b"

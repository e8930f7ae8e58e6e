"""A conversation with a model in the terminal."""

from __future__ import annotations

import io
import re
import secrets
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from sparsellm import interrupts
from sparsellm.serving.prompts import Message, chat_ids, open_model
from sparsellm.serving.protocol import Seed, Temperature, Tokens, Words
from sparsepack.files import context_limit
from sparsepack.generation import Sampling, continuation

HELP = "/reset begins anew, /quit or Ctrl-D ends, Ctrl-C stops an answer"
ENDS = ("/quit", "/exit", "/bye")


class Manner(BaseModel):
    """How a conversation is held: the first message, and limit, sampling and CPU threads of the answers. None means no
    first message, the temperature that the model recommends, another seed each time, or torch's number of threads."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False
    )

    system: Words | None = None
    max_new_tokens: Tokens = 512
    temperature: Temperature | None = None
    seed: Seed | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None


def chat(
    directory: str,
    manner: Manner,
    options: dict[str, str],
    *,
    show: Callable[[str], None],
    say: Callable[[str], None],
) -> None:
    """Answers each line of stdin with a model by its name, packed or dense, until the end of stdin or a command.

    ``options`` are those of ``sparsepack.loading.load``; ``show`` prints a piece of an answer, ``say`` a line about
    the conversation. Errors as in ``sparsellm.serving.prompts.chat_ids``."""
    model, tokenizer = open_model(directory, options, template=True)
    limit = context_limit(model.config)
    seed = manner.seed
    if seed is None:
        seed = secrets.randbits(62)
    beginning: list[Message] = []
    if manner.system is not None:
        beginning.append({"role": "system", "content": manner.system})
    messages = list(beginning)
    received: list[int] = []
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401 - arrow keys and history in the lines that input() reads
        say(HELP)
    while (line := _line(say)) not in (None, *ENDS):
        if line == "/reset":
            messages = list(beginning)
        if not line or line == "/reset":
            continue
        messages.append({"role": "user", "content": line})
        ids = chat_ids(tokenizer, messages)
        if limit is None:
            room = manner.max_new_tokens
        else:
            room = min(manner.max_new_tokens, limit - ids.shape[1])
        if room < 1:
            messages.pop()
            say(
                f"the conversation has {ids.shape[1]} tokens and the model takes {limit}; /reset begins anew"
            )
            continue
        sampling = Sampling(
            max_new_tokens=room,
            temperature=manner.temperature,
            seed=(seed + len(messages)) % 2**63,
        )
        received.clear()
        with interrupts.handled_by(lambda signum, _: received.append(signum)):
            answer = continuation(
                model,
                tokenizer,
                ids,
                sampling,
                threads=manner.threads,
                on_text=show,
                cancelled=lambda: bool(received),
            )
        # Ctrl-C stops the answer; other signals end the conversation
        for signum in {*received} - {signal.SIGINT}:
            signal.raise_signal(signum)
        show("\n")
        messages.append({"role": "assistant", "content": answer.text})


def _line(say: Callable[[str], None]) -> str | None:
    """The next line of stdin; None at its end. What looks like a command and is none is answered with a line of help,
    and returned as an empty line."""
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    if re.fullmatch(r"/\w+", line) is None or line in ("/reset", *ENDS):
        return line
    if line == "/help":
        say(HELP)
    else:
        say(f"{line} is no command here; {HELP}")
    return ""

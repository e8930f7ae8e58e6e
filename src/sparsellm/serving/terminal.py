"""A conversation with a model in the terminal."""

from __future__ import annotations

import io
import re
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace

from sparsellm import interrupts
from sparsellm.serving.prompts import Message, chat_ids, open_model
from sparsepack.arguments import check
from sparsepack.files import context_limit
from sparsepack.generation import MOST_THREADS, Sampling, check_text, continuation

HELP = "/reset begins anew, /quit or Ctrl-D ends, Ctrl-C stops an answer"
ENDS = ("/quit", "/exit", "/bye")


@dataclass(frozen=True)
class Manner(Sampling):
    """How a conversation is held: the sampling of its answers, with another seed each time unless one is given, the
    first message, and the CPU threads. None means the temperature that the model recommends, no first message, or
    torch's number of threads. A SettingError names what is out of range."""

    max_new_tokens: int = 512
    temperature: float | None = None
    seed: int = field(default_factory=lambda: secrets.randbits(62))
    system: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.system is not None:
            check_text("system", self.system)
        if self.threads is not None:
            check("threads", self.threads, int, least=1, most=MOST_THREADS)


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
    messages: list[Message] = []
    received: list[int] = []
    for line in _lines(say):
        if line == "/reset":
            messages.clear()
            continue
        if not messages and manner.system is not None:
            messages.append({"role": "system", "content": manner.system})
        messages.append({"role": "user", "content": line})
        ids = chat_ids(tokenizer, messages)
        room = manner.max_new_tokens
        if limit is not None:
            room = min(room, limit - ids.shape[1])
        if room < 1:
            messages.pop()
            say(
                f"the conversation has {ids.shape[1]} tokens and the model takes {limit}; /reset begins anew"
            )
            continue
        seed = (manner.seed + len(messages)) % 2**63
        received.clear()
        with interrupts.handled_by(lambda signum, _: received.append(signum)):
            answer = continuation(
                model,
                tokenizer,
                ids,
                replace(manner, max_new_tokens=room, seed=seed),
                threads=manner.threads,
                on_text=show,
                cancelled=lambda: bool(received),
            )
        # Ctrl-C stops the answer; other signals end the conversation
        for signum in {*received} - {signal.SIGINT}:
            signal.raise_signal(signum)
        show("\n")
        messages.append({"role": "assistant", "content": answer.text})


def _lines(say: Callable[[str], None]) -> Iterator[str]:
    """The lines of stdin, up to its end or a command that ends. What looks like a command and is none is answered with
    a line of help."""
    prompt = ""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        prompt = "> "
        with suppress(ImportError):
            import readline  # noqa: F401 - arrow keys and history in the lines that input() reads
        say(HELP)
    with suppress(EOFError):
        while (line := input(prompt).strip()) not in ENDS:
            if line == "/help":
                say(HELP)
            elif re.fullmatch(r"/\w+", line) and line != "/reset":
                say(f"{line} is no command here; {HELP}")
            elif line:
                yield line

"""A program that renders chat templates within limits. It reads a JSON object from each line, and answers on one line.

It is started by its path with the most seconds for a line, and imports nothing of this package. A template is code of
whoever made the model: it cannot leave jinja's sandbox, but it can take all memory, or never end.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

ROOM = 1 << 30  # bytes of memory for a conversation and its text
# characters of a text: a few for each one of the question, which holds the conversation
LEAST_CHARACTERS = 1 << 20
CHARACTERS_FOR_EACH = 8


def main() -> None:
    """Answers every line; a signal ends the program if one takes too long."""
    seconds = int(sys.argv[1])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    _limit_memory()
    for line in sys.stdin:
        signal.alarm(seconds)
        answer = _answer(line)
        signal.alarm(0)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


def _limit_memory() -> None:
    # macOS has neither this file nor this limit: time and the text's length are limited there
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        most = pages * resource.getpagesize() + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _answer(line: str) -> str:
    """The text of a conversation as JSON, or why there is none."""
    question: dict[str, Any] = json.loads(line)
    try:
        # a text for each conversation, and what is used in training
        made: Any = render_jinja_template(
            conversations=[question["messages"]],
            chat_template=question["template"],
            **question["variables"],
        )
        text = str(made[0][0])
        most = LEAST_CHARACTERS + CHARACTERS_FOR_EACH * len(line)
        if len(text) > most:
            return _refusal(f"it makes {len(text):,} characters of {len(line):,}")
        return json.dumps({"text": text})
    except MemoryError:
        return _refusal(f"it takes more than {ROOM >> 20} MiB of memory")
    except Exception as error:  # a template raises what it likes
        return _refusal(f"{type(error).__name__}: {error}")


def _refusal(why: str) -> str:
    return json.dumps({"why": " ".join(why.split())[:300]})


if __name__ == "__main__":
    main()

"""Conversations as texts, by the chat template of a tokenizer."""

from __future__ import annotations

import atexit
import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from transformers import PreTrainedTokenizerBase

from sparsellm.errors import DataError, one_line

SECONDS = 10  # the most for a conversation, which takes milliseconds
_PROGRAM = Path(__file__).with_name("chat_renderer.py")


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    asks: bool,
) -> str:
    """The text of a conversation; with ``asks``, up to where the model's answer begins. The template runs in a process
    of its own, within limits. Raises DataError if the template refuses the conversation, such as its order of roles, or
    takes too much time or memory."""
    try:
        question = {
            "template": tokenizer.get_chat_template(),
            "messages": [
                {key: value for key, value in message.items() if value is not None}
                for message in messages
            ],
            "variables": {
                **tokenizer.special_tokens_map,
                "add_generation_prompt": asks,
            },
        }
        line = json.dumps(question, default=str)
    except (TypeError, ValueError) as error:
        raise DataError(one_line(error)) from None
    answer = _renderer.answer(line)
    if "text" not in answer:
        raise DataError(answer["why"])
    return answer["text"]


def prepare() -> None:
    """Starts the process that renders templates, which takes a second, and does not wait for it."""
    _renderer.start()


class _Renderer:
    """The process of ``chat_renderer.py``, which is started when it is needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = Lock()

    def start(self) -> subprocess.Popen[str]:
        if self._process is None:
            # Ctrl-C in the terminal is not for it.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_PROGRAM), str(SECONDS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="ascii",
                start_new_session=True,
            )
        return self._process

    def answer(self, line: str) -> dict[str, str]:
        """The answer to a line; ``why`` if the process ended over it."""
        with self._lock:
            process = self.start()
            assert process.stdin is not None
            assert process.stdout is not None
            said = ""
            try:
                if process.poll() is None:
                    process.stdin.write(f"{line}\n")
                    process.stdin.flush()
                    said = process.stdout.readline()
            except BrokenPipeError:
                pass  # it has ended
            finally:
                # also after Ctrl-C: the next line must not get the answer to this one
                if not said:
                    ended = self.stop()
        if said:
            return dict(json.loads(said))
        why = f"its process ended ({ended})"
        if ended == -signal.SIGALRM:
            why = f"it takes more than {SECONDS} seconds"
        return {"why": why}

    def stop(self) -> int:
        """Ends the process, and returns its exit code."""
        if self._process is None:
            return 0
        with self._process as process:
            # one that has ended by itself keeps its code
            process.kill()
            process.communicate()
        self._process = None
        return process.returncode


_renderer = _Renderer()
atexit.register(_renderer.stop)

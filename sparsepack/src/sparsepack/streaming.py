"""The text of tokens as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

MOST_TOKENS = 4  # that write a character
CONTEXT = 8  # tokens of the prompt that the first piece of text is read after: enough to end any character


class StreamedText(BaseStreamer):
    """The text of tokens as they come, and the time of each. A piece is given out as soon as no later token changes it:
    its characters are complete, and no stop string can begin in it.

    Attributes:
        over: why no further token is needed; None until then."""

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str],
        on_text: Callable[[str], Any] | None,
        cancelled: Callable[[], bool],
    ) -> None:
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
        self._stop = tuple(stop)
        self._longest = max(map(len, stop), default=0)
        self._on_text = on_text
        self._cancelled = cancelled
        # the last of the prompt, which comes first, and those that follow
        self._tokens: list[int] = []
        # tokens up to the last but one piece, and up to the last
        self._before = 0
        self._read = 0
        self._given = 0  # characters
        self.ids: list[int] = []
        self.times: list[float] = []
        self.text = ""
        self.over: Literal["stop", "cancelled"] | None = None

    def put(self, value: Tensor) -> None:
        new = value.flatten().tolist()
        if not self._tokens:
            tails = [new[-CONTEXT:][start:] or new for start in range(MOST_TOKENS)]
            # The first that begins with a whole character: byte tokens are decoded only if all of a run are characters.
            self._tokens = next(
                (tail for tail in tails if not self._decode(tail).startswith("\ufffd")),
                tails[0],
            )
            self._read = len(self._tokens)
            return
        self.times.append(time.perf_counter())
        self._tokens += new
        self.ids += new
        self._take()
        if self.over is None and self._cancelled():
            self.over = "cancelled"

    def end(self) -> None:
        self._take(last=True)

    def _take(self, last: bool = False) -> None:
        """Reads the tokens after the one piece before, whose text tells where the next one begins: some tokenizers
        write a token in another way at the beginning of a text."""
        if self.over == "stop":
            return
        known = len(self._decode(self._tokens[self._before : self._read]))
        piece = self._decode(self._tokens[self._before :])[known:]
        # the beginning of a character
        if piece and (last or not piece.endswith("\ufffd")):
            self._before = self._read
            self._read = len(self._tokens)
            begin = max(0, len(self.text) - self._longest + 1)
            self.text += piece
            starts = [self.text.find(stop, begin) for stop in self._stop]
            places = [place for place in starts if place >= 0]
            if places:
                self.text = self.text[: min(places)]
                self.over = "stop"
                last = True
        safe = len(self.text)
        if not last:
            safe -= self._held()
        if self._on_text is not None and safe > self._given:
            self._on_text(self.text[self._given : safe])
        self._given = max(self._given, safe)

    def _held(self) -> int:
        """The characters at the end of the text with which a stop string may begin."""
        for size in range(min(len(self.text), self._longest - 1), 0, -1):
            if any(stop.startswith(self.text[-size:]) for stop in self._stop):
                return size
        return 0

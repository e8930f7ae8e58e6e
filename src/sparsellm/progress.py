"""The progress of a run as plain events, independent of their display."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One event: ``done`` of ``total`` steps of ``phase``, and a text on the current step."""

    phase: str
    done: float
    total: float
    detail: str = ""


NOTE = "note"
"""The phase of an event whose ``detail`` is a line to show once, such as the predicted memory."""

ProgressCallback = Callable[[Progress], None]


def ignore(_: Progress) -> None:
    """Ignores an event."""


class PhaseClock:
    """Wall-clock seconds of each phase; the times of a phase that is entered again add up.

    Args:
        peak: returns the peak memory so far; it is noted in ``peaks`` at the end of each phase.
    """

    def __init__(self, peak: Callable[[], int] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._peak = peak
        self._lapped: dict[str, float] = {}

    def lap(self) -> dict[str, float]:
        """Seconds of each phase since the last lap."""
        passed = {name: value - self._lapped.get(name, 0.0) for name, value in self.seconds.items()}
        self._lapped = dict(self.seconds)
        return passed

    def add(self, seconds: dict[str, float]) -> None:
        """Adds seconds that an earlier process spent; laps do not include them."""
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value
            self._lapped[name] = self._lapped.get(name, 0.0) + value

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            if self._peak is not None:
                self.peaks[name] = self._peak()

"""How far a run is, as plain events; whoever shows them decides how."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One event: ``done`` of ``total`` steps of ``phase``, and what is being done now."""

    phase: str
    done: float
    total: float
    detail: str = ""


NOTE = "note"
"""The phase of an event whose ``detail`` is a line to be shown once, such as the memory that is predicted."""

ProgressCallback = Callable[[Progress], None]


def ignore(_: Progress) -> None:
    """Shows nothing."""


class PhaseClock:
    """Seconds spent in each phase, by wall clock; a phase entered again goes on where it was."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lapped: dict[str, float] = {}

    def lap(self) -> dict[str, float]:
        """Seconds of each phase since the last lap."""
        passed = {name: value - self._lapped.get(name, 0.0) for name, value in self.seconds.items()}
        self._lapped = dict(self.seconds)
        return passed

    def add(self, seconds: dict[str, float]) -> None:
        """Counts seconds that an earlier process spent; they are in no lap."""
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

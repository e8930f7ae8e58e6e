"""The progress of a run as plain events, independent of their display, and the time left in a phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

NOTE = "note"  # the phase of an event whose ``detail`` is a line to show once, such as what the run needs
DETAIL = "detail"  # the same for a line that only a verbose display shows

PHASES = {  # names of phases, and of parts of them, for people
    "open": "open the model",
    "calibration": "read the calibration text",
    "check": "check the weights",
    "allocation": "choose sparsities",
    "gradients": "gradients of the loss",
    "replay": "run finished blocks",
    "read": "read blocks",
    "prune": "prune blocks",
    "experts": "remove experts",
    "forward": "run pruned blocks",
    "write": "write blocks",
    "count": "count zeros",
    "verify": "check finished blocks",
    "fetch": "fetch the model",
    "bench": "measure speed",
    "sweep": "sweep the whole model",
    "evaluate": "measure on held-out text",
    "save": "save the checkpoint",
    "dense": "run the dense model",
    "prune/permutation": "order channels",
    "prune/rotation": "rotate values",
    "prune/statistics": "gather statistics",
    "prune/solve": "solve",
    "prune/rounding": "round",
    "prune/variables": "auxiliary variables",
}

_UNITS = (("seconds", 1), ("minutes", 60), ("hours", 3600))


@dataclass(frozen=True)
class Progress:
    """One event: ``done`` of ``total`` steps of ``phase``."""

    phase: str  # such as ``prune``; or NOTE or DETAIL
    done: float = 0
    total: float = 1
    detail: str = ""  # the step in work
    # relative squared error of the output of the linear that was pruned last
    error: float | None = None
    sparsity: float | None = None  # fraction of zeros in all linears pruned so far
    linear: str = ""  # the linear that was pruned last
    part: str = ""  # the run of a comparison, whose phases have times of their own


ProgressCallback = Callable[[Progress], None]


def note(progress: ProgressCallback, warnings: Iterable[str]) -> None:
    """Shows each warning once, as a note."""
    for warning in warnings:
        progress(Progress(NOTE, detail=f"note: {warning}"))


def ignore(_: Progress) -> None:
    """Ignores an event."""


def between(low: float, high: float) -> str:
    """A range of seconds as text, such as ``3 to 9 minutes``."""
    if high < 10:
        return "a few seconds"
    unit, size = next(
        ((unit, size) for unit, size in _UNITS if high < 90 * size), ("days", 86_400)
    )
    first = max(1, round(low / size))
    last = max(2, round(high / size))
    if first < last:
        return f"{first} to {last} {unit}"
    return f"{last} {unit}"


class Pace:
    """The seconds of each phase of a run, the share done of the current one, and the time that its rest takes at the
    speed so far. In the walk that is the speed of the blocks done."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.phase = ""  # the current one
        # Seconds of each finished phase of a part; the times of one that begins again add up.
        self.seconds: dict[str, float] = {}
        self.took = 0.0  # seconds of the phase that ended last
        self.share = 0.0  # done of the phase, from 0 to 1
        self._clock = clock
        self._begun = clock()
        self._phase_begun = self._begun
        self._judged = self._begun
        self._left: float | None = None  # at the time _judged
        self._part = ""

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._begun

    @property
    def left(self) -> float | None:
        """Seconds to the end of the phase, which count down between events; 0 at the end of the run. None while nothing
        of the phase is done, and once it takes longer than was foreseen."""
        if self._left is None or not self.phase:
            return self._left
        left = self._left - (self._clock() - self._judged)
        return left if left > 0 else None

    def see(self, event: Progress) -> str:
        """Takes an event other than a ``NOTE`` or ``DETAIL``; returns the phase that it ends, or ""."""
        ended = self._begin(event.phase, event.part)
        self._judged = self._clock()
        self.share = 0.0
        if event.total > 0:
            self.share = min(max(event.done / event.total, 0.0), 1.0)
        self._left = None
        if self.share:
            running = self._judged - self._phase_begun
            self._left = running * (1 - self.share) / self.share
        return ended

    def end(self) -> str:
        """Ends the run, which is done; returns the phase that this ends, or ""."""
        self.share = 1.0
        self._left = 0.0
        return self._begin("", self._part)

    def _begin(self, phase: str, part: str) -> str:
        if (phase, part) == (self.phase, self._part):
            return ""
        ended = self.phase
        now = self._clock()
        if ended:
            took = now - self._phase_begun
            self.took = self.seconds.get(ended, 0.0) + took
            self.seconds[ended] = self.took
        if part != self._part:
            self.seconds = {}
        self.phase = phase
        self._part = part
        self._phase_begun = now
        return ended


class PhaseClock:
    """Wall-clock seconds of each phase; the times of a phase that begins again add up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lapped: dict[str, float] = {}

    def lap(self) -> dict[str, float]:
        """Seconds of each phase since the last lap."""
        passed = {
            name: value - self._lapped.get(name, 0.0)
            for name, value in self.seconds.items()
        }
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
            self.seconds[name] = (
                self.seconds.get(name, 0.0) + time.perf_counter() - start
            )

"""The progress of a run as plain events, independent of their display, and a forecast of the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

NOTE = "note"  # the phase of an event whose ``detail`` is a line to show once, such as what the run needs
DETAIL = "detail"  # the same for a line that only a verbose display shows
PLAN = "plan"  # the phase of an event whose ``costs`` predict the seconds of each phase of the whole run

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
    "save": "save the checkpoint",
    "dense": "run the dense model",
    "prune/permutation": "order channels",
    "prune/rotation": "rotate values",
    "prune/statistics": "gather statistics",
    "prune/solve": "solve",
    "prune/rounding": "round",
    "prune/variables": "auxiliary variables",
}

PRIOR = 0.03  # weight of the prediction, as a share of its seconds, against the seconds measured so far
MOST_BEFORE_END = 0.99  # a planned run is done when it ends, whatever was predicted
# A run takes between these multiples of the predicted seconds.
LEAST = 0.4
MOST = 2.0
TRUSTED = 0.1  # the part of a phase after which its own speed alone says how long the rest takes
_UNITS = (("seconds", 1), ("minutes", 60), ("hours", 3600))


@dataclass(frozen=True)
class Progress:
    """One event: ``done`` of ``total`` steps of ``phase``."""

    phase: str  # such as ``prune``; or NOTE, DETAIL, or PLAN
    done: float = 0
    total: float = 1
    detail: str = ""  # the step in work
    error: float | None = (
        None  # relative squared error of the output of the linear that was pruned last
    )
    sparsity: float | None = None  # fraction of zeros in all linears pruned so far
    # in a PLAN, predicted seconds of phases
    costs: Mapping[str, float] = field(default_factory=dict)
    linear: str = ""  # the linear that was pruned last


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


class Forecast:
    """The seconds of each phase of a run, the share done of the whole, and the time left.

    A :data:`PLAN` predicts the seconds of phases. They are corrected by one factor, measured over the finished phases
    and the done part of the current one. Without a plan, share and time left are those of the current phase."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.phase = ""  # the current one
        # seconds of each finished phase; the times of one that begins again add up
        self.seconds: dict[str, float] = {}
        self.share = 0.0  # done of the whole, from 0 to 1; with a plan, it never falls
        self._clock = clock
        self._costs: dict[str, float] = {}
        self._begun = self._phase_begun = self._judged = clock()
        self._fraction = 0.0
        self._left: float | None = None  # at the time _judged
        self._guessed = True  # until a block is pruned, only a prediction says how long the blocks take

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._begun

    @property
    def left(self) -> float | None:
        """Seconds to the end, never negative; None while nothing is known. Between events they count down."""
        if self._left is None:
            return None
        return max(0.0, self._left - (self._clock() - self._judged))

    @property
    def range(self) -> tuple[float, float] | None:
        """The least and the most seconds to the end: one number if they are measured; None while nothing is known."""
        left = self.left
        if left is None:
            return None
        if self._costs and self._guessed:
            return LEAST * left, MOST * left
        return left, left

    def see(self, event: Progress) -> str:
        """Takes an event other than a :data:`NOTE` or :data:`DETAIL`; returns the phase that it ends, or ""."""
        ended = ""
        if event.phase == PLAN:
            if not self._costs:
                self.share = 0.0  # it was that of a phase
            self._costs.update(event.costs)
        else:
            ended = self._begin(event.phase)
            self._fraction = 0.0
            if event.total > 0:
                self._fraction = min(max(event.done / event.total, 0.0), 1.0)
            if (event.phase == "prune" and event.done >= 1) or event.phase in (
                "sweep",
                "save",
            ):
                self._guessed = False
        self._judge()
        return ended

    def end(self) -> str:
        """Ends the run, which is done; returns the phase that this ends, or ""."""
        self.share = 1.0
        self._left = 0.0
        return self._begin("")

    def _begin(self, phase: str) -> str:
        if phase == self.phase:
            return ""
        ended = self.phase
        now = self._clock()
        if ended:
            self.seconds[ended] = self.seconds.get(ended, 0.0) + now - self._phase_begun
        self.phase = phase
        self._phase_begun = now
        return ended

    def _judge(self) -> None:
        self._judged = self._clock()
        done = self._fraction
        running = self._judged - self._phase_begun
        rest = None
        if done:  # at the speed of this phase so far
            rest = running * (1 - done) / done
        if not self._costs:
            self.share = done
            self._left = rest
            return
        factor = self._factor(running)
        ahead = self._costs.keys() - self.seconds.keys() - {self.phase}
        left = factor * sum(self._costs[phase] for phase in ahead)
        if self.phase in self._costs:
            trust = min(1.0, done / TRUSTED)
            left += (1 - trust) * (1 - done) * factor * self._costs[self.phase]
            if rest is not None:
                left += trust * rest
        self._left = left
        if self.elapsed + left > 0:
            self.share = max(
                self.share, min(MOST_BEFORE_END, self.elapsed / (self.elapsed + left))
            )

    def _factor(self, running: float) -> float:
        """Measured seconds divided by predicted ones, where both are known."""
        over = self._costs.keys() & self.seconds.keys() - {self.phase}
        measured = predicted = PRIOR * sum(self._costs.values())
        measured += sum(self.seconds[phase] for phase in over)
        predicted += sum(self._costs[phase] for phase in over)
        if self._fraction and self.phase in self._costs:
            measured += running
            predicted += self._fraction * self._costs[self.phase]
        if predicted:
            return measured / predicted
        return 1.0


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

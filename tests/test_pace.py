"""The time left in a phase, by the speed so far."""

from __future__ import annotations

import pytest

from sparsellm.progress import Pace, Progress


class Clock:
    """A clock that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_blocks_done_say_how_long_the_others_take() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.see(Progress("open", 0, 1))
    assert (pace.share, pace.left) == (0.0, None)
    clock.now += 2
    assert pace.see(Progress("prune", 0, 4)) == "open"
    clock.now += 10
    pace.see(Progress("prune", 1, 4))
    assert (pace.share, pace.left) == (0.25, 30.0)
    clock.now += 5
    assert pace.left == 25.0  # between events it counts down
    clock.now += 100
    assert pace.left is None  # it takes longer than was foreseen
    assert pace.end() == "prune"
    assert (pace.share, pace.left) == (1.0, 0.0)
    assert pace.seconds == pytest.approx({"open": 2.0, "prune": 115.0})
    assert pace.elapsed == 117.0


def test_the_runs_of_a_comparison_have_times_of_their_own() -> None:
    clock = Clock()
    pace = Pace(clock)
    for part in ("first", "second"):
        pace.see(Progress("prune", 0, 2, part=part))
        clock.now += 10
        pace.see(Progress("prune", 1, 2, part=part))
        assert pace.left == 10.0
        clock.now += 10
        assert pace.see(Progress("save", 0, 1, part=part)) == "prune"
        assert pace.took == 20.0
    assert pace.end() == "save"

"""The forecast of a run, and the prediction of its phases."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import sparsellm
from sparsellm import Recipe
from sparsellm.model import Stream, open_chain
from sparsellm.patterns import Unstructured
from sparsellm.progress import DETAIL, NOTE, PLAN, Forecast, Progress, between
from sparsellm.run import predictions
from sparsellm.run import prune as running
from sparsellm.run.choice import Choice
from sparsellm.run.needs import speeds_of
from sparsellm.run.predictions import Extent
from tests.models import tiny_llama


class Clock:
    """A clock that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_finished_phase_corrects_the_prediction_of_the_others() -> None:
    forecast = Forecast(clock := Clock())
    forecast.see(Progress(PLAN, costs={"check": 10.0, "prune": 40.0, "sweep": 50.0}))
    assert (forecast.share, forecast.left) == (0.0, 100.0)
    forecast.see(Progress("check", 0, 1))
    clock.now += 20  # twice as long as predicted
    assert forecast.see(Progress("prune", 0, 4)) == "check"
    assert forecast.seconds == {"check": 20.0}
    assert forecast.left is not None
    assert 140 < forecast.left < 180  # nearly 2 · 90
    clock.now += 40
    forecast.see(Progress("prune", 2, 4))  # half of it in 40 s, where 20 were predicted
    assert forecast.left == pytest.approx(40 + 50 * (3 + 60) / (3 + 30))
    assert forecast.share == pytest.approx(60 / (60 + forecast.left))


def test_the_time_left_counts_down_between_events_to_zero() -> None:
    forecast = Forecast(clock := Clock())
    forecast.see(Progress(PLAN, costs={"prune": 10.0}))
    clock.now += 4
    assert forecast.left == 6.0
    clock.now += 40
    assert forecast.left == 0.0


def test_until_a_block_is_pruned_the_time_left_is_a_range() -> None:
    forecast = Forecast(clock := Clock())
    assert forecast.range is None
    forecast.see(Progress(PLAN, costs={"check": 10.0, "prune": 90.0}))
    assert forecast.range == (40.0, 200.0)
    forecast.see(Progress("prune", 0.5, 4))
    assert forecast.range is not None
    assert forecast.range[0] < forecast.range[1]
    clock.now += 30
    forecast.see(Progress("prune", 1, 4))
    assert forecast.range == (forecast.left, forecast.left)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.1, 9.9, "a few seconds"),
        (20, 70, "20 to 70 seconds"),
        (60, 200, "1 to 3 minutes"),
        (80, 95, "1 to 2 minutes"),
        (7000, 7300, "2 hours"),
        (5e5, 1e6, "6 to 12 days"),
    ],
)
def test_a_range_of_time_has_one_unit(low: float, high: float, said: str) -> None:
    assert between(low, high) == said


def test_without_a_plan_the_phase_counts_and_a_plan_starts_anew() -> None:
    forecast = Forecast(clock := Clock())
    forecast.see(Progress("open", 0, 1))
    assert (forecast.share, forecast.left) == (0.0, None)
    forecast.see(Progress("evaluate", 0, 4))
    clock.now += 10
    forecast.see(Progress("evaluate", 1, 4))
    assert (forecast.share, forecast.left) == (0.25, 30.0)
    forecast.see(Progress("evaluate", 3, 4))
    forecast.see(Progress(PLAN, costs={"prune": 990.0}))
    assert forecast.share < 0.1


phases = st.sampled_from(["open", "check", "prune", "sweep", "other"])
steps = st.tuples(phases, st.floats(-1, 3), st.floats(0, 2), st.floats(0, 50))
plans = st.dictionaries(
    st.sampled_from(["check", "prune", "sweep"]), st.floats(0, 1000)
)


@settings(max_examples=200, deadline=None)
@given(plans, st.lists(st.one_of(steps, plans)))
def test_the_share_never_falls_and_no_time_left_is_negative(
    first: dict[str, float],
    events: list[tuple[str, float, float, float] | dict[str, float]],
) -> None:
    forecast = Forecast(clock := Clock())
    forecast.see(Progress(PLAN, costs={"open": 1.0, **first}))
    shares = [forecast.share]
    for event in events:
        if isinstance(event, dict):
            forecast.see(Progress(PLAN, costs=event))
        else:
            phase, done, total, seconds = event
            clock.now += seconds
            forecast.see(Progress(phase, done, total))
        shares.append(forecast.share)
        assert forecast.left is not None
        assert forecast.left >= 0
    assert all(0 <= one <= other < 1 for one, other in pairwise([*shares, shares[-1]]))
    forecast.end()
    assert (forecast.share, forecast.left) == (1.0, 0.0)


def test_a_run_announces_its_phases_and_tells_error_and_sparsity(
    llama: Path, tmp_path: Path
) -> None:
    events: list[Progress] = []
    result = sparsellm.prune(
        llama,
        Recipe(samples=4, seq_len=32),
        out=tmp_path / "out",
        progress=events.append,
    )
    planned = [event for event in events if event.phase == PLAN]
    phases = {event.phase for event in events} - {DETAIL, NOTE, PLAN}
    assert phases - planned[-1].costs.keys() == {"open"}
    assert {
        name for name, seconds in planned[-1].costs.items() if seconds
    } >= phases - {"open", "calibration"}
    pruning = [event for event in events if event.phase == "prune"]
    done = [event.done / event.total for event in pruning]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, 1)
    assert pruning[-1].sparsity == pytest.approx(result.sparsity_pruned)
    assert pruning[-1].error == result.linears[-1].error


def test_what_an_earlier_start_has_done_is_not_predicted_again(tmp_path: Path) -> None:
    chain = open_chain(tiny_llama(), device=torch.device("cpu"))
    choice = Choice.of(Recipe(sparsity=0.5))

    def seconds(
        choice: Choice, tokens: int = 4096, finished: int = 0
    ) -> dict[str, float]:
        extent = Extent(
            samples=tokens // 64, seq_len=64, batch_tokens=4096, swept=tokens // 2
        )
        return predictions.predicted_seconds(
            chain, choice, extent, speeds_of(chain), finished=finished
        )

    fresh, resumed = seconds(choice), seconds(choice, finished=2)
    assert (
        min(fresh["gradients"], fresh["prune"], fresh["sweep"], resumed["replay"]) > 0
    )
    assert (fresh["replay"], resumed["gradients"]) == (0, 0)
    assert resumed["prune"] < fresh["prune"]
    assert (
        fresh["sweep"] < seconds(choice, 8192)["sweep"] < 3 * fresh["sweep"]
    )  # the steps to judge by are few
    local = seconds(Choice.of(Recipe(method="wanda")))
    assert (local["gradients"], local["sweep"]) == (0, 0)
    assert local["prune"] < fresh["prune"]
    rounded = seconds(choice.on([Unstructured(1, 2)], "int4"))
    assert rounded["prune"] > fresh["prune"]  # rounding to a grid takes time, too


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(("method", "effort"), [("wanda", None), ("sparsellm", 0)])
def test_the_passes_of_the_walk_are_as_predicted(
    method: str, effort: int | None, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in products with the weights of blocks."""
    model, ids = tiny_llama(num_hidden_layers=4), torch.randint(256, (32, 16))
    weights = {
        id(layer.weight): layer.weight
        for layer in model.model.layers.modules()
        if isinstance(layer, nn.Linear)
    }
    products: list[int] = []
    multiply, walk = functional.linear, running.walk

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        products.append(
            weight.numel() * x.shape[:-1].numel() if id(weight) in weights else 0
        )
        return multiply(x, weight, bias)

    def walk_alone(*arguments: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(functional, "linear", linear)
            list(walk(*arguments))
        raise ZeroDivisionError("what follows is not counted")

    monkeypatch.setattr(running, "walk", walk_alone)
    if not kept:
        monkeypatch.setattr(Stream, "keep", lambda stream, shortcut: None)
    recipe = Recipe(
        method=method,
        allocation="uniform",
        sparsity=0.5,
        products="float32",
        effort=effort,
    )
    with pytest.raises(ZeroDivisionError):
        sparsellm.prune(model, recipe, calibration=ids)
    passes = sum(products) / (
        sum(weight.numel() for weight in weights.values()) * ids.numel()
    )
    assert passes == pytest.approx(
        predictions.walked_passes(Choice.of(recipe), kept=kept), rel=0.15
    )

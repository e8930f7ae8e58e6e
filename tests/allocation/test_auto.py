"""Auto against a recomputation with copies of the whole model; and trials that leave the model alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import sparsellm
from sparsellm import Recipe
from sparsellm.allocation import ALLOCATIONS, Allocation, Survey
from sparsellm.allocation.trial import Trials
from sparsellm.errors import DataError
from sparsellm.patterns import Pattern
from tests.allocation.helpers import survey_of, windows
from tests.models import tiny_gpt2, tiny_llama, tiny_opt

Family = Callable[..., PreTrainedModel]


def divergence(dense: PreTrainedModel, pruned: PreTrainedModel, ids: torch.Tensor) -> float:
    with torch.no_grad():
        p, q = (model(ids).logits.double().log_softmax(-1) for model in (dense, pruned))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("family", [tiny_llama, tiny_gpt2])
def test_every_trial_is_a_run_of_sparsegpt_measured_on_other_windows(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family()
    ids = windows(7)
    found = ALLOCATIONS["auto"].function(survey_of(model, 0.6, ids), fit=3, held_out=2)
    trials = found.report["trials"]
    assert [t["allocation"] for t in trials] == ["uniform", "atp", "atp", "owl", "dlp", "threshold"]
    again = []
    for trial in trials:
        chosen = ALLOCATIONS[trial["allocation"]].function(survey_of(model, 0.6, ids[:5]), **trial["options"])
        pruned = copy.deepcopy(model)
        # a run of the walk with this very allocation on the windows that were fitted to
        monkeypatch.setattr("sparsellm.api._allocated", lambda *_, chosen=chosen: chosen)
        recipe = Recipe(method="sparsegpt", sparsity=0.6, allocation="atp", batch_tokens=40)
        sparsellm.prune(pruned, recipe, calibration=ids[:3])
        again.append((divergence(model, pruned, ids[5:]), chosen.zeros))
    assert [t["kl"] for t in trials] == pytest.approx([kl for kl, _ in again], rel=1e-3)
    least = min(again, key=lambda row: row[0])
    assert found.zeros == least[1]
    assert [t["chosen"] for t in trials] == [kl == least[0] for kl, _ in again]


def test_uniform_wins_ties_and_the_least_wins_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    survey = survey_of(tiny_opt(), 0.6)
    for values, winner in (([0.3] * 6, "uniform"), ([0.3, 0.4, 0.3, 0.2, 0.2, 0.5], "owl")):
        left = iter(values)
        monkeypatch.setattr(Trials, "divergence", lambda self, patterns, left=left: next(left))
        trials = ALLOCATIONS["auto"].function(survey).report["trials"]
        assert [t["allocation"] for t in trials if t["chosen"]] == [winner]


def test_candidates_do_not_see_the_held_out_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(Trials, "divergence", lambda self, patterns: 0.0)
    original = Survey.over

    def over(self: Survey, ids: torch.Tensor) -> Survey:
        seen.append(len(ids))
        return original(self, ids)

    monkeypatch.setattr(Survey, "over", over)
    ALLOCATIONS["auto"].function(survey_of(tiny_opt(), 0.6, windows(6)), held_out=2)
    assert max(seen) == 4


def test_one_window_cannot_be_held_out_from_itself() -> None:
    with pytest.raises(DataError, match="2 or more"):
        ALLOCATIONS["auto"].function(survey_of(tiny_opt(), 0.6, windows(1)))


def test_a_trial_with_nothing_pruned_diverges_by_nothing() -> None:
    model = tiny_llama()
    survey = survey_of(model, 0.0)
    patterns: dict[str, Pattern] = Allocation({linear.name: 0 for linear in survey.linears}).patterns(survey)
    trials = Trials(survey.chain, windows(2), windows(2, seed=5), batch_tokens=40)
    assert trials.divergence(patterns) == pytest.approx(0, abs=1e-6)
    trials.close()


def test_the_same_run_chooses_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[Any] = [
        sparsellm.prune(tiny_opt(), Recipe(method="wanda", sparsity=0.6, allocation="auto"), calibration=windows())
        for _ in range(2)
    ]
    assert results[0].allocation == results[1].allocation
    assert [x.zeros for x in results[0].linears] == [x.zeros for x in results[1].linears]

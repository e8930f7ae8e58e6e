"""The allocation that a trial likes best: no rule is good for every model, so each is measured on this one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from sparsellm.allocation.base import ALLOCATIONS, Allocation
from sparsellm.allocation.survey import Survey, windows_of
from sparsellm.allocation.trial import Trials
from sparsellm.errors import DataError
from sparsellm.progress import Progress
from sparsellm.refine.gradients import TOKENS
from sparsellm.registry import Needs, Workspace


@dataclass(frozen=True)
class Candidate:
    """An allocation with its options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value:.4g}" for name, value in self.options.items())
        return f"{self.name} {options}".strip()


def candidates(blocks: int, spread: float) -> list[Candidate]:
    """What is compared in a model of so many blocks; ``uniform`` comes first."""
    b = spread / max(1, blocks - 1)
    return [
        Candidate("uniform"),
        Candidate("atp", {"b": b}),
        Candidate("atp", {"b": -b}),
        Candidate("owl"),
        Candidate("dlp"),
        Candidate("threshold"),
    ]


@ALLOCATIONS.register(
    "auto",
    paper="measured: held-out divergence of trial runs",
    workspace=Workspace(weights=8, grams=4, blocks=3),
    needs=lambda options: Needs(gradient_tokens=TOKENS, token_states=True),
)
def auto(
    survey: Survey,
    *,
    fit: Annotated[int, Field(ge=1), "calibration windows that a trial run prunes on"] = 8,
    held_out: Annotated[int, Field(ge=1), "calibration windows, others, that it is measured on"] = 4,
    spread: Annotated[float, Field(gt=0, lt=1), "between the first and the last block where atp is tried"] = 0.1,
) -> Allocation:
    """Tries uniform, atp (rising and falling), owl, dlp and threshold; the least divergence from dense wins.

    Each prunes the whole model with sparsegpt on ``fit`` windows; ``KL(dense ‖ pruned)`` on the last ``held_out``
    windows, of which neither the trials nor the allocations saw anything, decides. Uniform wins ties.

    Raises:
        DataError: there are fewer than two calibration windows.
    """
    total = len(survey.windows)
    if total < 2:
        raise DataError(f"allocation auto holds windows out and has {total}; give samples of 2 or more")
    measured = min(held_out, total // 2)
    seen = survey.over(survey.windows[: total - measured])
    trials = Trials(
        survey.chain,
        seen.windows[:fit],
        survey.windows[total - measured :],
        batch_tokens=survey.batch_tokens,
        scratch=survey.scratch,
    )
    tried = candidates(len(survey.blocks), spread)
    table: list[tuple[float, Candidate, Allocation]] = []
    for number, candidate in enumerate(tried):
        survey.progress(Progress("trials", number, len(tried), str(candidate)))
        allocation = ALLOCATIONS[candidate.name].function(seen, **candidate.options)
        table.append((trials.divergence(allocation.patterns(survey)), candidate, allocation))
    trials.close()
    least, winner, chosen = min(table, key=lambda row: row[0])  # the first of equals: uniform stands first
    survey.progress(Progress("trials", len(tried), len(tried), f"{winner} · KL {least:.4f}"))
    rows = [{"allocation": c.name, "options": c.options, "kl": kl, "chosen": c is winner} for kl, c, _ in table]
    report = {"trials": rows, "fit_windows": len(seen.windows[:fit]), "held_out_windows": measured, **chosen.report}
    whole = len(seen.windows) >= windows_of(TOKENS, survey.windows.shape[1])  # else the gradients are of fewer tokens
    costs = next(allocation.output_costs for _, c, allocation in table if c.name == "threshold") if whole else {}
    return Allocation(chosen.zeros, report, costs)

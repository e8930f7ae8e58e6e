"""Scores of the experts of a mixture. Each is one decorated function; the experts with the highest scores stay."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from sparsellm.registry import Needs, Registry


@dataclass(frozen=True, eq=False)
class MixtureView:
    """What a score knows of a mixture with E experts; sums are over the calibration tokens of all processes."""

    block: int  # number of its block
    keep: int  # experts that stay
    groups: int  # consecutive groups of experts, which routing compares and which stay equal in size; 1 without groups
    tokens: Tensor  # tokens that are routed to each expert, (E,) int64
    strength: Tensor  # Σ r ‖y‖ over these tokens, of router weight r and output y of the expert, (E,) fp64
    seed: int
    error_of: Callable[[Sequence[int]], float]
    """The relative error of the mixture's output, routed over these experts, before a refit; see ``.sample``."""

    def best(self, scores: Tensor) -> list[int]:
        """The numbers of the experts that stay by these scores ``(E,)``, in order; of equal ones, the first."""
        size = len(scores) // self.groups
        keep = self.keep // self.groups
        order = scores.view(self.groups, size).argsort(
            dim=1, descending=True, stable=True
        )[:, :keep]
        return sorted(
            (order + size * torch.arange(self.groups)[:, None]).flatten().tolist()
        )


Score = Callable[..., Tensor]
"""``score(view, **options)`` returns a score for each expert, ``(E,)``."""

SCORES: Registry[Score] = Registry("expert score")


@SCORES.register("reap", paper="arXiv 2510.13999")
def reap(view: MixtureView) -> Tensor:
    """Mean of router weight × norm of the expert's output over the tokens that are routed to it."""
    return view.strength / view.tokens.clamp(min=1)


@SCORES.register("frequency", paper="arXiv 2310.01334")
def frequency(view: MixtureView) -> Tensor:
    """Number of tokens that are routed to the expert."""
    return view.tokens.double()


@SCORES.register(
    "coordinated", paper="–", needs=lambda options: Needs(output_costs=True)
)
def coordinated(
    view: MixtureView,
    *,
    trials: Annotated[
        int,
        Field(ge=0, le=100_000),
        "exchanges of two experts that are tried in each mixture",
    ] = 256,
) -> Tensor:
    """1 for the experts of the set with the least output error, else 0; exchanges start from reap's set."""
    scores = reap(view)
    kept = view.best(scores)
    least = view.error_of(kept)
    left = trials
    size = len(scores) // view.groups
    # how often each pair was tried: those that were refused come last
    times = Counter[tuple[int, int]]()
    while left > 0:
        inside = sorted(kept, key=lambda number: float(scores[number]))
        outside = sorted(
            set(range(len(scores))) - set(kept),
            key=lambda number: -float(scores[number]),
        )
        # the most likely first
        places = sorted(
            itertools.product(range(len(inside)), range(len(outside))), key=sum
        )
        pairs = sorted(
            ((inside[first], outside[second]) for first, second in places),
            key=times.__getitem__,
        )
        for goes, comes in [
            pair for pair in pairs if pair[0] // size == pair[1] // size
        ][:left]:
            left -= 1
            times[goes, comes] += 1
            tried = sorted({*kept, comes} - {goes})
            if (error := view.error_of(tried)) < least:
                kept = tried
                least = error
                break
        else:
            break
    return torch.zeros(len(scores)).index_fill_(0, torch.tensor(kept), 1.0)

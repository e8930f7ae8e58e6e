"""The sweep that follows the walk, resolved from a recipe: how many passes, and what depends on their number."""

from __future__ import annotations

from dataclasses import dataclass

from sparsellm.errors import RecipeError
from sparsellm.methods import METHODS
from sparsellm.recipe import SWEEP, Recipe

PASSES = (0, 1, 3, 8)  # by effort; docs/results.md has what each gains and takes


@dataclass(frozen=True)
class Effort:
    """The settings of the sweep.

    Attributes:
        passes: passes of the sweep over the whole model; 0 for no sweep.
        sets: sets of calibration windows that the blocks take in turn.
        stages: 1 or 2; None for the run to choose.
        rate: learning rate of the sweep; None for one by the divergence at its start.
    """

    passes: int = 0
    sets: int = 1
    stages: int | None = 1
    rate: float | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> Effort:
        """The sweep that a recipe asks for.

        More sets cost a forward pass each and gain most where a sweep follows, whose share of the time grows with its
        passes.

        Raises:
            RecipeError: the method has no sweep and the recipe sets one, or two stages have too few passes.
        """
        default = METHODS[recipe.method].effort
        if default is None:
            given = next((name for name in SWEEP if getattr(recipe, name)), None)
            if given is not None:
                raise RecipeError(f"method {recipe.method} has no sweep, so no {given}; leave it out")
            return cls()
        passes = recipe.passes
        if passes is None:
            passes = PASSES[default if recipe.effort is None else recipe.effort]
        if recipe.stages == 2 and passes < 2:
            raise RecipeError(f"stages is 2, and {passes} sweeps are too few for two stages; give effort 2 or 3")
        sets = recipe.sets
        if sets is None:
            sets = 4 if passes >= PASSES[2] else 2 if passes else 1
        return cls(passes, sets, recipe.stages, recipe.sweep_rate)

"""Which share of the calibration windows comes from Python's text, and from which kinds."""

from __future__ import annotations

from collections.abc import Mapping

from sparsellm.errors import DataError, shown
from sparsellm.recipe import Recipe
from sparsellm.text.python_text import DOCUMENTATION, KINDS
from sparsellm.text.sources import DOCUMENTS, IDS, check_source, shares_of

DEFAULT_MIX = 0.125  # docs/results.md has what other shares gain


def check_mix(recipe: Recipe) -> None:
    """Refuses a share of Python's text next to token ids, or to a mixture, which has shares of its own. Raises
    DataError."""
    source = recipe.calibration
    if not recipe.mix or source is None:
        return
    if source == IDS:
        raise DataError(
            f"mix {recipe.mix:g} adds text, and calibration is token ids; leave mix out"
        )
    if len(shares_of(source)) > 1:
        raise DataError(
            f"calibration {shown(source)} has shares of its own; leave out mix {recipe.mix:g}"
        )


def is_mixed(recipe: Recipe) -> bool:
    """Whether the recipe's text is mixed with Python's: as the recipe says, else a file, a data set or documents are.
    The named texts of papers stay as they are, and so do mixtures, token ids and what the model writes."""
    source = recipe.calibration
    if recipe.mix is not None or source is None:
        return bool(recipe.mix)
    if source == DOCUMENTS:
        return True
    if source == IDS or len(shares_of(source)) > 1:
        return False
    name, _ = check_source(source, "calibration")
    return name in ("file", "hub")


def with_python_text(
    shares: Mapping[str, float], mix: float, samples: int
) -> dict[str, float]:
    """The shares of a text and of Python's kinds. A kind is left out if there is no whole window for it among
    this number, or if the text is Python's documentation itself."""
    kinds = [kind for kind in KINDS if "pydoc" not in shares or kind != DOCUMENTATION]
    kinds = kinds[: round(mix * samples)]
    if not kinds:
        return dict(shares)
    mixed = {name: share * (1 - mix) for name, share in shares.items()}
    for kind in kinds:
        mixed[kind] = mix / len(kinds)
    return mixed

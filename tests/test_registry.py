"""Options of registered functions: filled, coerced, refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from sparsellm.errors import RecipeError
from sparsellm.method.allocation import ALLOCATIONS
from sparsellm.method.blocks import METHODS
from sparsellm.method.solvers import SOLVERS
from sparsellm.registry import Entry, Needs, Registry


def entry() -> Entry[Any]:
    registry: Registry[Any] = Registry("thing")

    @registry.register(
        "mine",
        paper="none",
        needs=lambda options: Needs(gradient_tokens=options["low"]),
    )
    def mine(
        weight: object,
        *,
        low: Annotated[int, Field(ge=0), "the least"] = 1,
        high: float = 3.0,
        name: str | None = None,
    ) -> None:
        """Does nothing."""

    return registry["mine"]


def test_options_are_filled_and_coerced() -> None:
    assert entry().check({}) == {"low": 1, "high": 3.0, "name": None}
    filled = entry().check({"high": "2.5", "low": "2"})
    assert filled == {"low": 2, "high": 2.5, "name": None}
    assert list(filled) == ["low", "high", "name"]  # the order of the signature
    assert entry().needs(filled).gradient_tokens == 2


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lwo": 1}, "mine has no option 'lwo'; did you mean 'low'"),
        ({"low": -1}, "option low of mine is -1: "),
        ({"high": float("inf")}, "option high of mine is inf: .*finite"),
        ({"high": "nan"}, "option high of mine is 'nan': .*finite"),
        ({"name": 3}, "option name of mine is 3: "),
    ],
)
def test_what_does_not_fit_is_named(values: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        entry().check(values)


def test_defaults_that_are_no_json_are_a_mistake_of_the_author() -> None:
    with pytest.raises(TypeError, match="JSON"):

        @Registry("thing").register("mine", paper="none")
        def mine(weight: object, *, path: Path = Path()) -> None:
            """Does nothing."""


def test_the_defaults_are_those_of_the_measurements() -> None:
    """A comparison with published numbers begins with them."""
    assert METHODS["sparsellm"].check({}) == {
        "solver": "admm", "refit": True, "refit_damping": 0.1, "output_metric": 0.5, "norm_weighting": 1.5,
        "symmetries": "rotate", "iterations": None,
    }  # fmt: skip
    assert SOLVERS["admm"].check({}) == {
        "iterations": 16,
        "refine_iterations": 4,
        "damping": 0.05,
    }
    assert SOLVERS["sparsegpt"].check({}) == {"damping": 0.01}


def test_all_registered_options_are_json_and_have_needs() -> None:
    for registry in (METHODS, ALLOCATIONS, SOLVERS):
        for registered in registry.values():
            filled = registered.check({})
            assert filled.keys() == registered.options.model_fields.keys()
            assert json.loads(json.dumps(filled)) == filled
            assert isinstance(registered.needs(filled), Needs)

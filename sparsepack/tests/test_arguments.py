"""Checks of values: what is refused, and the one line that says why."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from sparsepack.arguments import check, check_choice, check_counts
from sparsepack.errors import SettingError
from sparsepack.generation import Sampling

REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: check("n", "1", int), "n is '1': it should be a valid integer"),
    (lambda: check("n", True, int), "n is True: it should be a valid integer"),
    (lambda: check("n", 1.0, int), "n is 1.0: it should be a valid integer"),
    (lambda: check("x", True, float), "x is True: it should be a valid number"),
    (lambda: check("x", math.nan, float), "x is nan: it should be a finite number"),
    (lambda: check("x", -math.inf, float), "x is -inf: it should be a finite number"),
    (
        lambda: check("x", 0, float, least=1),
        "x is 0: it should be greater than or equal to 1",
    ),
    (
        lambda: check("x", 0.0, float, above=0),
        "x is 0.0: it should be greater than 0",
    ),
    (
        lambda: check("x", 3, int, most=2),
        "x is 3: it should be less than or equal to 2",
    ),
    (
        lambda: check("to", 5, str, Callable),
        "to is 5: it should be a valid string or callable",
    ),
    (
        lambda: check("at", "a\nb", range),
        "at is 'a\\nb': it should be an instance of range",
    ),
    (
        lambda: check_counts("n", "12"),
        "n is '12': it should be a valid list or an instance of tuple",
    ),
    (lambda: check_counts("n", []), "n is []: it should be at least one number"),
    (
        lambda: check_counts("n", [1, 9], most=8),
        "n.1 is 9: it should be less than or equal to 8",
    ),
    (
        lambda: check_choice("k", "c", ("a", "b", "d")),
        "k is 'c': it should be 'a', 'b' or 'd'",
    ),
    (lambda: check_choice("k", [], ("a", "b")), "k is []: it should be 'a' or 'b'"),
    (
        lambda: Sampling(temperature=1e-4),
        "temperature is 0.0001: give 0 for the likeliest token, or at least 0.001",
    ),
    (
        lambda: Sampling(stop=["a", ""]),
        "the length of stop.1 is 0: it should be greater than or equal to 1",
    ),
    (
        lambda: Sampling(stop="text"),
        "stop is 'text': it should be a valid list or an instance of tuple",
    ),
]


@pytest.mark.parametrize(("call", "said"), REFUSED)
def test_a_wrong_value_is_refused_in_one_line(
    call: Callable[[], Any], said: str
) -> None:
    with pytest.raises(SettingError) as caught:
        call()
    assert str(caught.value) == said


def test_values_at_the_limits_are_taken() -> None:
    check("n", 1, int, least=1, most=1)
    check("x", 2, float, least=2, above=1, most=2)
    check("x", False, bool)
    check_counts("n", (1, 8), most=8)
    check_choice("k", "b", ("a", "b"))


def test_no_module_imports_pydantic() -> None:
    """It is not among the dependencies; the modules that load, decode and measure are imported without it."""
    program = (
        "import sys; sys.modules['pydantic'] = None; "
        "import sparsepack.bench, sparsepack.generation, sparsepack.quantizer"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

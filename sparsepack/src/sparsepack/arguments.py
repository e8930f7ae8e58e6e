"""Checks of values that a caller, or a file, gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from sparsepack.errors import SettingError, shown

# names of torch's dtypes, by short ones
SHORT_DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
}

MOST = (1 << 31) - 1  # the largest whole number that a size or a count may be
_NAMES: dict[Any, str] = {
    bool: "a valid boolean",
    int: "a valid integer",
    float: "a valid number",
    str: "a valid string",
    dict: "a valid dictionary",
    list: "a valid list",
    Callable: "callable",
}


def check(
    name: str,
    value: Any,
    *kinds: Any,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> None:
    """Checks that a value is of one of these types, finite, and within limits.

    A whole number is a ``float`` too, and a bool is neither; ``above`` is the one limit that a value may not equal.

    Raises:
        SettingError: one line with the name, the value, and what it should be.
    """
    expected = " or ".join(
        _NAMES.get(kind, f"an instance of {getattr(kind, '__name__', kind)}")
        for kind in kinds
    )
    if isinstance(value, bool):
        fits = bool in kinds
    elif isinstance(value, int):
        fits = int in kinds or float in kinds
    else:
        fits = isinstance(value, kinds)
    if not fits:
        refuse(name, value, expected)
    if isinstance(value, float) and not math.isfinite(value):
        refuse(name, value, "a finite number")
    if least is not None and value < least:
        refuse(name, value, f"greater than or equal to {least}")
    if above is not None and value <= above:
        refuse(name, value, f"greater than {above}")
    if most is not None and value > most:
        refuse(name, value, f"less than or equal to {most}")


def check_counts(name: str, values: Any, *, most: int = MOST) -> None:
    """Checks that a list or a tuple has whole numbers from 1 to ``most``, at least one; raises as ``check``."""
    check(name, values, list, tuple)
    if not values:
        refuse(name, values, "at least one number")
    for index, value in enumerate(values):
        check(f"{name}.{index}", value, int, least=1, most=most)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Checks that a value is one of some texts; raises as ``check``."""
    if not isinstance(value, str) or value not in choices:
        *others, last = map(repr, choices)
        refuse(name, value, f"{', '.join(others)} or {last}")


def refuse(name: str, value: Any, expected: str) -> NoReturn:
    """Raises the SettingError of ``check``."""
    raise SettingError(f"{name} is {shown(value)}: it should be {expected}")

"""Parses sizes of memory such as ``4GiB``."""

from __future__ import annotations

import re

from sparsellm.errors import RecipeError, shown

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}

_SIZE = re.compile(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([A-Za-z]{0,3})\s*", re.ASCII)


def parse_bytes(text: str | int) -> int:
    """The bytes in ``4GiB``, ``500 MB`` or a plain number of bytes; case does not matter.

    Raises:
        RecipeError: not a positive number, or not a known unit.
    """
    match = _SIZE.fullmatch(str(text)) if isinstance(text, str) or 0 <= text < 1 << 63 else None
    units = {name.lower(): size for name, size in UNITS.items()}
    unit = (match[2] or "b").lower() if match is not None else ""
    if match is None or unit not in units:
        raise RecipeError(
            f"memory is {shown(text)}; write a number and one of {', '.join(UNITS)}, such as 4GiB or 500MB"
        )
    size = int(float(match[1]) * units[unit])
    if size < 1:
        raise RecipeError(f"memory is {shown(text)}; it must be more than nothing, such as 4GiB")
    return size

"""The compiled extension, as far as it can be asked without torch."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

NOT_BUILT = "install a C++ compiler and install sparsepack again"


@cache
def extension() -> ModuleType | None:
    """The extension; None if it was not built."""
    try:
        return import_module("sparsepack._kernels")
    except ImportError:
        return None


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets of the extension that this machine can run, best first; empty if it was not built."""
    library = extension()
    if library is None:
        return ()
    return tuple(name for name, supported in library.instruction_sets() if supported)


def kernels() -> str:
    """One line that says which instruction sets this machine can run, best first."""
    missing = f"not compiled, torch does their work; {NOT_BUILT}"
    return ", ".join(instruction_sets()) or missing

"""The compiled extension, as far as it can be asked without torch."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType


@cache
def extension() -> ModuleType | None:
    """The extension; None if it was not built."""
    try:
        return import_module("sparsepack._kernels")
    except ImportError:
        return None


def kernels() -> str:
    """One line that says which instruction sets of the extension this machine can run, best first."""
    library = extension()
    if library is None:
        return "not compiled, torch does their work; install a C++ compiler and install sparsellm again"
    return ", ".join(name for name, supported in library.instruction_sets() if supported)

"""sparsellm: makes Hugging Face language models smaller, to a size or to a share of zeros.

>>> import sparsellm
>>> result = sparsellm.prune("demo", sparsellm.Recipe(sparsity=0.5), out="pruned")  # doctest: +SKIP
>>> sparsellm.evaluate("pruned", "pydoc").value  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import sparsepack  # noqa: F401 - so that from_pretrained loads packed checkpoints
from sparsellm.version import __version__

if TYPE_CHECKING:
    from sparsellm.api import (
        PruneResult,
        dry_run,
        evaluate,
        inspect,
        keep_results,
        plan,
        prune,
    )
    from sparsellm.app.compare import cells_of, compare
    from sparsellm.app.console import progress as show_progress
    from sparsellm.convert import PackResult, pack, unpack
    from sparsellm.errors import SparseLLMError
    from sparsellm.evaluation.speed import compared_speed as bench
    from sparsellm.exports.door import ExportResult, export
    from sparsellm.programs import CompressResult, compress
    from sparsellm.recipe import Recipe
    from sparsellm.records import Evaluation
    from sparsellm.report.comparison import write_comparison
    from sparsellm.report.document import write_report
    from sparsepack.generation import generate
    from sparsepack.loading import load

_MODULES = {
    "sparsellm.api": (
        "PruneResult",
        "dry_run",
        "evaluate",
        "inspect",
        "keep_results",
        "plan",
        "prune",
    ),
    "sparsellm.app.compare": ("cells_of", "compare"),
    "sparsellm.app.console": ("show_progress",),
    "sparsellm.convert": ("PackResult", "pack", "unpack"),
    "sparsellm.errors": ("SparseLLMError",),
    "sparsellm.evaluation.speed": ("bench",),
    "sparsellm.exports.door": ("ExportResult", "export"),
    "sparsellm.programs": ("CompressResult", "compress"),
    "sparsellm.recipe": ("Recipe",),
    "sparsellm.records": ("Evaluation",),
    "sparsellm.report.comparison": ("write_comparison",),
    "sparsellm.report.document": ("write_report",),
    "sparsepack.generation": ("generate",),
    "sparsepack.loading": ("load",),
}

__all__ = [
    "CompressResult",
    "Evaluation",
    "ExportResult",
    "PackResult",
    "PruneResult",
    "Recipe",
    "SparseLLMError",
    "__version__",
]
__all__ += [
    "bench",
    "cells_of",
    "compare",
    "compress",
    "dry_run",
    "evaluate",
    "export",
    "generate",
]
__all__ += [
    "inspect",
    "keep_results",
    "load",
    "pack",
    "plan",
    "prune",
    "show_progress",
    "unpack",
]
__all__ += ["write_comparison", "write_report"]
# in their modules
_OTHER_NAMES = {
    "show_progress": "progress",
    "bench": "compared_speed",
}


def __getattr__(name: str) -> Any:
    """Imports torch and transformers when they are first needed, so that ``sparsellm --help`` is fast."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(
                importlib.import_module(module), _OTHER_NAMES.get(name, name)
            )
    raise AttributeError(f"module 'sparsellm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

"""sparsellm: prune Hugging Face language models after training, globally.

>>> import sparsellm
>>> result = sparsellm.prune("demo", sparsellm.Recipe(sparsity=0.5), out="pruned")  # doctest: +SKIP
>>> sparsellm.evaluate("pruned", "pydoc").value  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparsellm.version import __version__
from sparsepack.registration import register_when_needed

if TYPE_CHECKING:
    from sparsellm.api import PruneResult, card, evaluate, inspect, prune, push
    from sparsellm.console import progress as show_progress
    from sparsellm.convert import PackResult, pack, unpack
    from sparsellm.errors import SparseLLMError
    from sparsellm.evaluation.measured import Evaluation
    from sparsellm.evaluation.perplexity import Perplexity
    from sparsellm.recipe import Recipe
    from sparsepack.loading import load

_HOME = {
    "Evaluation": "sparsellm.evaluation.measured",
    "PackResult": "sparsellm.convert",
    "PruneResult": "sparsellm.api",
    "card": "sparsellm.api",
    "evaluate": "sparsellm.api",
    "inspect": "sparsellm.api",
    "load": "sparsepack.loading",
    "pack": "sparsellm.convert",
    "prune": "sparsellm.api",
    "push": "sparsellm.api",
    "show_progress": "sparsellm.console:progress",
    "SparseLLMError": "sparsellm.errors",
    "Perplexity": "sparsellm.evaluation.perplexity",
    "Recipe": "sparsellm.recipe",
    "unpack": "sparsellm.convert",
}

__all__ = [
    "Evaluation",
    "PackResult",
    "Perplexity",
    "PruneResult",
    "Recipe",
    "SparseLLMError",
    "__version__",
    "card",
    "evaluate",
    "inspect",
    "load",
    "pack",
    "prune",
    "push",
    "show_progress",
    "unpack",
]

register_when_needed()  # so that from_pretrained loads packed checkpoints


def __getattr__(name: str) -> Any:
    """Imports torch and transformers when they are first needed, so that ``sparsellm --help`` is fast."""
    if name in _HOME:
        module, _, other = _HOME[name].partition(":")
        return getattr(importlib.import_module(module), other or name)
    raise AttributeError(f"module 'sparsellm' has no attribute {name!r}")

"""A server process that has imported, once, all that a pruning run imports; tests fork their processes from it.

Importing torch and transformers takes a process seconds, and a run of a tiny model takes a tenth of one. The server
imports and runs nothing, so it has no threads when it forks.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

# With what the modules of sparsellm and transformers import only when they are used.
_MODULES = [
    "sparsellm.api",
    "sparsellm.console",
    "sparsellm.methods",
    "sparsellm.convert",
    "sparsellm.tables",
    "tests.models",
    "transformers.models.llama.modeling_llama",
]


def context() -> ForkServerContext:
    """The context of ``multiprocessing`` for processes of tests; all take this one, as there is only one server."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(_MODULES)
    return found

"""Registers packed checkpoints with transformers, without importing transformers or torch before the user does."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_HOST = "transformers.quantizers.auto"  # the module with the registry of quantisation methods


def register_when_needed() -> None:
    """Registers the method ``sparsellm`` now if transformers' registry is loaded, else right after it is loaded."""
    if _HOST in sys.modules:
        import sparsepack.quantizer  # noqa: F401  (it registers itself)
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport:
    """An import hook for one module: the ordinary finder loads it, and registration follows its execution."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _HOST:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                # from the instance, so that the class's own method is back
                del loader.exec_module
                execute(module)
                import sparsepack.quantizer  # noqa: F401  (it registers itself)

            loader.exec_module = exec_module
        return spec

"""What is done to one block. A method is one decorated function in a file of this package; nothing else knows of it."""

import importlib
import pkgutil

from sparsellm.methods.base import METHODS, BlockTask, LinearResult

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["METHODS", "BlockTask", "LinearResult"]

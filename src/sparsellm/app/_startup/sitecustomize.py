"""Python runs this when it starts, if the folder is on PYTHONPATH, as in `sparsellm exec`: it registers the packed
format with transformers, and then runs the sitecustomize that would have run without it."""

import importlib.machinery
import importlib.util
import os
import sys

try:
    import sparsepack  # noqa: F401  # light: transformers is not imported before the program does
except ImportError as error:
    sys.stderr.write(
        f"sparsellm exec: {sys.executable} cannot import sparsepack ({error}): it loads no packed model\n"
    )

_here = os.path.dirname(os.path.abspath(__file__))
_others = [path for path in sys.path if os.path.abspath(path) != _here]
_spec = importlib.machinery.PathFinder.find_spec("sitecustomize", _others)
if _spec is not None and _spec.loader is not None:
    _module = importlib.util.module_from_spec(_spec)
    sys.modules["sitecustomize"] = _module
    _spec.loader.exec_module(_module)

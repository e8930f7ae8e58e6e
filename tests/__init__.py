"""The tests, a package so that every test can import the shared builders in ``tests.models``."""

import os
import tempfile

# no test reaches the hub, and none waits for it
os.environ.setdefault("HF_HUB_OFFLINE", "1")
_EMPTY = tempfile.TemporaryDirectory()
os.environ["HF_HUB_CACHE"] = _EMPTY.name  # what its user has of the hub changes no test

"""The tests, a package so that every test can import the shared builders in ``tests.models``."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches the hub, and none waits for it

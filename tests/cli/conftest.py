"""Plugins that a test loads are forgotten after it."""

from __future__ import annotations

import pytest

from sparsellm import plugins
from sparsellm.allocation import ALLOCATIONS
from sparsellm.methods import METHODS
from sparsellm.solvers import SOLVERS


@pytest.fixture(autouse=True)
def forgotten_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (SOLVERS, METHODS, ALLOCATIONS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr(plugins, "_loaded", {})
    monkeypatch.setattr(plugins, "_installed_failures", None)

"""Fixtures of all tests. Next to ``__init__.py``, this file puts the root of the repository on ``sys.path``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from sparsellm import plugins
from sparsellm.app import cli, console
from sparsellm.method.allocation import ALLOCATIONS
from sparsellm.method.blocks import METHODS
from sparsellm.method.solvers import SOLVERS
from sparsellm.method.sweep import sweep_task
from tests.models import save_tiny, tiny_gpt2, tiny_llama, tiny_opt, tiny_tokenizer

THREADS = torch.get_num_threads()
Run = Callable[..., tuple[int, str, str]]


def pytest_configure(config: pytest.Config) -> None:
    """One thread, an empty cache but for slow tests, and signals as usual.

    Distributing work costs a tiny model more than the work, on a busy machine ten times more; and a fixture of a module
    must compute with as many threads as its tests do, or bits differ. Signals that whoever started the tests ignores
    (``nohup``, a shell's background) are not ignored here: the tests send them, and every child inherits that."""
    torch.set_num_threads(1)
    disable_progress_bar()  # as the command line does in a process of its own
    if config.getoption("markexpr") != "slow":
        os.environ["SPARSELLM_CACHE"] = os.environ["HF_HUB_CACHE"]
    usual = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    for signum, handler in usual.items():
        if signal.getsignal(signum) == signal.SIG_IGN:
            signal.signal(signum, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests take as long as they take."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(0))


@pytest.fixture(autouse=True)
def threads_for_real_models(request: pytest.FixtureRequest) -> Iterator[None]:
    """Slow tests take as many threads as torch chose; the others one, see :func:`pytest_configure`."""
    if "slow" in request.keywords:
        torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(1)


@pytest.fixture(
    params=[tiny_llama, tiny_opt, tiny_gpt2], ids=lambda family: family.__name__
)
def family(request: pytest.FixtureRequest) -> Callable[..., PreTrainedModel]:
    return request.param


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that no test changes."""
    return save_tiny(tiny_llama(), tiny_tokenizer(), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def forgotten_plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plugins that a test loads are forgotten after it."""
    kept = [(registry, dict(registry)) for registry in (SOLVERS, METHODS, ALLOCATIONS)]
    monkeypatch.setattr(plugins, "_loaded", {})
    yield
    for registry, entries in kept:
        registry.clear()
        registry.update(entries)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float, int, int]]:
    """Filled with the steps of a sweep: the loss before each, its rate, its number and its tokens."""
    seen: list[tuple[float, float, int, int]] = []
    step = sweep_task.TrainingSet.step

    def noted(self: Any, chosen: Any, rate: float, number: int) -> float:
        loss = step(self, chosen, rate, number)
        seen.append((loss, rate, number, chosen.tokens))
        return loss

    monkeypatch.setattr(sweep_task.TrainingSet, "step", noted)
    return seen


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """Runs a command line in this process: its exit code, which ``exits`` asks for, stdout and stderr."""

    def call(
        *arguments: Any, columns: int = 160, exits: int | None = None
    ) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sparsellm", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", str(columns))
        for made in (console.out, console.log):
            made.cache_clear()
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as done:
            code = int(done.code or 0)
        captured = capsys.readouterr()
        assert exits in (None, code), captured.err
        return code, captured.out, captured.err

    yield call
    for made in (console.out, console.log):
        made.cache_clear()


@pytest.fixture
def refusal(run: Run) -> Callable[..., str]:
    """The one line on stderr of a command line that ends with exit code 2 and prints nothing on stdout."""

    def call(*arguments: Any, **options: Any) -> str:
        _, stdout, stderr = run(*arguments, **options, exits=2)
        assert stdout == ""
        (line,) = stderr.splitlines()
        assert line.startswith("error: ")
        return line

    return call

"""Being here, beside ``__init__.py``, it puts the repository root on ``sys.path``: ``from tests.models import ...``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from sparsellm import cli, console


def pytest_configure() -> None:
    """Signals that whoever started the tests ignores (``nohup``, a shell's background) are not ignored here: the tests
    send them, and what is ignored stays so in every child."""
    for signum, usual in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGTERM, signal.SIG_DFL),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(signum) == signal.SIG_IGN:
            signal.signal(signum, usual)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests take as long as they take."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(0))


@pytest.fixture(autouse=True)
def one_thread_for_tiny_models(request: pytest.FixtureRequest) -> Iterator[None]:
    """Handing out work costs a tiny model more than the work; on a busy machine, ten times more."""
    threads = torch.get_num_threads()
    if "slow" not in request.keywords:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Runs a command line in this process: its exit code, stdout and stderr, by default 160 columns wide."""

    def call(*arguments: Any, columns: int = 160) -> tuple[int, str, str]:
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
        return code, captured.out, captured.err

    yield call
    for made in (console.out, console.log):
        made.cache_clear()

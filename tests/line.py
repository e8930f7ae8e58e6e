"""A command line in this process, for examples that outnumber the fixtures of a test."""

from __future__ import annotations

import contextlib
import io
import sys
from unittest import mock

from sparsellm.app import cli


def run(arguments: list[str]) -> tuple[int, str]:
    """The exit code of a command line, and what it wrote to stderr."""
    stderr, code = io.StringIO(), 0
    argv = mock.patch.object(sys, "argv", ["sparsellm", *arguments])
    with (
        argv,
        contextlib.redirect_stderr(stderr),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            cli.main()
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else 1
    return code, stderr.getvalue()

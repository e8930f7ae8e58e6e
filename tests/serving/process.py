"""The server as a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KEY = "a-key-of-the-tests"


@contextmanager
def serving(
    directory: Path, *options: object, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process and its URL."""
    command = [
        sys.executable,
        "-m",
        "sparsellm",
        "serve",
        str(directory),
        "--port",
        "0",
        *map(str, options),
    ]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=variables
    )
    assert process.stderr is not None
    try:
        yield (
            process,
            next(
                match[0]
                for line in process.stderr
                if (match := re.search(r"http://[^,]+/v1", line))
            ),
        )
    finally:
        process.kill()
        process.wait()
        process.stderr.close()

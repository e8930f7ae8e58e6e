"""Judges one program in a process of its own, under limits; `programs.py` starts it.

It reads a JSON object from standard input: `program`, `tests` (expressions that must be true), `token`, and the limits
`seconds` of the processor and `bytes` of memory. It prints the token if all tests hold, and nothing in every other
case. Neither the program nor what it starts can write a file, open a socket or start a process.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

# what Python tells its hooks before it does them
FORBIDDEN = (
    "socket.",
    "subprocess.",
    "ctypes.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.kill",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "shutil.",
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Refused(BaseException):
    """The program did what it may not. No ``except Exception`` of the program catches it."""


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """A hook of Python that ends a program before it acts outside its process."""
    writes = False
    if event == "open":
        flags = arguments[2]
        writes = bool(flags & WRITES)
    if writes or event.startswith(FORBIDDEN):
        raise Refused(event)


def limit(seconds: int, memory: int) -> None:
    """Limits this process for good: processor seconds, bytes of memory, no bytes of files."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def raises(
    error: type[BaseException], function: Callable[..., Any], *given: Any
) -> bool:
    """Whether a function raises an error; tests use it."""
    try:
        function(*given)
    except error:
        return True
    return False


def solves(program: str, tests: list[str]) -> bool:
    """Whether a program is one that runs, and all tests hold after it. Nothing else it does is judged."""
    names: dict[str, Any] = {"__name__": "program"}
    try:
        exec(compile(program, "program", "exec"), names)
        names["raises"] = raises
        # a value that only looks true, such as a text, is no answer
        return all(eval(test, names) is True for test in tests)
    except BaseException:
        return False


def main() -> None:
    asked = json.load(sys.stdin)
    answer = os.dup(1)
    # what the program prints is read by nobody
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    token = asked.pop("token").encode()
    limit(asked["seconds"], asked["bytes"])
    sys.addaudithook(refuse)
    if solves(asked["program"], asked["tests"]):
        os.write(answer, token)
    # at once, whatever the program left to be done at the end
    os._exit(0)


if __name__ == "__main__":
    main()

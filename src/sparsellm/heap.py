"""Memory of this process: what it holds, what it can still get, and what the C library keeps back."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from pathlib import Path

import psutil


def peak_rss() -> int:
    """The most memory this process has held so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident() -> int:
    """The memory this process holds now, in bytes."""
    held: int = psutil.Process().memory_info().rss
    return held


def free_memory() -> int:
    """Bytes that this process can still get: what the machine has free, or what its control group allows."""
    return min([psutil.virtual_memory().available, *_control_group_rooms()])


def trim() -> None:
    """Returns the free part of the C heap to the system, where the C library can.

    Tokenising a text leaves a hundred times its size in holes that no tensor fits into.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc alone has the function
        ctypes.CDLL(None).malloc_trim(0)


def _control_group_rooms() -> list[int]:
    """What a container may still take, from the files of cgroup version 2 and 1; empty where there is no limit."""
    rooms = []
    for folder, limit, usage in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            most, used = int((Path(folder) / limit).read_text()), int((Path(folder) / usage).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        rooms.append(max(0, most - used))
    return rooms

"""Memory of this process: held now, at its peak, still available, and kept back by the C library."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from pathlib import Path

import psutil


def peak_rss() -> int:
    """The peak memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident() -> int:
    """The memory this process holds now, in bytes."""
    held: int = psutil.Process().memory_info().rss
    return held


def free_memory() -> int:
    """Bytes that this process can still allocate: the machine's free memory, or the limit of its control group."""
    return min([psutil.virtual_memory().available, *_control_group_rooms()])


def trim() -> None:
    """Returns the free part of the C heap to the system, if the C library supports it.

    Tokenising a text leaves a hundred times its size in holes that no tensor fits into.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has the function
        ctypes.CDLL(None).malloc_trim(0)


def _control_group_rooms() -> list[int]:
    """Bytes that a container may still allocate, by cgroup versions 2 and 1; empty if there is no limit."""
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

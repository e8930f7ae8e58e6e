"""Runs a command and measures its wall time and the memory of its whole process tree."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

import sparsellm
from sparsellm.version import __version__

INTERVAL = 0.05  # seconds between samples of memory: watched more often, a single core computes noticeably less


class PeakMemory(threading.Thread):
    """Samples the resident memory, in bytes, of a process and all its children until it ends."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.root = psutil.Process(pid)
        self.peak = 0

    def run(self) -> None:
        while True:
            try:
                tree = [self.root, *self.root.children(recursive=True)]
                if self.root.status() == psutil.STATUS_ZOMBIE:
                    return
            except psutil.NoSuchProcess:
                return
            total = 0
            for process in tree:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak = max(self.peak, total)
            time.sleep(INTERVAL)


@dataclass(frozen=True)
class Measured:
    stdout: str
    seconds: float  # from before the start of the process to its end
    cpu_seconds: float  # that all its threads and children computed: what other jobs on the machine change least
    peak_rss: int  # bytes: resident memory of the process and all its children, summed, at the worst sample


def measured(command: list[str], log: Path) -> Measured:
    """Runs a command to its end; what it says on stderr goes to the file ``log``.

    Raises:
        RuntimeError: it failed; the last lines of the log are in the message.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start, computed = time.perf_counter(), children_computed()
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    memory = PeakMemory(process.pid)
    memory.start()
    stdout, _ = process.communicate()
    seconds = time.perf_counter() - start
    memory.join()
    if process.returncode != 0:
        tail = "\n".join(log.read_text().splitlines()[-20:])
        raise RuntimeError(
            f"{command[:6]} ended with exit code {process.returncode}; the end of {log}:\n{tail}"
        )
    return Measured(stdout, seconds, children_computed() - computed, memory.peak)


def children_computed() -> float:
    """CPU seconds of all children that have ended and been waited for, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def code_version() -> str:
    """The release of the sparsellm that runs and the git hash of its sources, marked where files differ from it.

    Two commits whose sources are equal have the same version, whatever else changed. ``BENCHMARK_CODE`` replaces it, to
    print a table again from the results of other code.
    """
    chosen = os.environ.get("BENCHMARK_CODE")
    if chosen is not None:
        return chosen
    root = Path(sparsellm.__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True
        ).stdout.strip()

    tree = git("rev-parse", "--short", "HEAD:./src")  # empty outside a checkout
    new = git("ls-files", "--others", "--exclude-standard", "--", "src").splitlines()
    texts = [
        git("diff", "HEAD", "--", "src"),
        *((root / name).read_text(errors="replace") for name in new),
    ]
    changed = (
        f"-changed-{hashlib.sha256(''.join(texts).encode()).hexdigest()[:8]}"
        if any(texts) or new
        else ""
    )
    return f"{__version__}+{tree}{changed}" if tree else __version__


def cpu_name() -> str:
    """The processor's model where the system tells it, and its kind where not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.partition(":")[2].strip()
            for line in lines
            if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

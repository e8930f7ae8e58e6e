"""The cache of downloaded and converted files; each appears under its name only when it is complete."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from sparsellm.storage.files import sync, sync_tree

_PARTIAL = ".partial"


def cache_dir() -> Path:
    """The cache directory, which may not exist yet: ``SPARSELLM_CACHE``, or the platform's directory for caches."""
    if chosen := os.environ.get("SPARSELLM_CACHE"):
        return Path(chosen).expanduser()
    return user_cache_path("sparsellm", appauthor=False)


@contextlib.contextmanager
def workspace(final: Path) -> Iterator[Path]:
    """A temporary directory in which to make ``final``; only one process at a time has one for this name.

    Directories that killed processes left next to ``final`` are removed as well.

    Args:
        final: the path to make. Check again inside the context whether another process made it meanwhile.

    Raises:
        OSError: the cache cannot be written.
    """
    key = final.name[:16]
    final.parent.mkdir(parents=True, exist_ok=True)
    with _lock(final.parent, key):
        for left in final.parent.glob(f"*{_PARTIAL}"):
            other = left.name.rsplit(".", 2)[0]
            free = contextlib.nullcontext() if other == key else _lock(final.parent, other, timeout=0)
            with contextlib.suppress(Timeout), free:  # a living process holds the lock of its name
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(
            dir=final.parent, prefix=f"{key}.", suffix=_PARTIAL, ignore_cleanup_errors=True
        ) as made:
            yield Path(made)


def put(made: Path, final: Path) -> None:
    """Syncs a complete file or directory to the disk, then renames it to its name in the cache.

    Raises:
        OSError: the cache cannot be written.
    """
    sync_tree(made) if made.is_dir() else sync(made)
    os.replace(made, final)
    sync(final.parent)


def _lock(folder: Path, key: str, timeout: float = -1) -> FileLock:
    """The lock of a name. Lock files are in a separate folder and never removed: removal would let two processes in."""
    locks = folder.parent / "locks"
    locks.mkdir(exist_ok=True)
    return FileLock(locks / f"{folder.name}-{key}.lock", timeout=timeout)

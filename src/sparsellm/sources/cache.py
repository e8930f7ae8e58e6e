"""The cache of downloaded and converted files; each appears under its name only when it is complete."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from sparsellm.storage.files import sync, sync_tree

_PARTIAL = ".partial"


def cache_dir() -> Path:
    """The cache directory: ``SPARSELLM_CACHE``, or the platform's directory for caches.

    That is ``$XDG_CACHE_HOME/sparsellm`` (``~/.cache/sparsellm``) on Linux, ``~/Library/Caches/sparsellm`` on macOS and
    ``%LOCALAPPDATA%\\sparsellm\\Cache`` on Windows. It is not created here.
    """
    if chosen := os.environ.get("SPARSELLM_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "sparsellm" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "sparsellm"
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path is to be ignored.
    return (Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache") / "sparsellm"


@contextlib.contextmanager
def workspace(final: Path) -> Iterator[Path]:
    """A temporary directory beside ``final`` in which to make it; only one process at a time has one for this name.

    Directories that killed processes left beside it are removed as well.

    Args:
        final: the path to make. Check again inside the context whether another process made it meanwhile.

    Raises:
        OSError: the cache cannot be written.
    """
    key = final.name[:16]
    final.parent.mkdir(parents=True, exist_ok=True)
    with _lock(final.parent, key):
        for left in final.parent.glob(f"*{_PARTIAL}"):
            _remove_left(left, own=key)
        made = Path(tempfile.mkdtemp(dir=final.parent, prefix=f"{key}.", suffix=_PARTIAL))
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)


def put(made: Path, final: Path) -> None:
    """Syncs a complete file or directory to the disk, then renames it to its name in the cache.

    Raises:
        OSError: the cache cannot be written.
    """
    sync_tree(made) if made.is_dir() else sync(made)
    os.replace(made, final)
    sync(final.parent)


def _lock(folder: Path, key: str) -> FileLock:
    """The lock of a name. Lock files are in a separate folder and never removed: removal would let two processes in."""
    locks = folder.parent / "locks"
    locks.mkdir(exist_ok=True)
    return FileLock(locks / f"{folder.name}-{key}.lock")


def _remove_left(left: Path, own: str) -> None:
    """Removes a workspace that no process uses."""
    key = left.name.rsplit(".", 2)[0]
    if key == own:
        shutil.rmtree(left, ignore_errors=True)
        return
    lock = _lock(left.parent, key)
    with contextlib.suppress(Timeout), lock.acquire(timeout=0):
        shutil.rmtree(left, ignore_errors=True)


def sha256(path: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

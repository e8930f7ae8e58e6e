"""The cache of downloaded and converted files; each appears under its name only when it is complete."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_cache_path
from safetensors import SafetensorError

from sparsellm.errors import ModelError
from sparsellm.files.files import sync, sync_tree, user_of_new_files

_PARTIAL = ".partial"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cache_dir() -> Path:
    """The cache directory, which may not exist yet: ``SPARSELLM_CACHE``, or the platform's directory for caches."""
    if chosen := os.environ.get("SPARSELLM_CACHE"):
        # which leaves an unknown ~user as it is
        return Path(os.path.expanduser(chosen))
    return user_cache_path("sparsellm", appauthor=False)


def cached(
    final: Path,
    make: Callable[[Path], Path],
    is_valid: Callable[[Path], bool] = Path.exists,
) -> Path:
    """``final``, which ``make`` makes in a temporary directory if it is not there yet, or not valid: what is damaged is
    replaced. One process at a time makes it; the others wait. Directories that killed processes left next to it are
    removed. A ModelError says that it cannot be written, or that another user can have made or changed it."""
    key = final.name[:16]
    folder = final.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(folder)
        if final.exists():
            _check_private(final)
        if is_valid(final):
            return final
        with _lock(folder, key):
            for left in folder.glob(f"*{_PARTIAL}"):
                other = left.name.rsplit(".", 2)[0]
                free = (
                    contextlib.nullcontext()
                    if other == key
                    else _lock(folder, other, timeout=0)
                )
                # a living process holds the lock of its name
                with (
                    contextlib.suppress(Timeout),
                    free,
                ):
                    shutil.rmtree(left, ignore_errors=True)
            if is_valid(final):  # another process was first
                return final
            with tempfile.TemporaryDirectory(
                _PARTIAL, f"{key}.", folder, ignore_cleanup_errors=True
            ) as temporary:
                made = make(Path(temporary))
                for path in (made, *made.rglob("*")):
                    path.chmod(path.stat().st_mode & ~_OTHERS_WRITE)
                sync_tree(made) if made.is_dir() else sync(made)
                if final.is_dir():  # damaged; a directory is only renamed to a new name
                    os.replace(final, Path(temporary) / "damaged")
                os.replace(made, final)
                sync(folder)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise ModelError(
            f"cannot write {final}: {why}; set SPARSELLM_CACHE to a directory with room for it"
        ) from error
    return final


def _check_private(path: Path) -> None:
    """Refuses what another user owns or can write, as ssh does."""
    status = path.stat()
    why = ""
    ours = status.st_uid == os.geteuid()
    with contextlib.suppress(OSError):  # nothing can be written there
        ours = ours or status.st_uid == user_of_new_files(path.parent)
    if not ours:
        why = f"belongs to another user (id {status.st_uid})"
    elif status.st_mode & _OTHERS_WRITE:
        why = f"can be written by other users (mode {stat.S_IMODE(status.st_mode):o})"
    if why:
        raise ModelError(
            f"{path} {why} and is not trusted; remove it, or set SPARSELLM_CACHE to a directory of yours"
        )


def _lock(folder: Path, key: str, timeout: float = -1) -> FileLock:
    """The lock of a name. Lock files are in a separate folder and never removed: removal would let two processes in."""
    locks = folder.parent / "locks"
    locks.mkdir(exist_ok=True)
    return FileLock(locks / f"{folder.name}-{key}.lock", timeout=timeout)

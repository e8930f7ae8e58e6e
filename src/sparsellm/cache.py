"""Where things that are fetched or converted once are kept, and how they get there whole."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path


def cache_dir() -> Path:
    """The directory for everything that can be made again: ``SPARSELLM_CACHE``, or the platform's place for caches.

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

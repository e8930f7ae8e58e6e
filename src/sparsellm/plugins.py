"""Loads plugins, users' code that registers solvers, allocations and methods: files and modules."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from sparsellm.errors import RecipeError, one_line
from sparsepack.files import read_bytes

_MOST_BYTES = 16 << 20  # a thousand times a plugin's
CORRECT = "correct it, or name another .py file or module"

# name and digest, by the path of the file or the name of the module
_loaded: dict[str, tuple[str, str]] = {}


def load_plugin(name_or_path: str | os.PathLike[str]) -> None:
    """Runs the code of a plugin, a Python file or a module by its dotted name, whose decorators register its functions;
    a plugin that is loaded already is not run again.

    A RecipeError if it cannot be imported, a name that it registers is taken, or its file has changed since it was
    loaded. What it registered before it failed stays registered."""
    given = os.fspath(name_or_path)
    if given.endswith(".py") or os.sep in given:
        _load_file(Path(given))
    elif given not in _loaded:
        _run(given, given, given, lambda: _import(given))


def loaded() -> dict[str, str]:
    """The SHA-256 of the source of every loaded plugin, by name; for a package, that of all its Python files."""
    return dict(_loaded.values())


def _load_file(path: Path) -> None:
    try:
        path = path.expanduser()
        key = str(path.resolve(strict=True))
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # a loop of links, no such user, a null byte
        raise RecipeError(
            f"cannot read plugin {str(path)[:200]}: {one_line(error)}; {CORRECT}"
        ) from None
    try:
        source = read_bytes(path, _MOST_BYTES, RecipeError)
    except RecipeError as error:
        raise RecipeError(f"plugin: {error}; {CORRECT}") from None
    if len(source) > _MOST_BYTES:
        raise RecipeError(
            f"plugin {str(path)[:200]} has more than {_MOST_BYTES >> 20} MiB; {CORRECT}"
        )
    digest = hashlib.sha256(source).hexdigest()
    if key in _loaded:
        if _loaded[key][1] != digest:
            raise RecipeError(
                f"plugin {path} has changed since it was loaded; start Python again"
            )
        return

    def execute() -> str:
        module = ModuleType(f"sparsellm_plugin_{path.stem}_{digest[:8]}")
        module.__file__ = key
        sys.modules[module.__name__] = module  # dataclasses and pickle look it up there
        exec(compile(source, key, "exec", dont_inherit=True), module.__dict__)
        return digest

    _run(key, path.name, str(path), execute)


def _import(name: str) -> str:
    """Imports a module and returns the digest of its source."""
    module = importlib.import_module(name)
    if not hasattr(module, "__path__"):
        return hashlib.sha256(Path(module.__file__ or "").read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for root in sorted(module.__path__):
        for file in sorted(Path(root).rglob("*.py")):
            digest.update(
                os.fsencode(file.relative_to(root))
                + b"\0"
                + hashlib.sha256(file.read_bytes()).digest()
            )
    return digest.hexdigest()


def _run(key: str, name: str, shown: str, execute: Callable[[], str]) -> None:
    """Runs a plugin's code, which returns its digest; a second plugin of one name is told apart by the digest."""
    try:
        digest = execute()
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [
            at.lineno for at in frames if Path(at.filename).name == Path(shown).name
        ]
        at = ""
        if lines:
            at = f", line {lines[-1]}"
        raise RecipeError(
            f"plugin {shown[:200]} cannot be imported: {one_line(error)}{at}; {CORRECT}"
        ) from error
    if name in loaded():
        free = f"{name} {digest[:8]}"
    else:
        free = name
    printable = free.encode("utf-8", "backslashreplace").decode()  # records are UTF-8
    _loaded[key] = (printable, digest)

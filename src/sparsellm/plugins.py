"""Loads plugins, users' code that registers solvers, allocations and methods: files, modules, installed packages."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from sparsellm.errors import RecipeError, one_line

GROUP = "sparsellm.plugins"  # entry points of installed packages: ``anything = "package.module"``
CORRECT = "correct it, or name another .py file or module"


@dataclass(frozen=True)
class Plugin:
    """A loaded plugin.

    Attributes:
        name: file or module, for results and error messages.
        sha256: digest of its source; for a package, of all its Python files.
        registered: names of the solvers, allocations and methods that it registered.
        installed: whether its entry point loaded it, without being named by the user.
    """

    name: str
    sha256: str
    registered: frozenset[str]
    installed: bool = False


_loaded: dict[str, Plugin] = {}  # by the path of the file, or the name of the module
_installed_failures: list[str] | None = None  # None until they are loaded


def load_plugin(name_or_path: str | os.PathLike[str], *, installed: bool = False) -> Plugin:
    """Runs a plugin's code, whose decorators register its functions; a plugin that is loaded already is not run again.

    Args:
        name_or_path: a Python file (``my_solver.py``, ``dir/my_solver.py``), or a module by its dotted name.
        installed: whether its entry point loads it.

    Raises:
        RecipeError: there is no such file or module, it cannot be imported, a name that it registers is taken, or its
            file has changed since it was loaded. What it registered before it failed stays registered.
    """
    given = os.fspath(name_or_path)
    if given.endswith(".py") or os.sep in given:
        return _load_file(Path(given))
    if given in _loaded:
        return _loaded[given]
    return _run(given, given, given, lambda: _import(given), installed)


def load_installed() -> list[str]:
    """Loads the plugins of installed packages at the first call; returns a line for each that is left out."""
    global _installed_failures
    if _installed_failures is None:
        _installed_failures = []
        for point in importlib.metadata.entry_points(group=GROUP):
            package = point.dist.name if point.dist is not None else point.value
            try:
                load_plugin(point.module, installed=True)
            except RecipeError as error:
                _installed_failures.append(f"the plugin of package {package} is left out: {error}")
    return list(_installed_failures)


def loaded() -> dict[str, str]:
    """The SHA-256 of the source of every loaded plugin, by name."""
    return {plugin.name: plugin.sha256 for plugin in _loaded.values()}


def fingerprints(*used: object) -> dict[str, str]:
    """The SHA-256, by name, of the plugins that a run depends on: those the user named, and installed ones in use.

    Args:
        used: names of the run's method and allocation, and the values of their options, one of which may be a solver.
    """
    names = {value for value in used if isinstance(value, str)}
    return {
        plugin.name: plugin.sha256
        for plugin in _loaded.values()
        if not plugin.installed or not names.isdisjoint(plugin.registered)
    }


def _load_file(path: Path) -> Plugin:
    try:
        path = path.expanduser()
        key = str(path.resolve(strict=True))
        source = path.read_bytes()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, no such user, a null byte
        raise RecipeError(
            f"cannot read plugin {path}: {getattr(error, 'strerror', None) or error}; {CORRECT}"
        ) from None
    digest = hashlib.sha256(source).hexdigest()
    if key in _loaded:
        if _loaded[key].sha256 != digest:
            raise RecipeError(f"plugin {path} has changed since it was loaded; start Python again")
        return _loaded[key]

    def execute() -> str:
        module = ModuleType(f"sparsellm_plugin_{path.stem}_{digest[:8]}")
        module.__file__ = key
        sys.modules[module.__name__] = module  # dataclasses and pickle look it up there
        exec(compile(source, key, "exec"), module.__dict__)
        return digest

    return _run(key, path.name, str(path), execute)


def _import(name: str) -> str:
    """Imports a module and returns the digest of its source, for a package of all its Python files."""
    module = importlib.import_module(name)
    if not hasattr(module, "__path__"):
        return hashlib.sha256(Path(module.__file__ or "").read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for root in sorted(module.__path__):
        for file in sorted(Path(root).rglob("*.py")):
            digest.update(os.fsencode(file.relative_to(root)) + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _run(key: str, name: str, shown: str, execute: Callable[[], str], installed: bool = False) -> Plugin:
    """Runs a plugin's code, which returns its digest; a second plugin of one name is called by its path."""
    before = _registered()
    try:
        digest = execute()
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [at.lineno for at in frames if Path(at.filename).name == Path(shown).name]
        at = f", line {lines[-1]}" if lines else ""
        raise RecipeError(f"plugin {shown} cannot be imported: {one_line(error)}{at}; {CORRECT}") from error
    free = (key if name in loaded() else name).encode("utf-8", "backslashreplace").decode()  # records are UTF-8
    _loaded[key] = Plugin(free, digest, _registered() - before, installed)
    return _loaded[key]


def _registered() -> frozenset[str]:
    from sparsellm.allocation import ALLOCATIONS
    from sparsellm.methods import METHODS

    return frozenset((*METHODS, *ALLOCATIONS))  # every solver is a method too

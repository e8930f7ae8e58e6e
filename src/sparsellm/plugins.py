"""Loads plugins, users' code that registers solvers, allocations and methods: files, modules, installed packages."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from sparsellm.errors import RecipeError

GROUP = "sparsellm.plugins"
"""The entry-point group of plugins in installed packages: ``anything = "package.module"``."""


@dataclass(frozen=True)
class Plugin:
    """A loaded plugin.

    Attributes:
        name: of the file or the module, for results and error messages.
        sha256: of its source; for a package, of all its Python files.
        registered: names of the solvers, allocations and methods that it registered.
        installed: whether it was loaded by its entry point, without being named by the user.
    """

    name: str
    sha256: str
    registered: frozenset[str]
    installed: bool = False


_loaded: dict[str, Plugin] = {}  # by the path of the file, or the name of the module
_installed_failures: list[str] | None = None  # None until they are loaded


def load_plugin(name_or_path: str | os.PathLike[str], *, installed: bool = False) -> Plugin:
    """Runs a plugin's code, whose decorators register its functions, and returns a description of it.

    A plugin that is loaded already is not run again. If it fails, nothing stays registered.

    Args:
        name_or_path: a Python file (``my_solver.py``, ``dir/my_solver.py``), or a module by its dotted name.
        installed: whether it is loaded by its entry point.

    Raises:
        RecipeError: there is no such file or module, it cannot be imported, a name that it registers is taken, or its
            file has changed since it was loaded.
    """
    given = os.fspath(name_or_path)
    if isinstance(given, str) and "\0" not in given:
        if given.endswith(".py") or os.sep in given:
            return _load_file(Path(given).expanduser())
        if all(part.isidentifier() for part in given.split(".")):
            return _load_module(given, installed)
    raise RecipeError(f"plugin {given!r} is neither a file nor a module; name a .py file or an importable module")


def load_installed() -> list[str]:
    """Loads the plugins of installed packages at the first call; returns a line for each that is left out."""
    global _installed_failures
    if _installed_failures is None:
        _installed_failures = _load_entry_points()
    return list(_installed_failures)


def _load_entry_points() -> list[str]:
    failures = []
    for point in importlib.metadata.entry_points(group=GROUP):
        package = point.dist.name if point.dist is not None else point.value
        try:
            load_plugin(point.module, installed=True)
        except RecipeError as error:
            failures.append(f"the plugin of package {package} is left out: {error}")
    return failures


def loaded() -> dict[str, str]:
    """The SHA-256 of the source of every loaded plugin, by name."""
    return {plugin.name: plugin.sha256 for plugin in _loaded.values()}


def fingerprints(*used: object) -> dict[str, str]:
    """The SHA-256, by name, of the plugins that a run depends on, for its identity.

    These are all plugins that the user named, and those of installed packages that registered a function in use. So
    installing another package changes no run.

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
        key = str(path.resolve(strict=True))
        if not path.is_file():
            raise RecipeError(f"plugin {path} is not a file; name a .py file or an importable module")
        source = path.read_bytes()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"cannot read plugin {path}: {reason}; name a .py file or an importable module") from None
    digest = hashlib.sha256(source).hexdigest()
    if key in _loaded:
        if _loaded[key].sha256 != digest:
            raise RecipeError(f"plugin {path} has changed since it was loaded; start Python again")
        return _loaded[key]

    def run() -> None:
        module = ModuleType(f"sparsellm_plugin_{path.stem}_{digest[:8]}")
        module.__file__ = key
        sys.modules[module.__name__] = module  # dataclasses and pickle look it up there
        try:
            exec(compile(source, key, "exec"), module.__dict__)
        except BaseException:
            del sys.modules[module.__name__]
            raise

    name = path.name.encode("utf-8", "backslashreplace").decode("utf-8")  # records and reports are UTF-8
    return _keep(key, name, digest, run, str(path))


def _load_module(name: str, installed: bool) -> Plugin:
    if name in _loaded:
        return _loaded[name]
    known = name in sys.modules

    def run() -> None:
        try:
            importlib.import_module(name)
        except BaseException:
            if not known:
                sys.modules.pop(name, None)
            raise

    return _keep(name, name, None, run, name, installed=installed)


def _keep(
    key: str, name: str, digest: str | None, run: Callable[[], None], shown: str, *, installed: bool = False
) -> Plugin:
    with _registrations(shown) as added:
        run()
    plugin = Plugin(_free(name), digest or _digest_of_module(key), frozenset(added), installed)
    _loaded[key] = plugin
    return plugin


@contextlib.contextmanager
def _registrations(shown: str) -> Iterator[set[str]]:
    """Collects the names that are registered inside the context, and removes them if the code fails."""
    from sparsellm.allocation import ALLOCATIONS
    from sparsellm.methods import METHODS
    from sparsellm.solvers import SOLVERS

    registries: list[Any] = [SOLVERS, METHODS, ALLOCATIONS]
    before = [dict(registry._entries) for registry in registries]
    added: set[str] = set()
    try:
        yield added
        for registry, entries in zip(registries, before, strict=True):
            added |= registry._entries.keys() - entries.keys()
    except BaseException as error:
        for registry, entries in zip(registries, before, strict=True):
            registry._entries.clear()
            registry._entries.update(entries)
        if isinstance(error, (Exception, SystemExit)):
            raise RecipeError(_why(shown, error)) from error
        raise


def _why(shown: str, error: BaseException) -> str:
    """The error message for a plugin that failed: one line, with the line number in the plugin."""
    if isinstance(error, ModuleNotFoundError) and error.name and f"{shown}.".startswith(f"{error.name}."):
        return (
            f"no plugin {shown!r}: there is no module {error.name!r}; install its package, or give the path of a file, "
            "such as ./my_solver.py"
        )
    said = error.msg if isinstance(error, SyntaxError) else str(error)
    reason = " ".join(said.split()) or "no reason given"
    if str(error).endswith("is registered twice"):
        return f"plugin {shown}: {reason}; give it another name"
    line = error.lineno if isinstance(error, SyntaxError) else _line_in(shown, error)
    at = f", line {line}" if line is not None else ""
    return f"plugin {shown} cannot be imported: {type(error).__name__}: {reason}{at}; correct it, or leave it out"


def _line_in(shown: str, error: BaseException) -> int | None:
    """The number of the last line of the plugin's own file in the traceback."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename).name == Path(shown).name:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _free(name: str) -> str:
    """The name, with a number if another file of this name is loaded."""
    taken = loaded()
    numbered = (f"{name} ({number})" for number in range(2, len(taken) + 3))
    return next(each for each in (name, *numbered) if each not in taken)


def _digest_of_module(name: str) -> str:
    module = sys.modules[name]
    digest = hashlib.sha256()
    if hasattr(module, "__path__"):  # a package
        for root in sorted(map(Path, module.__path__)):
            for file in sorted(root.rglob("*.py")):
                digest.update(f"{file.relative_to(root).as_posix()}\0".encode(errors="surrogateescape"))
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    elif module.__file__ is not None:
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()

"""Figures of the size and shape of the code, for the last section of docs/architecture.md.

    python tools/figures.py                      # of this checkout, as rows of a table
    python tools/figures.py --commit 35ebe64     # of a commit, read from git
    python tools/figures.py 35ebe64 HEAD         # before | after: the table itself
    python tools/figures.py --list               # functions beyond the limits, with their places

Only the standard library; the package need not be importable. Lines of Python are all lines of all ``.py`` files below
``src``, blank lines and comments included. A function's length is counted from its ``def`` to its last line, docstring
included, decorators not. Parameters are all of them, ``self`` and ``cls`` not counted.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "src/sparsellm"
METHOD = f"{PACKAGE}/methods/sparsellm.py", "sparsellm"  # whose keyword-only parameters are options
LONGEST, MOST_PARAMETERS = 80, 8


@dataclass(frozen=True)
class Function:
    """A function or method: where it is, its lines, and its parameters."""

    place: str
    lines: int
    parameters: int


def files_of(commit: str | None) -> dict[str, str]:
    """The text of every Python file below ``src`` by its path, of a commit or, for None, of the checkout."""
    if commit is None:
        return {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in sorted((ROOT / "src").rglob("*.py"))}
    names = _git("ls-tree", "-r", "--name-only", commit, "src").splitlines()
    return {name: _git("show", f"{commit}:{name}") for name in names if name.endswith(".py")}


def functions(files: dict[str, str]) -> Iterator[Function]:
    """All functions, nested ones included."""
    for path, text in files.items():
        yield from _functions(ast.parse(text), f"{path}:")


def figures(files: dict[str, str]) -> dict[str, str]:
    """Every figure as it stands in the table, by its name."""
    every = list(functions(files))
    longest = max(every, key=lambda function: function.lines)
    widest = max(every, key=lambda function: function.parameters)
    inner = [each for each in every if not each.place.startswith(f"{PACKAGE}/cli.py:")]
    narrower = max(inner, key=lambda function: function.parameters)
    top = [path for path in files if path.startswith(f"{PACKAGE}/") and path.count("/") == 2]
    entries = sum(_mapping_of_any(ast.parse(text)) for text in files.values())
    return {
        "lines of Python in `src`": f"{sum(len(text.splitlines()) for text in files.values()):,}",
        "longest function": f"{longest.lines} lines, {_named(longest)}",
        f"functions beyond {LONGEST} lines": str(sum(each.lines > LONGEST for each in every)),
        "most parameters": f"{widest.parameters}, {_named(widest)}",
        "most parameters, commands aside": f"{narrower.parameters}, {_named(narrower)}",
        f"functions of more than {MOST_PARAMETERS} parameters": str(
            sum(each.parameters > MOST_PARAMETERS for each in every)
        ),
        "files at the top level of the package": str(len(top)),
        "options of `sparsellm`": str(_options(files)),
        "occurrences of `dict[str, Any]`": str(entries),
    }


def _functions(node: ast.AST, prefix: str) -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        inner = prefix
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = f"{prefix}{child.name}."
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield Function(f"{prefix}{child.name}", (child.end_lineno or 0) - child.lineno + 1, _parameters(child))
        yield from _functions(child, inner)


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    own = bool(names) and names[0] in ("self", "cls")
    return len(names) - own + (given.vararg is not None) + (given.kwarg is not None)


def _options(files: dict[str, str]) -> int:
    """The keyword-only parameters of the method ``sparsellm``."""
    path, name = METHOD
    for node in ast.parse(files[path]).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return len(node.args.kwonlyargs)
    raise SystemExit(f"{path} has no function {name}")


def _mapping_of_any(tree: ast.AST) -> int:
    """How often ``dict[str, Any]`` stands in the code, inside other types too; text in strings does not count."""
    return sum(isinstance(node, ast.Subscript) and ast.unparse(node) == "dict[str, Any]" for node in ast.walk(tree))


def _named(function: Function) -> str:
    path, _, name = function.place.partition(":")
    return f"`{Path(path).stem}.{name}`"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        raise SystemExit(done.stderr.strip())
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs="*", help="columns of the table, commits; none for this checkout alone")
    parser.add_argument("--commit", help="one commit in place of this checkout")
    parser.add_argument("--list", action="store_true", help="functions beyond the limits")
    arguments = parser.parse_args()
    if arguments.list:
        beyond = [
            function
            for function in functions(files_of(arguments.commit))
            if function.lines > LONGEST or function.parameters > MOST_PARAMETERS
        ]
        for function in sorted(beyond, key=lambda function: -function.lines):
            sys.stdout.write(f"{function.lines:4} lines {function.parameters:3} parameters  {function.place}\n")
        return
    columns = [figures(files_of(commit)) for commit in arguments.commits or [arguments.commit]]
    names = arguments.commits or [arguments.commit or "this checkout"]
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    lines += [f"| {name} | {' | '.join(column[name] for column in columns)} |" for name in columns[0]]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

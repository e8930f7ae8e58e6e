"""Figures of the size and shape of the code, and the budget of lines of each package.

    python tools/figures.py                      # of this checkout, as rows of a table
    python tools/figures.py 35ebe64 HEAD         # before | after: the table itself
    python tools/figures.py --list               # functions beyond the limits, with their places
    python tools/figures.py --budget             # exit code 1 where a package is over tools/budget.toml

Only the standard library; the package need not be importable. Lines of Python are all lines of all ``.py`` files, blank
lines and comments included. A function's length is counted from its ``def`` to its last line, decorators not.
Parameters are all of them, ``self`` and ``cls`` not counted.
"""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import sys
import tarfile
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from language import BANNED

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "src/sparsellm"
READ = ("src", "tests", "docs", "README.md")
ON_THE_WAY = (
    "api.py",
    "prune.py",
    "run/",
    "methods/sparsellm.py",
)  # from `sparsellm.prune` to the method's first solver
LONGEST, MOST_PARAMETERS = 80, 8


@dataclass(frozen=True)
class Function:
    """A function or method: where it is, its lines, and its parameters."""

    place: str
    lines: int
    parameters: int


def files_of(commit: str | None) -> dict[str, str]:
    """Python files and pages by path, in a commit or, for None, in the checkout."""
    if commit is None:
        paths = [path for name in READ for path in ([ROOT / name], (ROOT / name).rglob("*"))[(ROOT / name).is_dir()]]
        texts = {str(path.relative_to(ROOT)): path for path in sorted(paths) if path.suffix in (".py", ".md")}
        return {name: path.read_text("utf-8") for name, path in texts.items()}
    done = subprocess.run(["git", "archive", commit, *READ], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr.decode().strip())
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        members = [item for item in archive if item.isfile() and item.name.endswith((".py", ".md"))]
        return {item.name: archive.extractfile(item).read().decode() for item in members}  # type: ignore[union-attr]


def functions(files: dict[str, str]) -> Iterator[Function]:
    """All functions, nested ones included."""
    for path, text in files.items():
        yield from _functions(ast.parse(text), f"{path}:")


def lines_by_package(files: dict[str, str]) -> Counter[str]:
    """Lines of Python of each folder of ``sparsellm``, of its top-level files together, of ``sparsepack``, of tests."""
    lines: Counter[str] = Counter()
    for path, text in files.items():
        parts = path.removeprefix("src/").split("/")
        if path.endswith(".py"):
            lines["/".join(parts[:2]) if parts[0] == "sparsellm" and len(parts) > 2 else parts[0]] += text.count("\n")
    return lines


def over_budget(files: dict[str, str], budget: dict[str, int]) -> list[str]:
    """A sentence for every package that has more lines than its budget, or none."""
    return [
        f"{package} has {lines} lines, and its budget is {budget.get(package, 0)}"
        for package, lines in sorted(lines_by_package(files).items())
        if lines > budget.get(package, 0)
    ]


def figures(files: dict[str, str]) -> dict[str, str]:
    """Every figure as it stands in the table, by its name."""
    source = {path: text for path, text in files.items() if path.startswith("src/")}
    every = list(functions(source))
    longest = max(every, key=lambda function: function.lines)
    widest = max(every, key=lambda function: function.parameters)
    lines = lines_by_package(files)
    trees = [ast.parse(text) for text in source.values()]
    words = sum(len(text.split()) for path, text in files.items() if path.endswith(".md"))
    return {
        "lines of `sparsellm`": f"{sum(n for name, n in lines.items() if name.startswith('sparsellm')):,}",
        "lines of `sparsepack`": f"{lines['sparsepack']:,}",
        "lines of tests": f"{lines['tests']:,}",
        "longest function": f"{longest.lines} lines, {_named(longest)}",
        f"functions beyond {LONGEST} lines": str(sum(item.lines > LONGEST for item in every)),
        "most parameters": f"{widest.parameters}, {_named(widest)}",
        f"functions of more than {MOST_PARAMETERS} parameters": str(
            sum(item.parameters > MOST_PARAMETERS for item in every)
        ),
        "classes named between `prune()` and a solver": str(len(_classes_on_the_way(source))),
        "occurrences of `dict[str, Any]`": str(sum(map(_mapping_of_any, trees))),
        "banned phrases in `src`": str(sum(len(BANNED.findall(text)) for text in source.values())),
        "words of README and docs": f"{words:,}",
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
    names = [item.arg for item in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    bound = bool(names) and names[0] in ("self", "cls")
    return len(names) - bound + (given.vararg is not None) + (given.kwarg is not None)


def _classes_on_the_way(source: dict[str, str]) -> set[str]:
    """Classes of the package that the files between ``sparsellm.prune`` and the first solver name."""
    nodes = {path: list(ast.walk(ast.parse(text))) for path, text in source.items()}
    classes = {node.name for inside in nodes.values() for node in inside if isinstance(node, ast.ClassDef)}
    way = tuple(f"{PACKAGE}/{name}" for name in ON_THE_WAY)
    named = {
        getattr(node, "id", None) or getattr(node, "attr", None)
        for path, inside in nodes.items()
        if path.startswith(way)
        for node in inside
    }
    return classes & named


def _mapping_of_any(tree: ast.AST) -> int:
    """How often ``dict[str, Any]`` stands in the code, inside other types too; text in strings does not count."""
    return sum(isinstance(node, ast.Subscript) and ast.unparse(node) == "dict[str, Any]" for node in ast.walk(tree))


def _named(function: Function) -> str:
    path, _, name = function.place.partition(":")
    return f"`{Path(path).stem}.{name}`"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs="*", help="columns of the table; none for this checkout alone")
    parser.add_argument("--list", action="store_true", help="functions beyond the limits")
    parser.add_argument("--budget", action="store_true", help="check the lines of each package")
    arguments = parser.parse_args()
    if arguments.budget:
        budget = tomllib.loads((ROOT / "tools" / "budget.toml").read_text("utf-8"))
        over = over_budget(files_of(None), budget)
        raise SystemExit("\n".join(over) or None)
    columns = [files_of(commit) for commit in arguments.commits or [None]]
    if arguments.list:
        for item in sorted(
            functions({path: text for path, text in columns[-1].items() if path.startswith("src/")}),
            key=lambda function: -function.lines,
        ):
            if item.lines > LONGEST or item.parameters > MOST_PARAMETERS:
                sys.stdout.write(f"{item.lines:4} lines {item.parameters:3} parameters  {item.place}\n")
        return
    table = [figures(files) for files in columns]
    sys.stdout.write(f"| | {' | '.join(arguments.commits or ['this checkout'])} |\n|---|{'---|' * len(table)}\n")
    sys.stdout.writelines(f"| {name} | {' | '.join(item[name] for item in table)} |\n" for name in table[0])


if __name__ == "__main__":
    main()

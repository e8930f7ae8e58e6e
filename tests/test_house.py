"""Rules of the house that no linter has: short functions, few parameters, files of distinct names."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
MOST_LINES, MOST_PARAMETERS = 80, 8

# Commands and functions registered by name may have more parameters, which are their options. So may these.
EXCEPTIONS = {
    "sparsellm.api.prune": "what a user can say of a run",
    "sparsellm.api.evaluate": "what a user can say of a measurement",
    "sparsepack.triton_kernels._multiply": "a kernel",
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def functions() -> tuple[tuple[str, Function], ...]:
    """Every function of both packages by its dotted name."""

    def inside(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
        for child in ast.iter_child_nodes(node):
            name = f"{prefix}.{child.name}" if hasattr(child, "name") else prefix
            if isinstance(child, Function):
                yield name, child
            yield from inside(child, name)

    modules = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in sorted(SOURCE.rglob("*.py"))}
    return tuple(node for name, path in modules.items() for node in inside(ast.parse(path.read_text("utf-8")), name))


def lines(function: Function) -> int:
    return (function.end_lineno or 0) - function.lineno + 1


def parameters(function: Function) -> int:
    arguments = function.args
    names = [node.arg for node in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def has_options(function: Function) -> bool:
    """Whether the parameters of a function are options of a command or of a registered name."""
    decorators = " ".join(ast.unparse(node) for node in function.decorator_list)
    return "app.command" in decorators or ".register(" in decorators


def test_every_exception_is_needed() -> None:
    many = {name for name, function in functions() if parameters(function) > MOST_PARAMETERS}
    assert many >= EXCEPTIONS.keys()


def test_no_function_is_long() -> None:
    assert {name: lines(node) for name, node in functions() if lines(node) > MOST_LINES} == {}


def test_no_function_has_many_parameters() -> None:
    many = {name for name, node in functions() if parameters(node) > MOST_PARAMETERS and not has_options(node)}
    assert many <= EXCEPTIONS.keys()


def test_no_two_files_have_one_name() -> None:
    for package in ("sparsellm", "sparsepack"):
        names = Counter(path.name for path in (SOURCE / package).rglob("*.py") if path.name != "__init__.py")
        assert {name for name, count in names.items() if count > 1} == set()

"""Rules of the house that no linter has: short functions, few parameters, files of distinct names."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "sparsellm"
MOST_LINES, MOST_PARAMETERS = 80, 8

# Commands, whose parameters are their options, and functions registered by name, whose keyword-only parameters are.
# The others are named one by one.
EXCEPTIONS = {
    "api.prune": "what a user can say of a run",
    "api.evaluate": "what a user can say of a measurement",
    "runtime.triton_kernels._multiply": "a kernel",
}


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of the package by its dotted name."""

    def inside(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            name = f"{prefix}.{child.name}" if hasattr(child, "name") else prefix
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield name, child
            yield from inside(child, name)

    for path in sorted(SOURCE.rglob("*.py")):
        module = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        yield from inside(ast.parse(path.read_text(encoding="utf-8")), module)


def decorators(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return " ".join(ast.unparse(each) for each in function.decorator_list)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = function.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def is_command(name: str, function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return name.startswith("cli.") and "app.command" in decorators(function)


def test_the_rules_see_the_package() -> None:
    names = {name for name, _ in functions()}
    assert {"api.prune", "run.run.Run.walk", "solvers.wanda.wanda"} <= names
    assert names >= EXCEPTIONS.keys()  # an exception that is not needed any more is removed


def test_no_function_is_long() -> None:
    long = {
        name: function.end_lineno - function.lineno + 1
        for name, function in functions()
        if function.end_lineno is not None
        and function.end_lineno - function.lineno + 1 > MOST_LINES
        and not is_command(name, function)
    }
    assert long == {}


def test_no_function_has_many_parameters() -> None:
    many = {
        name: parameters(function)
        for name, function in functions()
        if parameters(function) > MOST_PARAMETERS
        and not is_command(name, function)
        and ".register(" not in decorators(function)
        and name not in EXCEPTIONS
    }
    assert many == {}


def test_the_door_is_forty_lines() -> None:
    (door,) = (function for name, function in functions() if name == "api.prune")
    assert door.end_lineno is not None
    assert door.end_lineno - door.lineno + 1 <= 40


def test_no_two_files_have_one_name() -> None:
    names = Counter(path.name for path in SOURCE.rglob("*.py") if path.name != "__init__.py")
    assert {name for name, count in names.items() if count > 1} == set()

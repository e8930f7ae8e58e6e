"""Counts turns of phrase that a reader has to decode, in src, README, docs and the help texts of the command line.

    python tools/language.py           # counts; exit code 1 if src, README, help or docs have one
    python tools/language.py --list    # the places too

A phrase that begins with "of" after a colon, a hash or at the start of a help text has no subject. The others are
idioms of this project's past, for which plain English has shorter words. Names of variables that do not say what they
hold count as well, in tests, benchmarks and examples too: none is allowed there either.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BANNED = re.compile(
    r"(?:: |# )[Oo]f |[Ss]o many |\b[Aa]s of (?:a|the) |[Bb]y what to |\b[Ee]ntering\b|\b[Ll]eaving\b"
)
SUFFIXES = {".py", ".cpp", ".h", ".md", ".html", ".css", ".js", ".jinja"}
NAMES = {"each", "found", "own", "wanted", "whole"}
STRICT = ("src", "names", "README", "help", "docs")  # where none is allowed

Place = tuple[str, str]
"""Where a phrase stands, and the line."""


def banned(texts: dict[str, str]) -> list[Place]:
    """Each banned phrase of texts by path, as ``path:line``."""
    return [
        (f"{path}:{number}", line.strip())
        for path, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        for _ in BANNED.finditer(line)
    ]


def vague_names(texts: dict[str, str]) -> list[Place]:
    """Each variable or parameter of Python sources by path whose name is one of ``NAMES``."""
    return [
        (f"{path}:{node.lineno}", name)
        for path, text in texts.items()
        if path.endswith(".py")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.arg)
        or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
        for name in [node.arg if isinstance(node, ast.arg) else node.id]
        if name in NAMES
    ]


def files(*roots: Path) -> dict[str, str]:
    """The texts of all files below ``roots`` that people read, by path."""
    paths = (
        path
        for root in roots
        for path in ([root] if root.is_file() else sorted(root.rglob("*")))
    )
    return {
        str(path.relative_to(ROOT)): path.read_text("utf-8")
        for path in paths
        if path.suffix in SUFFIXES
    }


def help_texts() -> Iterator[Place]:
    """Help of every command and option, and of every option of a method, with what they belong to."""
    import typer

    from sparsellm.app import cli
    from sparsellm.method.allocation import ALLOCATIONS
    from sparsellm.method.blocks import METHODS

    group = typer.main.get_command(cli.app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        yield name, command.help or ""
        yield from (
            (f"{name} {option.name}", getattr(option, "help", None) or "")
            for option in command.params
        )
    for registry in (METHODS, ALLOCATIONS):
        for entry in registry.values():
            fields = entry.options.model_fields
            yield from (
                (f"{entry.name} {name}", field.description or "")
                for name, field in fields.items()
            )


def places() -> dict[str, list[Place]]:
    """All places, by where they count."""
    return {
        "src": banned(files(ROOT / "src", ROOT / "sparsepack/src")),
        "names": vague_names(
            files(
                *(
                    ROOT / part
                    for part in ("src", "sparsepack", "tests", "benchmarks", "examples")
                )
            )
        ),
        "README": banned(files(ROOT / "README.md", ROOT / "sparsepack/README.md")),
        "help": banned(
            {f"--help of {name}": f": {text}" for name, text in help_texts()}
        ),
        "docs": banned(files(ROOT / "docs", ROOT / "CONTRIBUTING.md")),
        "tests, benchmarks": banned(
            files(ROOT / "tests", ROOT / "benchmarks", ROOT / "examples")
        ),
    }


def main() -> int:
    parts = places()
    for part, lines in parts.items():
        sys.stdout.write(f"{part}: {len(lines)}\n")
        if "--list" in sys.argv[1:]:
            sys.stdout.writelines(f"  {place}: {line}\n" for place, line in lines)
    return any(parts[part] for part in STRICT)


if __name__ == "__main__":
    sys.exit(main())

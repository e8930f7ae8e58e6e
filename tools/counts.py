"""Counts what a reader has to decode, and what the project promises.

    python tools/counts.py            # a table: this checkout, next to the last release
    python tools/counts.py --check    # exit code 1 beyond the limits of density, tuple assignments and unpacking

Tokens are those of Python's own tokenizer, without comments and docstrings. Only the standard library is needed;
commands and options are counted where the package can be imported.
"""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import sys
import tarfile
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("src", "sparsepack/src", "sparsepack-vllm/src")
TESTS = ("tests", "sparsepack/tests", "sparsepack-vllm/tests")
OURS = ("sparsellm", "sparsepack", "sparsepack_vllm", "tests")
PAGES = ("README.md", "docs", "sparsepack/README.md", "sparsepack-vllm/README.md")
RELEASE = "38e66faf"  # the commit that the table compares with

MOST_TOKENS_A_LINE = 8.5
MOST_TUPLE_ASSIGNMENTS = 4.0  # for every 1,000 lines of code

LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


@dataclass(frozen=True)
class Counts:
    """The counts of some Python sources."""

    tokens: int
    lines: int  # that have a token
    conditional_expressions: int
    tuple_assignments: int  # such as ``a, b = c, d``
    unpacked_calls: list[str]  # places where a sequence fills parameters of our own

    def per_thousand(self, count: int) -> float:
        """``count`` for every 1,000 lines of code."""
        return 1000 * count / max(self.lines, 1)

    @property
    def density(self) -> float:
        """Tokens on a line of code."""
        return self.tokens / max(self.lines, 1)


def tokens_of(text: str) -> Iterator[tokenize.TokenInfo]:
    """The tokens of a source that are neither layout, comment nor docstring."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_docstring = token.type == tokenize.STRING and token.string.lstrip(
            "rbuf"
        ).startswith('"""')
        if token.type not in LAYOUT and not is_docstring:
            yield token


def fixed_signatures(trees: Iterable[ast.Module]) -> set[str]:
    """Names of our functions and classes whose positional parameters all have names."""
    fixed: set[str] = set()
    variadic: set[str] = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                (variadic if node.args.vararg else fixed).add(node.name)
            elif isinstance(node, ast.ClassDef):
                fixed.add(node.name)
    return fixed - variadic


def foreign_names(tree: ast.Module) -> set[str]:
    """Names that a source imports from packages that are not ours."""
    foreign: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            module = ""
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
        else:
            continue
        for alias in node.names:
            package = (module or alias.name).partition(".")[0]
            if package not in OURS:
                foreign.add((alias.asname or alias.name).partition(".")[0])
    return foreign


def is_swap(node: ast.Assign) -> bool:
    """Whether an assignment exchanges values, as ``a, b = b, a`` does."""
    target, value = ast.unparse(node.targets[0]), ast.unparse(node.value)
    return sorted(target.strip("()").split(", ")) == sorted(
        value.strip("()").split(", ")
    )


def counts(texts: dict[str, str]) -> Counts:
    """The counts of Python sources by path."""
    trees = {path: ast.parse(text) for path, text in texts.items()}
    ours = fixed_signatures(trees.values())
    tokens = 0
    lines = 0
    conditional_expressions = 0
    tuple_assignments = 0
    unpacked: list[str] = []
    for path, tree in trees.items():
        found = list(tokens_of(texts[path]))
        tokens += len(found)
        lines += len({token.start[0] for token in found})
        # A parameter may be any function, and its caller knows no names.
        parameters = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        foreign = foreign_names(tree) | parameters - {"self", "cls"}
        for node in ast.walk(tree):
            if isinstance(node, ast.IfExp):
                conditional_expressions += 1
            elif isinstance(node, ast.Assign):
                both = (node.targets[0], node.value)
                if all(isinstance(side, ast.Tuple) for side in both):
                    tuple_assignments += not is_swap(node)
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                first = called.partition(".")[0]
                name = called.rpartition(".")[2]
                starred = any(isinstance(item, ast.Starred) for item in node.args)
                if starred and name in ours and first not in foreign:
                    unpacked.append(f"{path}:{node.lineno} {name}")
    return Counts(tokens, lines, conditional_expressions, tuple_assignments, unpacked)


def texts_here(roots: Iterable[str], suffix: str) -> dict[str, str]:
    """The texts of this checkout below ``roots``, by path."""
    texts = {}
    for root in roots:
        place = ROOT / root
        paths = [place] if place.is_file() else sorted(place.rglob(f"*{suffix}"))
        for path in paths:
            if path.is_file():
                texts[path.relative_to(ROOT).as_posix()] = path.read_text("utf-8")
    return texts


def texts_at(commit: str) -> dict[str, str]:
    """All Python sources and pages of a commit, by path; none if the commit is not in this clone."""
    done = subprocess.run(
        ["git", "archive", commit], cwd=ROOT, capture_output=True, check=False
    )
    if done.returncode:
        return {}
    texts = {}
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        for member in archive:
            content = archive.extractfile(member)
            if member.name.endswith((".py", ".md")) and content is not None:
                texts[member.name] = content.read().decode()
    return texts


def below(texts: dict[str, str], roots: Iterable[str], suffix: str) -> dict[str, str]:
    """The texts whose path is below one of ``roots`` and ends in ``suffix``."""
    return {
        name: text
        for name, text in texts.items()
        if name.endswith(suffix)
        and any(Path(name).is_relative_to(root) for root in roots)
    }


def promises() -> dict[str, str]:
    """The numbers of commands, of options of ``prune`` and of public names."""
    try:
        from typer.main import get_command

        import sparsellm
        from sparsellm.app.cli import app
    except ImportError:
        return {}
    commands = {
        name: command
        for name, command in get_command(app).commands.items()  # type: ignore[attr-defined]
        if not command.hidden
    }
    options = [
        option
        for option in commands["prune"].params
        if option.param_type_name == "option" and not getattr(option, "hidden", False)
    ]
    return {
        "commands": str(len(commands)),
        "options of prune": str(len(options)),
        "public names": str(len(sparsellm.__all__)),
    }


def words_of(page: str) -> int:
    """The words of a page: what stands between blanks and has a letter or a digit."""
    return sum(any(map(str.isalnum, word)) for word in page.split())


def rows(
    source: dict[str, str], tests: dict[str, str], pages: dict[str, str]
) -> dict[str, str]:
    """The table's values by name."""
    code = counts(source)
    words = sum(words_of(text) for text in pages.values())
    conditional = code.per_thousand(code.conditional_expressions)
    assignments = code.per_thousand(code.tuple_assignments)
    return {
        "tokens": f"{code.tokens:,}",
        "tokens on a line of code": f"{code.density:.1f}",
        "conditional expressions per 1,000 lines": f"{conditional:.1f}",
        "tuple assignments per 1,000 lines": f"{assignments:.1f}",
        "calls that unpack a sequence into our parameters": str(
            len(code.unpacked_calls)
        ),
        "tokens of tests": f"{counts(tests).tokens:,}",
        "words of README and docs": f"{words:,}",
        "words of README": f"{words_of(pages.get('README.md', '')):,}",
    }


def main() -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail beyond the limits")
    parser.add_argument("--release", default=RELEASE, help="a commit to compare with")
    arguments = parser.parse_args()
    source = texts_here(SOURCES, ".py")
    now = rows(source, texts_here(TESTS, ".py"), texts_here(PAGES, ".md")) | promises()
    release = texts_at(arguments.release)
    before = rows(
        below(release, SOURCES, ".py"),
        below(release, TESTS, ".py"),
        below(release, PAGES, ".md"),
    )
    print(f"| | {arguments.release} | now |\n|---|---|---|")
    for name, value in now.items():
        print(f"| {name} | {before.get(name, '')} | {value} |")
    if not arguments.check:
        return 0
    code = counts(source)
    wrong = [f"{place} unpacks a sequence" for place in code.unpacked_calls]
    if code.density > MOST_TOKENS_A_LINE:
        wrong.append(f"{code.density:.1f} tokens on a line, over {MOST_TOKENS_A_LINE}")
    assignments = code.per_thousand(code.tuple_assignments)
    if assignments > MOST_TUPLE_ASSIGNMENTS:
        wrong.append(
            f"{assignments:.1f} tuple assignments per 1,000 lines, "
            f"over {MOST_TUPLE_ASSIGNMENTS}"
        )
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

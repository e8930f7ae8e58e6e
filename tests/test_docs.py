"""The pages: their links lead somewhere, their commands run on a tiny model, their figure is that of their numbers."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import sparsellm
from sparsellm import Recipe, api
from tests.documents import ROOT, SMALL, blocks
from tests.exports.checkpoints import wide_llama
from tests.models import converter, save_tiny, tiny_tokenizer
from tests.models.families import mixtral

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]

TUTORIAL = ROOT / "docs" / "tutorial.md"
RUN = [
    ROOT / "README.md",
    ROOT / "docs" / "guide.md",
    ROOT / "docs" / "experts.md",
    TUTORIAL,
]


def steps(page: Path) -> list[tuple[str, str]]:
    """Commands of this tool in the shell blocks of a page, and its Python blocks, in order: language and text."""
    fences = re.findall(
        r"^```(sh|python)\n(.*?)^```",
        page.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    result = []
    for language, text in fences:
        lines = (
            [line for line in text.splitlines() if line.startswith("sparsellm ")]
            if language == "sh"
            else [text]
        )
        result += [(language, line) for line in lines]
    return result


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    text = re.sub(
        r"^```.*?^```",
        "",
        page.read_text(encoding="utf-8"),
        flags=re.MULTILINE | re.DOTALL,
    )
    for target in [
        target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target
    ]:
        name, _, heading = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name}: {target}"
        if heading:
            headings = re.findall(
                r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE
            )
            anchors = {
                re.sub(r"[^\w\- ]", "", item.lower()).replace(" ", "-")
                for item in headings
            }
            assert heading in anchors, f"{page.name}: {target}"


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    named = re.findall(r'= "([\w-]+\.md)"', (ROOT / "zensical.toml").read_text("utf-8"))
    assert sorted(named) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_the_site_builds_without_a_broken_link(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    for name in ("src", "sparsepack"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    built = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    page = (tmp_path / "site" / "index.html").read_text("utf-8")
    assert "The best model of a given size" in page
    assert not re.findall(r'(?:src|rel="stylesheet" href)="(?:https?:)?//', page), (
        "it loads something from elsewhere"
    )
    interface = (tmp_path / "site" / "api" / "index.html").read_text("utf-8")
    without = [
        name
        for name in sparsellm.__all__
        if not name.startswith("__") and f'id="sparsellm.{name}"' not in interface
    ]
    assert without == [], "api.md lacks public names"


@pytest.mark.usefixtures("forgotten_plugins")
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_every_command_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    # most tasks of a page need a network
    monkeypatch.setattr(api, "find_tasks", lambda *_: "tasks")
    monkeypatch.setattr(api, "run_tasks", lambda *_, **__: {})
    monkeypatch.chdir(tmp_path)
    save_tiny(wide_llama(), tiny_tokenizer(), tmp_path / "path" / "to" / "model")
    if page.name == "experts.md":
        save_tiny(mixtral(), tiny_tokenizer(), tmp_path / "path" / "to" / "mixture")
    lines = "\n".join(
        f"Line {number} of a text about nothing in particular." for number in range(400)
    )
    for name in ("my-text.txt", "my-test.txt"):
        Path(name).write_text(lines, encoding="utf-8")
    solver = next(
        (block for block in blocks(page, "python") if "SOLVERS.register" in block), ""
    )
    Path("my_solver.py").write_text(solver)
    Path("llama.cpp").mkdir()
    Path("llama.cpp/convert_hf_to_gguf.py").symlink_to(converter.__file__)
    Path("my.yaml").write_text("".join(blocks(page, "yaml")))
    result, names = steps(page), dict[str, object]()
    for language, line in result:
        if language == "python":
            # blocks go on from each other, and from commands
            if page.name == "guide.md" and ".register(" not in line:
                quick = line.replace(
                    'calibration="my-text.txt"',
                    'calibration="my-text.txt", samples=4, seq_len=32',
                )
                exec(
                    compile(
                        quick.replace("seq_len=1024", "seq_len=32"), page.name, "exec"
                    ),
                    names,
                )
            continue
        # no form of the tiny model is that large
        words = shlex.split(line.replace("--size 4GB", "--size auto"))[1:]
        if "--out" in words:  # pages use the same name again and again
            shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
        code, _, stderr = run(*words, *SMALL.get(words[0], "").split())
        assert code == 0, f"{line}: {stderr}"
    if page == TUTORIAL:
        (client,) = blocks(page, "python")
        command = [sys.executable, "-m", "sparsellm", "serve", "small", "--port", "0"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            assert server.stderr is not None
            listening = next(
                url
                for line in server.stderr
                for url in re.findall(r"http://[^\s,]+", line)
            )
            exec(
                compile(
                    client.replace("http://127.0.0.1:8000/v1", listening),
                    page.name,
                    "exec",
                ),
                names,
            )
            server.terminate()
        assert names["answer"].usage.completion_tokens == 20


def test_recipes_of_the_guide_are_recipes() -> None:
    result = blocks(ROOT / "docs" / "guide.md", "yaml")
    assert result
    for block in result:
        assert all(
            getattr(Recipe.from_yaml(block), key) == value
            for key, value in yaml.safe_load(block).items()
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_a_page_compiles(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")


def test_the_page_of_options_is_that_of_the_registry() -> None:
    script = runpy.run_path(str(ROOT / "tools" / "options.py"))
    written = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert written == script["page"]() + "\n", "run tools/options.py > docs/options.md"


def test_counts_of_a_known_source(monkeypatch: pytest.MonkeyPatch) -> None:
    script = runpy.run_path(str(ROOT / "tools" / "counts.py"))
    first = (
        'def f(x, y):\n    """Returns x."""\n    a, b = x, y  # two\n    return a if b else 1\n'
        "def g(*several):\n    a, b = b, a\n    return several\n"
    )
    second = "f(*pair)\ng(*pair)\nzip(*pair)\n"
    counts = script["counts"]({"a.py": first, "b.py": second})
    # def f(x, y):  8, a, b = x, y  7, return a if b else 1  6; def g(*several):  7, 7, return several  2; 3 calls of 5
    assert counts.tokens == 8 + 7 + 6 + 7 + 7 + 2 + 3 * 5
    assert counts.lines == 9
    assert counts.conditional_expressions == 1
    assert counts.tuple_assignments == 1  # a swap is none
    assert counts.unpacked_calls == ["b.py:1 f"]
    assert counts.density == counts.tokens / 9


def test_banned_phrases_are_found_with_their_places(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = runpy.run_path(str(ROOT / "tools" / "language.py"))
    text = "weights: of the linear\nthe inputs of a linear\nkept as of a linear, so many times\n"
    assert [place for place, _ in script["banned"]({"a.py": text})] == [
        "a.py:1",
        "a.py:3",
        "a.py:3",
    ]
    source = "def f(whole):\n    return [each for each in whole]\n"
    assert sorted(script["vague_names"]({"a.py": source, "b.md": "="})) == [
        ("a.py:1", "whole"),
        ("a.py:2", "each"),
    ]

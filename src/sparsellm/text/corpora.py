"""The corpora of the papers, by their own protocol; data sets of the Hub; and a text that needs no download."""

from __future__ import annotations

import gzip
import re
import sys
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from sparsellm.errors import DataError, one_line, shown
from sparsellm.files.named import hub_reason
from sparsellm.inputs import parse_json
from sparsellm.text.texts import Split, Text, read_rows, text_rows

# the largest share of the characters of pydoc that is held out for evaluation
_HELD_OUT = 0.2
_RULE = re.compile(r"\s*([=*~^-])\1\1+\s*")  # a line that only underlines a heading
# Parts of the standard library that other packages of a distribution may hold, that are written for one machine, or
# that are tables; and the text of pydoc
_NOT_READ = {
    "_sysconfigdata",
    "distutils",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "tkinter",
    "turtle",
    "turtledemo",
    "venv",
}
_TESTS = {"test", "tests", "__pycache__"}
_OF_MODULE = 8000  # characters of a module that are read, so that no long one is most of the text
_LEAST_MODULES = 100  # with fewer, Python is installed without its sources
_HELD_OUT_EVERY = 6  # every sixth module is held out for evaluation
_C4_SAMPLE = (
    "allenai/c4",
    "en/c4-validation.00001-of-00008.json.gz",
    "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
)
_SAMPLED = 5000  # documents to calibrate on
_LONGEST = 16 << 20  # bytes of a line
# SparseGPT's evaluation on C4 reads no more.
_C4_DOCUMENTS = 1100
_C4_WINDOWS = 256
_PARTS: dict[Split, str] = {"calibration": "train", "evaluation": "test"}


def read_pydoc(split: Split) -> Text:
    """The English documentation inside every Python: no download, about 90,000 tokens, a sixth of them held out.

    It is technical prose of one kind, so it calibrates worse than a broad corpus. Its text changes with the version of
    Python, so results compare only within one version. Topics quote each other; a repeated paragraph counts only in the
    first topic, so that no paragraph is in both parts."""
    parts: dict[Split, list[str]] = {"calibration": [], "evaluation": []}
    held_out = total = 0  # characters
    seen: set[str] = set()
    for name in sorted(topics):
        new = []
        for paragraph in topics[name].split("\n\n"):
            text = "\n".join(
                line for line in paragraph.split("\n") if not _RULE.fullmatch(line)
            ).strip("\n")
            if text.strip() and text not in seen:
                seen.add(text)
                new.append(text)
        document = "\n\n".join(new)
        total += len(document)
        if not document:
            continue
        if held_out + len(document) <= _HELD_OUT * total:
            held_out += len(document)
            parts["evaluation"].append(document)
        else:
            parts["calibration"].append(document)
    return Text(parts[split])


def read_pycode(split: Split) -> Text:
    """The source code of Python's standard library: no download, about 500,000 tokens, a sixth of them held out.

    A document is the start of a module, up to 8,000 characters. The text is under the licence of Python (PSF-2.0), and
    changes with its version, as that of ``pydoc``. Raises DataError for a Python without sources."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = sorted(_modules(root))
    if len(modules) < _LEAST_MODULES:
        raise DataError(
            f"source 'pycode': {root} has {len(modules)} modules of Python's standard library as source code; name "
            "another text"
        )
    documents = []
    for number, file in enumerate(modules):
        held_out = number % _HELD_OUT_EVERY == 0
        if held_out == (split == "evaluation"):
            code = file.read_text("utf-8", errors="replace")[:_OF_MODULE]
            documents.append(code[: code.rfind("\n") + 1])
    return Text([document for document in documents if document.strip()])


def _modules(root: Path) -> Iterator[Path]:
    """The files of the standard library's modules, without tests."""
    for name in sys.stdlib_module_names - _NOT_READ:
        module = root / f"{name}.py"
        if module.is_file():
            yield module
        for file in (root / name).rglob("*.py"):
            if not _TESTS & {*file.relative_to(root).parts}:
                yield file


def read_wikitext2(argument: str, split: Split) -> Text:
    """WikiText-2 raw (1609.07843), train or test, rows joined with a blank line; wikitext2:PATH reads a raw file.

    The Hub's rows keep the line break of each line that is not blank, and these breaks are part of the string that the
    papers tokenise. ``wikitext2:PATH`` treats the lines of ``wiki.test.raw`` in the same way, so both yield one string:
    the test split has 287,644 tokens of GPT-2's vocabulary."""
    if argument:
        lines = read_rows(argument, text_rows)
        if not lines[-1]:  # the line break at the end of the file starts no further row
            lines.pop()
        return Text([f"{line}\n" if line.strip() else "" for line in lines])
    return Text(
        hub_column(
            "wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", split=_PARTS[split]
        )
    )


def read_ptb(split: Split) -> Text:
    """Penn Treebank (aclanthology.org/J93-2004), train or test, sentences joined with a space as in SparseGPT."""
    # The main branch of this data set holds a script; the Hub's own conversion of it holds only data.
    place: dict[str, str] = {"revision": "refs/convert/parquet", "column": "sentence"}
    return Text(
        hub_column("ptb", "ptb-text-only/ptb_text_only", split=_PARTS[split], **place),
        joiner=" ",
    )


def read_c4(split: Split) -> Text:
    """C4 (English, 1910.10683) as SparseGPT draws it: windows inside random documents of the first train shard;
    evaluation on the validation shard."""
    part = "train"
    file = "en/c4-train.00000-of-01024.json.gz"
    if split == "evaluation":
        part = "validation"
        file = "en/c4-validation.00000-of-00008.json.gz"
    documents = hub_column("c4", "allenai/c4", data_files={part: file}, split=part)
    if split == "calibration":
        return Text(documents, joiner=" ", per_document=True)
    return Text(documents[:_C4_DOCUMENTS], joiner=" ", most_windows=_C4_WINDOWS)


def fetch_c4_sample() -> Path:
    """The file with the documents of ``read_c4_sample``, 40 MB, which the hub's client keeps in its cache. Raises
    DataError if the hub cannot be reached."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    name, file, revision = _C4_SAMPLE
    known = try_to_load_from_cache(name, file, revision=revision, repo_type="dataset")
    if isinstance(known, str):
        return Path(known)
    try:
        # the client itself tries for half a minute
        get_session().head(constants.ENDPOINT, timeout=5)
        return Path(hf_hub_download(name, file, revision=revision, repo_type="dataset"))
    except Exception as error:  # the client raises httpx, requests and its own errors
        raise DataError(f"C4 cannot be fetched: {hub_reason(error)}") from error


def read_c4_sample(split: Split) -> Text:
    """The first documents of one validation shard of C4 (English), of a fixed revision: broad text from the web, about
    2,400,000 tokens. The next documents are held out for evaluation; source ``c4`` reads none of them."""
    path = fetch_c4_sample()
    documents = []
    first = 0
    count = _SAMPLED
    if split == "evaluation":
        first = _SAMPLED
        count = _C4_DOCUMENTS
    try:
        with gzip.open(path) as file:
            for number in range(first + count):
                line = file.readline(_LONGEST)
                if number >= first:
                    documents.append(
                        parse_json(
                            line, f"{path}, line {number + 1},", error=DataError
                        )["text"]
                    )
    except (OSError, EOFError, zlib.error, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not the sample of C4 ({one_line(error)}); remove it, and start again"
        ) from error
    return Text(documents)


def read_hub(argument: str, split: Split) -> Text:
    """Any data set with 'text' or 'messages', as hub:owner/name[:config[:split]]; by default split train, or test.

    A named split is used for calibration and evaluation alike, so name different ones for the two."""
    name, _, rest = argument.partition(":")
    config, _, chosen = rest.partition(":")
    if not name or ":" in chosen:
        raise DataError(
            f"source {shown(f'hub:{argument}')} names no data set; write hub:owner/name[:config[:split]]"
        )
    return Text(
        hub_column(
            f"hub:{argument}", name, config or None, split=chosen or _PARTS[split]
        )
    )


def hub_column(
    source: str, *arguments: Any, column: str = "text", **settings: Any
) -> Sequence[Any]:
    """One column of a data set (``messages`` if it has no ``text``), for the ``source`` that the user typed; the other
    arguments are those of ``datasets.load_dataset``. No code from the Hub is run. Raises DataError if ``datasets`` is
    not installed, the data set cannot be loaded, or it has no such column."""
    named = f"source {source!r}"
    instead = "or give a file of your own (.txt, .jsonl, .parquet), or 'pydoc', which needs no download"
    try:
        import datasets

        data = datasets.load_dataset(*arguments, **settings)
    except ImportError as error:
        raise DataError(
            f"{named} needs the package 'datasets': pip install datasets, {instead}"
        ) from error
    except Exception as error:  # errors of network, Hub and format, from several packages without a common base class
        raise DataError(
            f"{named} cannot be loaded: {hub_reason(error)}; check name and network, {instead}"
        ) from error
    known = data.column_names
    if column == "text" and "messages" in known and "text" not in known:
        column = "messages"
    if column not in known:
        raise DataError(
            f"{named} has no column {column!r}; its columns: {', '.join(known)}"
        )
    texts: Sequence[Any] = data[column]
    return texts

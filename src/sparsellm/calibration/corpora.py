"""The named corpora: those of the papers, by the papers' own protocol, and one that needs no download."""

from __future__ import annotations

import re
from pydoc_data.topics import topics

from sparsellm.calibration.hub import hub_column
from sparsellm.calibration.sources import SOURCES, Split, Text, reads_file, takes_no_argument
from sparsellm.calibration.text_files import read_rows, text_rows

_HELD_OUT = 0.2  # the largest share of the characters of pydoc that is held out for evaluation
_RULE = re.compile(r"\s*([=*~^-])\1\1+\s*")  # a line that only underlines a heading
_C4_DOCUMENTS, _C4_WINDOWS = 1100, 256  # the most that SparseGPT's evaluation on C4 reads


@takes_no_argument("pydoc")
@SOURCES.register("pydoc", paper="https://docs.python.org/3/library/pydoc.html")
def read_pydoc(argument: str, split: Split) -> Text:
    """The English documentation inside every Python: no download, about 90,000 tokens, a sixth of them held out.

    It is technical prose of one kind, so it calibrates worse than a broad corpus. Its text changes with the version of
    Python, so results compare only within one version. Topics quote each other; a repeated paragraph counts only in the
    first topic, so that no paragraph is in both parts.
    """
    parts: dict[Split, list[str]] = {"calibration": [], "evaluation": []}
    held_out = total = 0  # characters
    seen: set[str] = set()
    for name in sorted(topics):
        document = "\n\n".join(_new_paragraphs(topics[name], seen))
        total += len(document)
        fits = held_out + len(document) <= _HELD_OUT * total
        held_out += len(document) if fits else 0
        if document:
            parts["evaluation" if fits else "calibration"].append(document)
    return Text(parts[split])


def _new_paragraphs(document: str, seen: set[str]) -> list[str]:
    """The paragraphs that are not in ``seen``, without the rules under headings; adds them to ``seen``."""
    new = []
    for paragraph in document.split("\n\n"):
        text = "\n".join(line for line in paragraph.split("\n") if not _RULE.fullmatch(line)).strip("\n")
        if text.strip() and text not in seen:
            seen.add(text)
            new.append(text)
    return new


@reads_file("wikitext2")
@SOURCES.register("wikitext2", paper="Merity et al. 2016, https://arxiv.org/abs/1609.07843")
def read_wikitext2(argument: str, split: Split) -> Text:
    """WikiText-2 raw, train or test, rows joined with a blank line; wikitext2:PATH reads a raw file instead of the Hub.

    The Hub's rows keep the line break of each line that is not blank, and these breaks are part of the string that the
    papers tokenise. ``wikitext2:PATH`` treats the lines of ``wiki.test.raw`` in the same way, so both yield one string:
    the test split has 287,644 tokens of GPT-2's vocabulary.
    """
    if argument:
        lines = read_rows(argument, text_rows)
        if not lines[-1]:  # the line break at the end of the file starts no further row
            lines.pop()
        return Text([f"{line}\n" if line.strip() else "" for line in lines])
    part = "train" if split == "calibration" else "test"
    return Text(hub_column("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", split=part))


@takes_no_argument("ptb")
@SOURCES.register("ptb", paper="Marcus et al. 1993, https://aclanthology.org/J93-2004; joined as in SparseGPT")
def read_ptb(argument: str, split: Split) -> Text:
    """Penn Treebank, train or test, sentences joined with a space."""
    part = "train" if split == "calibration" else "test"
    # The main branch of this data set holds a script; the Hub's own conversion of it holds only data.
    sentences = hub_column(
        "ptb", "ptb-text-only/ptb_text_only", split=part, revision="refs/convert/parquet", column="sentence"
    )
    return Text(sentences, joiner=" ")


@takes_no_argument("c4")
@SOURCES.register("c4", paper="Raffel et al. 2019, https://arxiv.org/abs/1910.10683; drawn as in SparseGPT")
def read_c4(argument: str, split: Split) -> Text:
    """C4 (English): windows inside random documents of the first train shard; evaluation on the validation shard."""
    part, shard = ("train", "00000-of-01024") if split == "calibration" else ("validation", "00000-of-00008")
    data_files = {part: f"en/c4-{part}.{shard}.json.gz"}
    documents = hub_column("c4", "allenai/c4", data_files=data_files, split=part)
    if split == "calibration":
        return Text(documents, joiner=" ", per_document=True)
    return Text(documents[:_C4_DOCUMENTS], joiner=" ", most_windows=_C4_WINDOWS)

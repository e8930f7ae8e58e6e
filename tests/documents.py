"""The pages of the documentation, and their commands."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


SMALL = {  # What makes a command of a page quick; the last value of an option counts.
    "compress": "--samples 4 --seq-len 32 --effort 0 --calibration my-text.txt",
    "prune": "--samples 4 --seq-len 32",
    "eval": "--text my-test.txt --seq-len 32 --max-tokens 256",
    "generate": "--max-new-tokens 2",
    "bench": "--prompt-tokens 8 --new-tokens 2 --repeats 1",
    "compare": "--text-seq-len 32 --max-tokens 256 --samples 4 --seq-len 32",
}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```",
        page.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )

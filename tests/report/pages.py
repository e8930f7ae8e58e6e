"""Pages of the report, and what a browser would make of them, without a browser."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "link", "img", "br"}
# attributes that name something to load
LOADS = (
    "src",
    "href",
    "action",
    "data",
    "poster",
    "srcset",
)


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return " ".join("".join(self.parts).split())


class Page(HTMLParser):
    """The elements of a page in order, each with its whole text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.elements: list[Element] = []
        self._open: list[Element] = []
        self.feed(source)
        self.close()
        assert not self._open, [element.tag for element in self._open]

    def handle_starttag(
        self, tag: str, attributes: list[tuple[str, str | None]]
    ) -> None:
        element = Element(tag, {name: value or "" for name, value in attributes})
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag
        if tag in ("td", "th"):
            self.handle_data(" ")

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.parts.append(data)

    def all(self, tag: str, **attributes: str) -> list[Element]:
        return [
            e
            for e in self.elements
            if e.tag == tag and attributes.items() <= e.attributes.items()
        ]

    def one(self, tag: str, **attributes: str) -> Element:
        (element,) = self.all(tag, **attributes)
        return element

    def rows(self, caption: str) -> list[list[str]]:
        """The cells of the table with this caption, header first."""
        rows: list[list[str]] = []
        tables = [
            index
            for index, element in enumerate(self.elements)
            if element.tag == "caption"
        ]
        (start,) = [index for index in tables if self.elements[index].text == caption]
        for element in self.elements[start + 1 :]:
            if element.tag == "table":
                break
            if element.tag == "tr":
                rows.append([])
            elif element.tag in ("th", "td"):
                rows[-1].append(element.text)
        return rows

    def figures(self) -> dict[str, Any]:
        return json.loads(self.one("script", id="figures").text)  # type: ignore[no-any-return]


def page_of(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def rewrite(path: Path, **changes: Any) -> dict[str, Any]:
    """Replaces fields of a JSON file, and removes those given as None."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    content = {
        key: value for key, value in {**content, **changes}.items() if value is not None
    }
    path.write_text(json.dumps(content))
    return content


def results(
    perplexity: float, dense: float | None = 20.0, **more: Any
) -> dict[str, Any]:
    """The content of a ``results.json``, with a comparison with the dense model or without."""
    sizes: dict[str, Any] = {"window": 64, "windows": 4, "tokens": 252}
    stamp = {"sparsellm": "0.1.0", "machine": "cpu", "date": "2026-01-01"}
    evaluation: dict[str, Any] = {
        **stamp,
        "protocol": {
            "text": "wikitext2",
            "digest": "ab",
            "bos": "no",
            "dtype": "float32",
            **sizes,
        },
        "perplexity": {
            "value": perplexity,
            "low": 0.9 * perplexity,
            "high": 1.1 * perplexity,
        },
        "tasks": {"arc_easy": {"acc": {"value": 0.51, "stderr": 0.012}}},
    }
    if dense is not None:
        evaluation["against"] = {
            "model": "dense", "perplexity": {"value": dense, "low": 19.0, "high": 21.0}, "kl": 0.31,
            "kl_low": 0.3, "kl_high": 0.32, "agreement": 0.71, "recovery": 0.637,
        }  # fmt: skip
    rates = {
        ("dense", "compiled"): 20.0,
        ("dense", "transformers"): 10.0,
        ("packed", "compiled"): 33.0,
    }
    speeds = [
        {"model": model, "decoder": decoder, "phase": phase, "batch": 1, "threads": 2}
        | dict.fromkeys(("median", "slowest", "fastest"), rate)
        for phase in ("prefill", "decode")
        for (model, decoder), rate in rates.items()
    ]
    places = (
        "dense_bytes",
        "packed_bytes",
        "dense_linear_bytes",
        "packed_linear_bytes",
        "packed_disk_bytes",
    )
    kinds = {
        **dict.fromkeys(("dtype", "dense_dtype", "kernel"), "float32"),
        "packed_name": "half-packed",
    }
    benchmark = {
        **stamp,
        **dict.fromkeys(places, 1_500_000),
        **kinds,
        "dense_disk_bytes": None,
    }
    benchmark |= {"speeds": speeds, "verdict": []}
    return {"format": 1, "evaluations": [evaluation], "benchmarks": [benchmark], **more}


EVALUATION: dict[str, Any] = {
    "protocol": {
        "text": "wikitext2", "digest": "ab", "window": 512, "windows": 8, "tokens": 4088, "bos": "yes",
        "dtype": "float32",
    },
    "perplexity": {"value": 14.37, "low": 13.9, "high": 14.9, "of_a_later_release": 1},
    "against": {
        "model": "/home/me/dense", "perplexity": {"value": 12.5, "low": 12.1, "high": 12.9},
        "kl": 0.123, "kl_low": 0.1, "kl_high": 0.15, "agreement": 0.81, "recovery": 0.9,
    },
    "tasks": {"arc_easy": {"acc,none": {"value": 0.61, "stderr": 0.01}}},
    "sparsellm": "0.1.0", "machine": "cpu", "date": "2026-01-01",
}  # fmt: skip


def write_results(directory: Path, *evaluations: Any) -> None:
    (directory / "results.json").write_text(
        json.dumps({"format": 1, "evaluations": evaluations, "benchmarks": []})
    )

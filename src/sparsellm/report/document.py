"""Renders and writes the HTML files."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import importlib.resources
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps

from sparsellm.arguments import Out, PathGiven, checked
from sparsellm.errors import MissingExtraError, StorageError, shown
from sparsellm.files.contents import changing, listed_files
from sparsellm.files.directory import Place
from sparsellm.files.files import create_atomically, replace_atomically, write_all
from sparsellm.records import Pruning, Totals, by_kind, error_of
from sparsellm.report import charts
from sparsellm.report.charts import Chart, Table, percent, short_number
from sparsellm.report.checkpoint import (
    Checkpoint,
    commands_of,
    headline,
    packed_commands,
    read_checkpoint,
)
from sparsepack.files import read_bytes

REPORT = "report.html"
GENERATOR = "sparsellm report"  # tells a file of ours from others
_HEAD = 2048  # bytes at the beginning of a file in which that must stand


@checked
def write_report(
    directory: PathGiven, out: Out | None = None, *, name: PathGiven | None = None
) -> Path:
    """Writes the report of a pruned checkpoint, packed or not, and returns its path.

    Args:
        directory: the checkpoint.
        out: the file; ``report.html`` in the directory if None. A report of ours is replaced.
        name: the directory in the commands on the page, if it is not complete yet and will have another name.

    Raises:
        StorageError: the directory has no ``pruning.json``, or other weights than those that were pruned; a file in it
            cannot be read; or ``out`` is refused.
        MissingExtraError: the chart library is not installed.
    """
    record = read_checkpoint(directory, name)
    page = render_run(record)
    return write_page(page, record.directory / REPORT if out is None else out)


def write_export_report(directory: Path, exported: Path, size: int, out: Path) -> Path:
    """Writes the report of what was ``exported`` from a checkpoint for another program, ``size`` bytes; errors as in
    ``write_report``."""
    record = read_checkpoint(directory, exported)
    record = replace(record, file_bytes=size, exported=True)
    return write_page(render_run(record), out)


def write_page(page: bytes, out: Place) -> Path:
    """Writes a page, and returns its path, links to its folder resolved; errors as in ``check_page``."""
    # first, so that a file that appears after it was looked at is not replaced
    new = not os.path.lexists(os.path.expanduser(out))
    place = check_page(out)
    if listed_files(place.parent) is None:  # no checkpoint of ours
        fill = partial(write_all, data=page)
        if new:
            create_atomically(place, fill)
        else:
            replace_atomically(place, fill)
        return place
    with changing(place.parent) as write:
        return write(place.name, page)


def check_page(out: Place) -> Path:
    """The path of a page, links to its folder resolved. A StorageError if it is not a new file, or a report of ours or
    a link to one, which is replaced and not followed."""
    text = os.fspath(out)
    given = Path(os.path.expanduser(text))
    place = Path(os.path.realpath(given.parent)) / given.name
    fault = ""
    if os.path.isdir(place):
        fault = "a directory"
    elif place.suffix.lower() not in (".html", ".htm"):
        fault = "not the name of a page"
    if fault:
        raise StorageError(
            f"--out {shown(text)} is {fault}; name a file, such as compare.html"
        )
    mark = f'name="generator" content="{GENERATOR}"'.encode()
    if os.path.lexists(place) and mark not in read_bytes(place, _HEAD, StorageError):
        raise StorageError(
            f"--out {shown(text)} is not a report of sparsellm and is not replaced; name another file"
        )
    if not os.path.isdir(place.parent):  # False for a path that is too long
        parent = shown(str(place.parent))
        raise StorageError(
            f"--out {shown(text)}: {parent} is not a directory; create it, or name another file"
        )
    return place


def render_run(record: Checkpoint) -> bytes:
    """The report of one run as HTML."""
    pruning = record.pruning
    rows = headline(record)
    course = charts.course(pruning)
    linears = charts.maps(pruning)
    allocation = charts.allocation_chart(pruning)
    if pruning.experts:
        linears.append(charts.experts_chart(pruning))
    machine = [*pruning.environment.items(), ("processes", str(pruning.processes))]
    commands: list[str] = []
    packing: list[str] = []
    if not record.exported:
        commands = commands_of(rows)
        if record.decoding() is None:
            packing = packed_commands(record)
    return page(
        "run.html.jinja",
        f"{record.model}: {pruning.in_short}",
        [*linears, allocation, *course],
        record=record,
        kind="compressed" if record.exported else "pruned",
        place=shlex.quote(record.name),
        rows=rows,
        commands=commands,
        packed_commands=packing,
        linears=linears,
        allocation=allocation,
        course=course,
        recipe=yaml.safe_dump(
            pruning.recipe, sort_keys=False, allow_unicode=True, width=100
        ),
        versions=Table(("package", "version"), sorted(pruning.versions.items())),
        environment=Table(("of the machine", "value"), machine),
    )


def summary_html(pruning: Pruning, path: Path | None) -> str:
    """A run as a small table without scripts, for notebooks: zeros and error of each kind of linear, time, memory."""
    kinds = {**by_kind(pruning.linears), "all pruned linears": pruning.linears}
    rows = [
        (
            kind,
            f"{Totals.of(part).weights:,}",
            percent(charts.sparsity_of(part)),
            short_number(error_of(part)),
        )
        for kind, part in kinds.items()
    ]
    title = f"{pruning.method} {pruning.target}: {percent(pruning.sparsity_reached)} zeros in the blocks"
    content = Table(("kind of linear", "weights", "zeros", "mean error"), rows)
    parts: Any = _templates().get_template("parts.html.jinja").make_module()
    shown_as = parts.table(content, title)
    text = f"{sum(pruning.whole_seconds.values()):.1f} s · peak memory {pruning.peak_rss_bytes / 1e9:.2f} GB"
    return f"<div>{shown_as}<p>{html.escape(f'{text} · {path}' if path else text)}</p></div>"


def page(template: str, title: str, figures: Sequence[Chart], **context: Any) -> bytes:
    """One HTML file with all that it needs: ``figures`` are its charts, and every text in ``context`` is escaped."""
    library, digest = _library()
    folder = importlib.resources.files("sparsellm.report").joinpath("page")
    script = folder.joinpath("charts.js").read_text("utf-8")
    style = folder.joinpath("style.css").read_text("utf-8")
    policy = (
        f"default-src 'none'; script-src '{_source_hash(script)}' '{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    values = {chart.name: chart.figure for chart in figures}
    # no text in it can end the script
    drawn = htmlsafe_json_dumps(values, allow_nan=False, separators=(",", ":"))
    context |= {
        "title": title,
        "policy": policy,
        "generator": GENERATOR,
        "style": style,
        "script": script,
    }
    made = _templates().get_template(template)
    text = made.render(library=library, figures=drawn, **context)
    return text.encode("utf-8", "backslashreplace")


@cache
def _templates() -> Environment:
    """The templates of this package; every value in them is escaped."""
    loader = PackageLoader("sparsellm.report", "page")
    return Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )


@cache
def _library() -> tuple[str, str]:
    """plotly.js, compressed and in base64, and the hash by which the page's policy lets it run."""
    try:
        package = importlib.resources.files("plotly")
        file = package.joinpath("package_data", "plotly.min.js")
        source = file.read_text("utf-8")
    except (ModuleNotFoundError, FileNotFoundError):
        raise MissingExtraError(
            "a report needs the package plotly: pip install plotly"
        ) from None
    compressed = gzip.compress(source.encode(), 6, mtime=0)
    return base64.b64encode(compressed).decode(), _source_hash(source)


def _source_hash(source: str) -> str:
    digest = hashlib.sha256(source.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"

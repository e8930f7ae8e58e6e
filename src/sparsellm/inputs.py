"""Reads JSON, YAML and sizes of memory from outside, within limits and before any work."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Hashable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from sparsellm.errors import (
    DataError,
    RecipeError,
    StorageError,
    shown,
)
from sparsepack import files

MOST_YAML = 256 << 10  # bytes, a hundred times a recipe's
MOST_DEPTH = 32  # levels of lists and mappings
MOST_PARTS = 100_000  # values, at any depth, of a setting that was given in Python

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
# What stands before a path in an option or a source, such as ``--set=calibration=file:``
_BEFORE_PATH = re.compile(r"(?:--?[\w-]+=)?(?:[\w.]+=)?(?:(?:file|wikitext2):)?")
# A source and its share in a mixture; the name may hold colons and commas, since a share ends in a comma or the text
_SHARED = re.compile(
    r"\s*([^,\s].*?):(\d{1,9}(?:\.\d{0,15})?|\.\d{1,15})\s*(,(?=.)|\Z)", re.ASCII
)

SIZES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZES |= {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZE = re.compile(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([A-Za-z]{0,3})\s*", re.ASCII)
# A smaller number without a unit was meant in another one
LEAST_PLAIN = 10**6


# sparsepack's readers of JSON; they raise StorageError unless ``error=`` names another.
parse_json = partial(files.parse_json, error=StorageError)
read_object = partial(files.read_object, error=StorageError)


def parse_yaml(data: bytes | str, where: str) -> Any:
    """The value of a YAML text with the numbers of YAML 1.2: ``1e-3`` is one; ``2:4`` and ``2024-01-01`` are strings.
    A RecipeError for tags, aliases, repeated keys and what is beyond a limit."""
    with files.refused_as(RecipeError, where):
        text = files.text_of(data, MOST_YAML)
        depth = 0
        try:
            for event in yaml.parse(text, Loader=_Loader):  # before a value is made
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(
                    event, yaml.CollectionEndEvent
                )
                if depth > MOST_DEPTH:
                    raise ValueError(f"it is nested deeper than {MOST_DEPTH} levels")
                if isinstance(event, yaml.AliasEvent):
                    raise ValueError(
                        f"the alias *{event.anchor} is not read; write the value again"
                    )
                if (tag := getattr(event, "tag", None)) is not None:
                    raise ValueError(
                        f"the tag {tag[:80]} is not allowed; write plain values"
                    )
                if isinstance(event, yaml.ScalarEvent):
                    event.value.encode()  # refuses half of a surrogate pair
            return yaml.load(text, Loader=_Loader)
        except yaml.MarkedYAMLError as bad:
            mark = bad.problem_mark
            place = ""
            if mark is not None:
                place = f", line {mark.line + 1}, column {mark.column + 1}"
            why = f"{bad.problem or bad.context or 'syntax'}{place}"
            raise RecipeError(f"{where} is not valid YAML ({why})"[:300]) from None
        except yaml.YAMLError as bad:
            raise ValueError(bad) from None


def check_size(value: object) -> None:
    """Raises ValueError for a value that ``parse_yaml`` could not read back, or that has too many parts, such as
    one that names itself or a list of lists that are the same one."""
    level = [value]
    parts = 0
    for _ in range(MOST_DEPTH):
        parts += len(level)
        if parts > MOST_PARTS:
            raise ValueError(f"it has more than {MOST_PARTS} parts")
        holders = (item for item in level if isinstance(item, Mapping | list | tuple))
        level = []
        for holder in holders:
            level.extend(holder.values() if isinstance(holder, Mapping) else holder)
        if not level:
            return
    raise ValueError(f"it is nested deeper than {MOST_DEPTH - 1} levels")


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Same as ``parse_yaml`` for a file, which may be unreadable too."""
    file = Path(os.path.expanduser(path))
    if not os.path.lexists(file):
        raise RecipeError(
            f"cannot read {shown(str(path))}: there is no such file; check the path"
        )
    return parse_yaml(
        files.read_bytes(file, MOST_YAML, RecipeError, pipe=True), str(path)
    )


def dump_yaml(values: Mapping[str, object]) -> str:
    """A line for each key, from which ``parse_yaml`` reads the same values; they are written as JSON."""
    text = "".join(
        f"{key}: {json.dumps(value, ensure_ascii=False)}\n"
        for key, value in values.items()
    )
    return "".join(
        c if c.isprintable() or c == "\n" else f"\\U{ord(c):08x}" for c in text
    )


def about(size: int) -> str:
    """A size such as 270 MB, 3.2 GB or 141 GB."""
    if size >= 9.995e8:
        digits = int(size < 9.95e9)
        return f"{size / 1e9:.{digits}f} GB"
    return f"{size / 1e6:.0f} MB"


def mixture_of(source: str) -> list[tuple[str, str]]:
    """The sources of ``SOURCE:SHARE,SOURCE:SHARE`` with their shares as they are written; empty for any other text."""
    if "," in source:
        shared = list(_SHARED.finditer(source))
    else:
        shared = []
    joined = sum(len(part.group()) for part in shared) == len(source)
    if joined and len(shared) > 1:
        return [(part[1], part[2]) for part in shared]
    return []


def without_folders(text: str) -> str:
    """A path, a source, a mixture or an option as files that leave this machine hold it: a path by its last part. The
    id of a model or a data set on the hub stays."""
    if parts := mixture_of(text):
        return ",".join(f"{without_folders(source)}:{share}" for source, share in parts)
    before = _BEFORE_PATH.match(text)
    assert before is not None
    path = text[before.end() :]
    named = path.startswith("hub:") or (
        HUB_ID.fullmatch(path) and not os.path.exists(path.partition("/")[0])
    )
    if named:
        return text
    return before.group() + re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def as_number(text: str) -> str:
    """A hint for a text that stands where a number belongs: what to write for ``50%``, ``0,5`` or
    ``4bit``; else an example."""
    percent = re.fullmatch(r"\s*(\d{1,3}(?:[.,]\d{1,9})?)\s*%\s*", text, re.ASCII)
    if percent is not None:
        return f"write {float(percent[1].replace(',', '.')) / 100:g}"
    if re.fullmatch(r"\s*-?\d{1,9},\d{1,9}\s*", text, re.ASCII):
        return f"write {text.strip().replace(',', '.')}, with a point"
    unit = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*[A-Za-z-]+\s*", text, re.ASCII)
    if unit is not None:
        return f"write {unit[1]}, without a unit"
    if "," in text:
        return "write one number; `sparsellm compare` takes several, with commas"
    return "write a number, such as 0.5"


def as_whole_number(text: str) -> str:
    """The same where a whole number belongs: what to write for ``32k`` or ``1,000``; else an example."""
    digits = re.fullmatch(r"\s*(\d{1,9})([kKM])\s*", text, re.ASCII)
    if digits is not None:
        return f"write {int(digits[1]) * {'k': 1000, 'm': 10**6}[digits[2].lower()]}"
    if re.fullmatch(r"\s*\d{1,3}(?:[,_.]\d{3})+\s*", text, re.ASCII):
        return f"write {re.sub('[^0-9]', '', text)}"
    if re.fullmatch(r"\d{1,3}(\.\d{1,3})?[eE]\d", text, re.ASCII):
        return f"write {float(text):.0f}"
    return "write a whole number"


def text_file(path: str) -> Path:
    """The path of a file that exists; raises DataError for one that does not."""
    try:
        path.encode()  # records hold its name
        file = Path(path).expanduser()
        if file.is_file():
            return file
        if file.is_dir():
            reason = "is a directory"
        else:
            reason = "is not a file" if file.exists() else "does not exist"
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # too long; no such user after '~'; a null byte; not UTF-8
        reason = f"cannot be read ({getattr(error, 'strerror', None) or error})"
    raise DataError(
        f"text file {shown(path)} {reason}; check the path, or name another source"
    )


def parse_bytes(text: str | int) -> int:
    """The bytes in ``4GiB``, ``500 MB`` or a plain number of bytes; case does not matter. A RecipeError for anything
    else, and for a plain number below a million, such as 4, which is rarely meant in bytes."""
    match = _SIZE.fullmatch(text if isinstance(text, str) else shown(text))
    units = {name.lower(): size for name, size in SIZES.items()}
    size = 0
    such = "4GiB"
    if match is not None:
        number, unit = match.groups()
        size = int(float(number) * units.get((unit or "b").lower(), 0))
        if len(number) <= 6 and size:
            such = f"{number}GiB"
        if not unit and 1 <= size < LEAST_PLAIN:
            raise RecipeError(
                f"size {shown(text)} means {size} bytes; write a unit, such as {such}"
            )
    if not 1 <= size <= 1 << 62:
        known = ", ".join(SIZES)
        raise RecipeError(
            f"size {shown(text)} is unknown; write a positive number and one of {known}, such as {such}"
        )
    return size


_INT = "tag:yaml.org,2002:int"
_FLOAT = "tag:yaml.org,2002:float"
_REPLACED = (_INT, _FLOAT, "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value")
_NUMBERS = {
    _INT: r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    _FLOAT: r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}


class _Loader(yaml.SafeLoader):
    """YAML's safe loader with the numbers of YAML 1.2, without dates, and without repeated keys."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, expression) for tag, expression in pairs if tag not in _REPLACED]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        keys = Counter(
            key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)
        )
        for key, count in keys.most_common(1):
            if count > 1:
                why = f"the key {key[:80]!r} occurs twice"
                raise yaml.constructor.ConstructorError(
                    problem=why, problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep=deep)


def _number(loader: yaml.SafeLoader, node: Any) -> int | float:
    text: str = node.value.lower()
    if node.tag == _INT:
        if text.startswith(("0x", "0o")):
            return int(text, 0)
        return int(text)
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


for _tag, _expression in _NUMBERS.items():
    _Loader.add_implicit_resolver(
        _tag, re.compile(rf"({_expression})\Z"), list("-+.0123456789")
    )
    _Loader.add_constructor(_tag, _number)

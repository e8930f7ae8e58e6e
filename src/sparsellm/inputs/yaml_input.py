"""Reads YAML from outside, within limits of size, depth and digits; plain values only."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from sparsellm.errors import RecipeError, SparseLLMError

MOST_BYTES = 256 << 10  # a hundred times a recipe
MOST_DEPTH = 32
MOST_DIGITS = 64  # in a number


def parse_yaml(data: bytes | str, where: str, error: type[SparseLLMError] = RecipeError) -> Any:
    """The value of a YAML text: null, booleans, numbers, strings, lists and mappings.

    Numbers are those of YAML 1.2: ``1e-3`` is a number; ``2:4`` and ``2024-01-01`` are strings, while YAML 1.1 reads a
    number of base 60 and a date. Tags, aliases and repeated keys are refused. Bytes are UTF-8, with or without a BOM.

    Raises:
        SparseLLMError: as ``error``, with ``where`` first, if the text is not YAML, or beyond a limit.
    """
    if len(data) > MOST_BYTES:
        raise error(f"{where} has more than {MOST_BYTES >> 10} KiB; give a shorter one")
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        _check(text)
        return yaml.load(text, Loader=_Loader)
    except UnicodeDecodeError as bad:
        raise error(f"{where} is not UTF-8 (byte {bad.start}); save it as UTF-8") from None
    except yaml.MarkedYAMLError as bad:
        mark = bad.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise error(f"{where} is not valid YAML ({bad.problem or bad.context or 'syntax'}{place})"[:300]) from None
    except (yaml.YAMLError, ValueError, OverflowError) as bad:
        raise error(f"{where} is not valid YAML ({(str(bad).strip() or 'syntax').splitlines()[0][:200]})") from None


def read_yaml(path: Path, error: type[SparseLLMError] = RecipeError) -> Any:
    """Same as :func:`parse_yaml` for a file, which may be unreadable too."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as bad:  # ValueError: a null byte in the path
        raise error(f"cannot read {str(path)[:200]}: {getattr(bad, 'strerror', None) or bad}") from None
    return parse_yaml(data, str(path), error)


def dump_yaml(value: Any) -> str:
    """YAML text from which :func:`parse_yaml` reads the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _check(text: str) -> None:
    """Refuses, before it is loaded, what is nested too deeply or is not a plain value."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH:
            raise ValueError(f"it is nested deeper than {MOST_DEPTH} levels")
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"the alias *{event.anchor} is not read; write the value again")
        if (tag := getattr(event, "tag", None)) is not None:
            raise ValueError(f"the tag {tag[:80]} is not allowed; write plain values")
        if isinstance(event, yaml.ScalarEvent) and re.search("[\ud800-\udfff]", event.value):
            raise ValueError("half of a surrogate pair (\\ud800 to \\udfff), which is not a character")


def _refusal(why: str, node: Any) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, why, node.start_mark)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader with the numbers of YAML 1.2, without dates, and without repeated keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _refusal(f"the key {key.value[:80]!r} occurs twice", key)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """YAML's safe dumper, which quotes strings that YAML 1.1 or 1.2 would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _number(loader: yaml.SafeLoader, node: Any) -> int | float:
    text: str = node.value
    if len(text) > MOST_DIGITS:
        raise _refusal(f"a number of {len(text)} characters; at most {MOST_DIGITS} are read", node)
    if node.tag == _INT:
        return int(text, 0) if text.lower().startswith(("0x", "0o")) else int(text)
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_RESOLVERS = {
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:bool": (r"(?:yes|no|true|false|on|off)", list("yYnNtTfFoO")),
    _INT: (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    _FLOAT: (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    "tag:yaml.org,2002:merge": (r"<<", ["<"]),
}
for _tag, (_expression, _first) in _RESOLVERS.items():
    _flags = re.ASCII | (re.IGNORECASE if _tag.endswith("bool") else 0)
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_expression})\Z", _flags), _first)
for _tag in (_INT, _FLOAT):
    _Loader.add_constructor(_tag, _number)

"""Reads JSON from outside, within limits of size, depth and digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparsellm.errors import SparseLLMError, StorageError

MOST_BYTES = 256 << 20  # ten times the index of a model with a million tensors
MOST_DIGITS = 64  # in an integer; tokenizers write 10^30 for "no limit"


def parse_json(data: bytes | str, where: str, error: type[SparseLLMError] = StorageError) -> Any:
    """The value of a JSON text; bytes are UTF-8, with or without a byte order mark.

    Raises:
        SparseLLMError: as ``error``, with ``where`` first, if the text is not JSON, is too long or too deep, or has an
            integer of more than :data:`MOST_DIGITS` digits or half of a surrogate pair.
    """
    try:
        if len(data) > MOST_BYTES:
            raise ValueError(f"{len(data) / 1e6:.0f} MB; at most {MOST_BYTES / 1e6:.0f} MB of JSON are read")
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        value = json.loads(text, parse_int=_integer)
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair cannot be written again
    except UnicodeDecodeError as bad:
        raise error(f"{where} is not UTF-8 (byte {bad.start}); save it as UTF-8") from None
    except UnicodeEncodeError:
        raise error(f"{where} holds half of a surrogate pair (\\ud800 to \\udfff), which is not a character") from None
    except RecursionError:
        raise error(f"{where} is nested too deeply to be read") from None
    except json.JSONDecodeError as bad:
        raise error(f"{where} is not valid JSON ({bad.msg}, line {bad.lineno}, column {bad.colno})") from None
    except ValueError as bad:
        raise error(f"{where}: {bad}") from None
    return value


def read_object(path: Path, error: type[SparseLLMError] = StorageError) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        SparseLLMError: as ``error``, if the file cannot be read, is not an object, or :func:`parse_json` raises it.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as bad:
        raise error(f"cannot read {path}: {bad.strerror or bad}") from None
    value = parse_json(data, str(path), error)
    if not isinstance(value, dict):
        raise error(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits; at most {MOST_DIGITS} are read")
    return int(digits)

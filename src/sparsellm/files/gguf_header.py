"""The header of a GGUF file, read within limits: libraries that read it loop over the counts that it states."""

from __future__ import annotations

import itertools
import math
import os
import re
import struct
from pathlib import Path
from typing import BinaryIO

from sparsellm.errors import ModelError
from sparsepack.files import DEEPEST, MANY

# Bytes of the scalar types by their number; 8 is a string, 9 an array.
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_INTEGERS = (0, 1, 2, 3, 4, 5, 10, 11)
_STRING = 8
_ARRAY = 9
# strings of an array: a dozen times the tokens or merges of the largest vocabulary
_MOST_ITEMS = 1 << 22
_MOST_PAIRS = 1 << 16  # keys with values
# bytes that describe a tensor: name, dimensions, type, place
_LEAST_TENSOR = 8 + 4 + 8 + 4 + 8
# What transformers does not read for all models.
_UNREAD = re.compile(
    r"rope_f.*|blk\.\d+\.attn_(q|k|v|qkv|output)\.bias|.*\.rope\.scaling\.factor"
)
_SIZES = re.compile(
    r"[\w-]+\.(vocab_size|(embedding|feed_forward)_length|expert_count|attention\.head_count(_kv)?)"
)


def check_header(path: Path) -> tuple[list[str], str, int]:
    """The names of scalings of positions and of biases of attention, which transformers may not read; the way in which
    text is split before it becomes tokens, "" if the file says none; and the number of weights.

    Raises ModelError if the header states more than the file holds, no ``block_count``, or sizes of a model that its
    tensors do not have, such as a ``block_count`` beyond the number of tensors; or if the file is one of several."""
    size = os.stat(path).st_size
    try:
        with path.open("rb") as file:
            sizes, split, names, shapes = _read_all(file, size)
    except (ValueError, struct.error) as error:
        raise ModelError(
            f"{path} cannot be converted: {error}; it is damaged or cut short: fetch it again"
        ) from None
    if sizes.get("split.count", 1) > 1:
        raise ModelError(
            f"{path} is one of several files; join them with llama-gguf-split --merge"
        )
    depths = [key for key in sizes if key.endswith(".block_count")]
    if not depths:
        raise ModelError(
            f"{path} cannot be converted: it does not say how many blocks it has; fetch it again"
        )
    largest = max(itertools.chain((0,), *shapes))
    limits = dict.fromkeys(depths, min(len(shapes), DEEPEST))
    limits |= dict.fromkeys(filter(_SIZES.fullmatch, sizes), max(MANY, largest))
    for key, most in limits.items():
        if sizes[key] > most:
            has = f"has {len(shapes)} tensors of at most {largest} rows or columns (blocks: at most {DEEPEST})"
            raise ModelError(
                f"{path} cannot be converted: it says {key} {sizes[key]}, and {has}; fetch it again"
            )
    unread = list(filter(_UNREAD.fullmatch, names))
    return unread, split, sum(map(math.prod, shapes))


def _read_all(
    file: BinaryIO, size: int
) -> tuple[dict[str, int], str, list[str], list[tuple[int, ...]]]:
    """The integers by key, the way in which text is split, the names of all keys and tensors, and the shapes."""
    file.seek(4)  # after the magic
    version, tensors, pairs = _read(file, "<IQQ")
    if version not in (2, 3):
        raise ValueError(
            f"it has version {version} of the format, and 2 and 3 are read"
        )
    if pairs > _MOST_PAIRS or tensors > size // _LEAST_TENSOR:
        raise ValueError(
            f"it states {tensors} tensors and {pairs} values in {size} bytes"
        )
    sizes: dict[str, int] = {}
    names: list[str] = []
    split = ""
    for _ in range(pairs):
        key = _text(file, size)
        (kind,) = _read(file, "<I")
        if (key, kind) == ("tokenizer.ggml.pre", _STRING):
            split = _text(file, size)
            continue
        raw = _value(file, kind, size)
        names.append(key)
        if kind in _INTEGERS:
            # the larger where a key is repeated
            sizes[key] = max(int.from_bytes(raw, "little"), sizes.get(key, 0))
    shapes = []
    for _ in range(tensors):
        names.append(_text(file, size))
        (count,) = _read(file, "<I")
        if count > 8:
            raise ValueError(f"a tensor has {count} dimensions")
        shapes.append(_read(file, f"<{count}Q"))
        _read(file, "<IQ")
    return sizes, split, names, shapes


def _value(file: BinaryIO, kind: int, size: int) -> bytes:
    """The bytes of a scalar; strings and arrays are skipped."""
    if kind in _SCALARS:
        return _bytes(file, _SCALARS[kind])
    inside, count = _read(file, "<IQ") if kind == _ARRAY else (kind, 1)
    if inside in _SCALARS:
        _skip(file, count * _SCALARS[inside], size)
    elif inside != _STRING or count > _MOST_ITEMS:
        raise ValueError(f"it has {count} values of type {inside}")
    else:
        for _ in range(count):
            _skip(file, _read(file, "<Q")[0], size)
    return b""


def _text(file: BinaryIO, size: int) -> str:
    (length,) = _read(file, "<Q")
    if length > min(size, 1 << 16):  # a name is shorter
        raise ValueError(f"it states a name of {length} bytes")
    return _bytes(file, length).decode("utf-8", "replace")


def _skip(file: BinaryIO, length: int, size: int) -> None:
    if length > size - file.tell():
        raise ValueError(f"it states {length} bytes at {file.tell()} of {size}")
    file.seek(length, os.SEEK_CUR)


def _read(file: BinaryIO, form: str) -> tuple[int, ...]:
    return struct.unpack(form, _bytes(file, struct.calcsize(form)))


def _bytes(file: BinaryIO, length: int) -> bytes:
    data = file.read(length)
    if len(data) < length:
        raise ValueError(f"it ends after {file.tell()} bytes, inside its header")
    return data

"""JSON objects and weight files of a checkpoint, read within limits."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsepack.errors import FormatError, UserError, shown

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MOST_JSON = 256 << 20  # bytes: ten times the index of a model with a million tensors
SIZES = ("hidden_size", "vocab_size", "num_attention_heads", "num_hidden_layers")
_COUNTS = re.compile(r"(num|n)_(\w*_)?(layers?|blocks?|experts)")
_DEPTH = re.compile(r"(num_hidden|num|n)_layers?")
# the numbers in a name such as model.layers.3.mlp.up_proj
_IN_THEIR_LISTS = re.compile(r"(?:^|\.)(\d{1,9})(?=\.)")
_QUICK = 256  # layers that are built in a moment; up to here, the names of the weights decide if they are too many
DEEPEST = 2048  # layers, which are built in half a minute
MANY = 4096  # experts and other sizes that are built in a moment
LARGEST = 1 << 22  # rows or columns, where there are no weights to compare with
# Keys of a config that describe files, not the function of the model. A model in memory has no architectures.
_STORAGE = {
    "_name_or_path",
    "architectures",
    "dtype",
    "quantization_config",
    "torch_dtype",
}
_STORAGE |= {"transformers_version", "transformers_weights", "use_cache"}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def parse_json(
    data: bytes | str, where: str, error: type[UserError] = FormatError
) -> Any:
    """The value of a JSON text; bytes are UTF-8, with or without a byte order mark. ``error`` is raised, with ``where``
    first, if it is not JSON, too long, too deep, or has half of a surrogate pair or an integer that Python refuses."""
    with refused_as(error, where):
        value = json.loads(text_of(data, MOST_JSON))
        # half of a surrogate pair cannot be written again
        json.dumps(value, ensure_ascii=False).encode()
        return value


def read_object(path: Path, error: type[UserError] = FormatError) -> dict[str, Any]:
    """The object in a JSON file; ``error`` is raised if it cannot be read or is something else."""
    value = parse_json(read_bytes(path, MOST_JSON, error), str(path), error)
    if not isinstance(value, dict):
        raise error(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def read_bytes(
    path: Path, most: int, error: type[UserError], *, pipe: bool = False
) -> bytes:
    """The first bytes of a file, at most one more than ``most``. ``error`` is raised if it cannot be read, or is a pipe
    or a device, which might not end; ``pipe`` takes one that a shell has opened, such as ``/dev/fd/63``."""
    try:
        opened = pipe and os.path.realpath(path).startswith("/proc/")
        if (
            not opened
            and os.path.exists(path)
            and not os.path.isfile(path)
            and not os.path.isdir(path)
        ):
            raise error(f"{str(path)[:200]} is not an ordinary file; give one")
        with path.open("rb") as file:
            return file.read(most + 1)
    except (OSError, ValueError) as bad:  # ValueError: a null byte in the path
        raise error(
            f"cannot read {str(path)[:200]}: {getattr(bad, 'strerror', None) or bad}"
        ) from None


def text_of(data: bytes | str, most: int) -> str:
    """The text of UTF-8; a ValueError if it is longer than ``most``."""
    if len(data) > most:
        raise ValueError(f"more than {most >> 10} KiB; give a shorter one")
    if isinstance(data, bytes):
        return data.decode("utf-8-sig")
    return data


@contextmanager
def refused_as(error: type[UserError], where: str) -> Iterator[None]:
    """Turns the errors of a parser into one line with ``where`` first."""
    try:
        yield
    except UnicodeDecodeError as bad:
        raise error(
            f"{where} is not UTF-8 (byte {bad.start}); save it as UTF-8"
        ) from None
    except UnicodeEncodeError:
        raise error(
            f"{where} holds half of a surrogate pair (\\ud800 to \\udfff), which is not a character"
        ) from None
    except RecursionError:
        raise error(f"{where} is nested too deeply to be read") from None
    except json.JSONDecodeError as bad:
        raise error(
            f"{where} is not valid JSON ({bad.msg}, line {bad.lineno}, column {bad.colno})"
        ) from None
    except ValueError as bad:
        raise error(
            f"{where} cannot be read: {(str(bad).strip() or 'syntax').splitlines()[0][:200]}"
        ) from None


def unfit_size(
    sizes: Mapping[str, Any], shapes: Mapping[str, Sequence[int]] | None
) -> str | None:
    """The first of the sizes in a config with which transformers would take hours to build a model, or fail, as a
    clause: width, vocabulary, and numbers of heads, layers or experts below 1 or far beyond the weights, whose shapes
    are given by name, or beyond all models, where there are none; None if there is none."""
    known = shapes or {}
    longest = 1 + max(
        (int(number) for name in known for number in _IN_THEIR_LISTS.findall(name)),
        default=-1,
    )
    largest = max((size for shape in known.values() for size in shape), default=0)
    rows = LARGEST if shapes is None else largest
    for name, value in sizes.items():
        if type(value) is not int or not (name in SIZES or _COUNTS.fullmatch(name)):
            continue
        if _DEPTH.fullmatch(name):
            most = min(max(_QUICK, longest), DEEPEST)
        elif name in SIZES:
            most = max(MANY, longest, rows)
        else:
            most = max(MANY, longest, largest)
        if value <= most and (value >= 1 or name not in SIZES):
            continue
        said = f"says {name} {value!s:.40}"
        if shapes is None:
            return f"{said}; a model has 1 to {most}"
        said += f", and the weights have no list of modules longer than {longest} "
        said += f"and no more than {largest} rows or columns"
        if value > DEEPEST:
            said += f"; at most {DEEPEST} layers are built"
        return said
    return None


def config_difference(
    values: Mapping[str, Any], others: Mapping[str, Any]
) -> str | None:
    """The first value of a ``config.json`` that another model has different, as a clause; None if there is none."""
    for key in sorted((values.keys() | others.keys()) - _STORAGE):
        if values.get(key) != others.get(key):
            return f"{key} in config.json is {shown(values.get(key))}, not {shown(others.get(key))}"
    return None


def context_limit(config: PretrainedConfig) -> int | None:
    """The most tokens of one sequence, prompt and continuation together; None if the config names no limit."""
    # transformers maps n_positions and the like to this name
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and limit > 0:
        return limit
    return None


def weight_files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The weight files of a checkpoint, and the file name of each tensor in the index, if there is one. A FormatError
    says that there are none, or that the index names a file that is not in the directory. Next to ``model.safetensors``
    an index counts for nothing, as in transformers, whose ``save_pretrained`` may leave one there."""
    index = directory / INDEX
    single = directory / SINGLE
    if os.path.lexists(index) and not single.is_file():
        shard_of = read_object(index).get("weight_map")
        if (
            not isinstance(shard_of, dict)
            or not shard_of
            or {type(name) for name in shard_of.values()} != {str}
        ):
            raise FormatError(
                f"{index} has no weight_map from tensors to names of files; download it again"
            )
        names = sorted(set(shard_of.values()))
        for name in names:
            # also False if it is too long
            if Path(name).name != name or not os.path.isfile(directory / name):
                raise FormatError(
                    f"{index} names the shard {name!r:.100}, which is not in {directory}; download it again"
                )
        return [directory / name for name in names], shard_of
    if single.is_file():
        return [single], {}
    files = sorted(filter(os.path.isfile, directory.glob("*.safetensors")))
    if files:
        return files, {}
    if any(directory.glob("*.bin")):
        raise FormatError(
            f"{directory} has only pickled weights (*.bin), which can run code when opened; "
            "convert them with model.save_pretrained(..., safe_serialization=True)"
        )
    raise FormatError(
        f"{directory} has no *.safetensors weights; give a directory saved by save_pretrained"
    )

"""The model card: ``README.md`` of a checkpoint, from its ``pruning.json`` and ``results.json``."""

from __future__ import annotations

import hashlib
import importlib.resources
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from sparsellm.arguments import Checkpoint, checked
from sparsellm.errors import StorageError
from sparsellm.files.contents import changing, check_weights
from sparsellm.files.demo_model import BASE
from sparsellm.files.named import as_typed
from sparsellm.files.results import read_results
from sparsellm.inputs import HUB_ID, dump_yaml, read_object, without_folders
from sparsellm.recipe import Recipe
from sparsellm.records import Evaluation, Export, Pruning, read_pruning
from sparsepack.checkpoint import PackedEntry, is_packed, packed_entries

CARD = "README.md"
_MARK = "<!-- Written by sparsellm, which replaces it unless it was edited: {} -->\n"
_LICENSE = ("license", "license_name", "license_link")
# in the dense model's card and in a value: a hundred times the usual
_MOST_BYTES = 1 << 20
_MOST_CHARACTERS = 300
# settings shown also at their defaults
_ALWAYS = (
    "method",
    "sparsity",
    "calibration",
    "samples",
    "seq_len",
)


def base_of(model: object, directory: Path | None) -> dict[str, str]:
    """The hub id of a dense model as ``model``, and the license that its card states; empty where nothing is known.
    ``directory`` is its checkpoint; None for a model that was given as an object."""
    from huggingface_hub import metadata_load

    if model == "demo" or as_typed(str(directory)) == "demo":
        return BASE
    name = getattr(model, "name_or_path", "") if directory is None else str(model)
    # in the hub's cache
    if directory is not None and directory.parent.name == "snapshots":
        name = directory.parents[1].name.removeprefix("models--").replace("--", "/")
    known = {}
    if HUB_ID.fullmatch(name) and not Path(name).exists():
        known["model"] = name
    # the card belongs to somebody else and does not stop the run
    with suppress(Exception):
        if (
            directory is not None
            and (card := directory / CARD).is_file()
            and card.stat().st_size <= _MOST_BYTES
        ):
            stated = metadata_load(card) or {}
            for key in _LICENSE:
                value = stated.get(key)
                if (
                    isinstance(value, str)
                    and 0 < len(value.strip()) <= _MOST_CHARACTERS
                ):
                    known[key] = value
    return known


@checked
def card(directory: Checkpoint) -> Path:
    """Writes the model card (``README.md``) of a checkpoint again, with its evaluations, and returns its path.

    Raises:
        StorageError: the checkpoint has no ``pruning.json``, no evaluation or export in ``results.json``, a damaged
            file, other weights than those that were pruned, or a card that somebody else wrote or edited. Nothing is
            written."""
    directory = Path(directory).expanduser()
    text = _text_of(directory)
    check_weights(directory)
    results = read_results(directory)
    if not results.evaluations and not results.exports:
        raise StorageError(
            f"{directory} was never evaluated; run `sparsellm eval` on it first"
        )
    check_card(directory)
    with changing(directory) as write:
        return write(CARD, text.encode())


def is_behind(directory: Path) -> bool:
    """Whether the card of a checkpoint is sparsellm's, and another than ``card`` would write: a process was killed
    after it had added results."""
    path = directory / CARD
    return is_unedited(path) and path.read_text("utf-8") != _text_of(directory)


def _text_of(directory: Path) -> str:
    """The text of a checkpoint's card, from its records."""
    run = read_pruning(directory)
    results = read_results(directory)
    file = directory / "config.json"
    config = read_object(file) if file.is_file() else {}
    packed = packed_entries(config["quantization_config"]) if is_packed(config) else {}
    return card_text(
        run, results.shown(), packed=packed.values(), files=results.exports
    )


def check_card(directory: Path) -> None:
    """Raises StorageError if the card of a checkpoint is not as sparsellm wrote it, and so cannot be replaced."""
    path = directory / CARD
    if os.path.lexists(path) and not is_unedited(path):
        raise StorageError(
            f"{path} was not written by sparsellm, or was edited since; move it away"
        )


def is_unedited(path: Path) -> bool:
    """Whether a card is as ``card_text`` made it."""
    if not path.is_file():  # a pipe or a device might not end
        return False
    try:
        *lines, last = path.read_bytes().decode().splitlines(keepends=True) or [""]
    except (OSError, UnicodeDecodeError):
        return False
    return last == _MARK.format(_digest("".join(lines)))


def card_text(
    run: Pruning,
    evaluations: Sequence[Evaluation] = (),
    *,
    packed: Iterable[PackedEntry] = (),
    exported: Export | None = None,
    files: Sequence[Export] = (),
) -> str:
    """The text of a card, with a mark by which ``is_unedited`` knows it. It does not name the directory, which may
    be moved. Texts that come from files and users stand in code spans and blocks, so they are never markup.

    Args:
        run, evaluations: what is known of the checkpoint.
        packed: its packed linears, embedding and head, if it is packed.
        exported: the export that it is, if it is one.
        files: what was exported from it.
    """
    from huggingface_hub import ModelCard, ModelCardData  # takes a tenth of a second

    base = run.base.model if HUB_ID.fullmatch(run.base.model or "") else None
    pattern = run.recipe.get("pattern")
    bits = run.bits_per_weight
    counts_zeros = run.sparse or bits is None
    if counts_zeros:
        tags = ["sparsellm", "pruning", "sparsity"]
        done = f"pruned after training by sparsellm: {run.sparsity_reached:.2%} of the weights of the blocks are zero"
    else:
        tags = ["sparsellm", "quantization"]
        done = f"compressed after training by sparsellm: the linears of the blocks have {bits:.2f} bits a weight"
    if isinstance(pattern, str):
        tags.append(f"sparsity-{pattern}")
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        **run.base.model_dump(include=set(_LICENSE), exclude_none=True),
    )
    defaults = Recipe().model_dump()
    settings = dump_yaml(
        {
            key: item
            for key, item in run.recipe.items()
            if key in _ALWAYS or item != defaults.get(key)
        }
    )
    fence = "`" * max(3, _longest_run(settings) + 1)
    template = importlib.resources.files("sparsellm.report").joinpath("card.md.jinja")
    card = ModelCard.from_template(
        data,
        template_str=template.read_text("utf-8"),
        run=run,
        done=done,
        counts_zeros=counts_zeros,
        types=Counter(map(run.values_of, run.linears)).most_common(),
        base=base,
        name=base or run.base.name or "a model from memory",
        evaluations=evaluations,
        packed=sorted({entry.value_type for entry in packed}),
        exported=exported,
        files=files,
        settings=f"{fence}yaml\n{settings.rstrip()}\n{fence}",
        versions=", ".join(
            _code(f"{tool} {version}") for tool, version in run.versions.items()
        ),
        code=_code,
        named=without_folders,
    )
    text = f"{card}\n"
    return text + _MARK.format(_digest(text))


def _code(value: object) -> str:
    """A code span, also inside of a table."""
    text = "".join(c if c.isprintable() else "�" for c in str(value)).replace("|", "¦")
    fence = "`" * (_longest_run(text) + 1)
    if len(fence) > 1 or not text.strip():
        text = f" {text} "
    return f"{fence}{text}{fence}"


def _longest_run(text: str) -> int:
    """The length of the longest run of backticks."""
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
